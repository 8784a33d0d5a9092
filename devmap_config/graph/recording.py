"""Records what running modules allocate, compute, and pass to each other, on tensors without data."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch

from devmap_config.graph.failures import OtherInputsError
from devmap_config.libraries.torch import (
    attending_with,
    dispatch_mode,
    flop_registry,
    is_grouped_product,
    is_question,
    is_view,
    operation_name,
    operation_packet,
    own_buffers,
    own_parameters,
    shown_storage,
    storage_identity,
    torch_attention,
    tree_leaves,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel

HALF_PRECISION_BYTES = 2

TORCH_ATTENTION = torch_attention()
"""torch's own function, before it is patched."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event, with the modules that were running, the innermost last."""

    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Allocation(RecordedEvent):
    """A storage that was allocated (positive) or freed (negative); its identity is not compared."""

    storage: int = field(compare=False)
    size_bytes: int


class Recorder(dispatch_mode()):  # type: ignore[misc]  # torch is not read by the type checker
    """Records when storages are allocated and freed, which modules are running, and what passes between blocks."""

    def __init__(self, names: dict[int, str], known: tuple[torch.Tensor, ...], traffic: Traffic) -> None:
        """Keep the `known` tensors alive: if they were freed, later tensors could have their addresses."""
        super().__init__()
        self._held = known
        self.names = names
        self.traffic = traffic
        self.running: tuple[str, ...] = ()
        self.events: list[RecordedEvent] = []
        self.repeated: dict[str, str] = {}  # for blocks that were not run, the block that they repeated
        self.stands_for: dict[int, tuple[str, int]] = {}
        """By storage that a block left behind: that block, and how many blocks repeated it, whose storages are freed
        with it.
        """
        self.maker: dict[int, str] = {}
        self._known = {storage_key(tensor) for tensor in known}
        self._alive: dict[int, int] = {}
        self._serial = len(known)
        self._ignores = False

    @property
    def innermost(self) -> str:
        """The innermost running module."""
        return self.running[-1] if self.running else ""

    @property
    def allocations(self) -> Iterator[Allocation]:
        """Yield the storages that were allocated and freed."""
        return (event for event in self.events if isinstance(event, Allocation))

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Treat tensors that are made while the context lasts, such as a model's inputs, as if they had existed
        before.
        """
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def enter(self, module: torch.nn.Module, arguments: Any, options: Any) -> None:
        """Note that a module begins to run."""
        path = self.names[id(module)]
        self.running = (*self.running, path)
        self.traffic.enter(path, arguments, options, self.serial_of)

    def leave(self, module: torch.nn.Module, _arguments: Any, _options: Any, output: Any) -> None:
        """Note that a module has run."""
        self.running = self.running[:-1]
        self.traffic.leave(self.names[id(module)], output)

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch the modules of a model. Garbage collection is off meanwhile, because its timing depends on earlier
        work.
        """
        with ExitStack() as stack:
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                leaving = module.register_forward_hook(self.leave, with_kwargs=True, always_call=True)
                stack.callback(leaving.remove)
            stack.enter_context(self)
            yield

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = options or {}
        if (budget := _BUDGET.get()) is not None:
            budget.spend()
        result = _grouped_product(arguments) if is_grouped_product(function) else None
        if result is None:
            result = function(*arguments, **options)
        if is_question(function):
            return result
        self.dispatch()
        if is_view(function):
            return result
        outputs = list(tensors_in(result))
        for tensor in outputs:
            self.note(tensor)
        self.observe(function, arguments, options, result, outputs)
        return result

    def dispatch(self) -> None:
        """Take note of an operation that was dispatched, even if only for a view."""

    def observe(self, function: Any, arguments: Any, options: Any, result: Any, outputs: list[torch.Tensor]) -> None:
        """Take note of an operation that was run; the storages of its outputs are recorded already."""
        del function, result
        self.traffic.operate(map(self.serial_of, tensors_in((arguments, options))), map(self.serial_of, outputs))

    def note(self, tensor: torch.Tensor) -> None:
        """Record the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage_identity(storage)
        if key in self._known or key in self._alive:
            return
        if self._ignores:
            self._known.add(key)
            finalize(storage, self._known.discard, key)
            return
        size_bytes = storage.nbytes()
        self._serial += 1  # an address may be reused
        self._alive[key] = self._serial
        self.maker[self._serial] = self.running[-1] if self.running else ""
        self.events.append(Allocation(self.running, self._serial, size_bytes))
        finalize(storage, self.forget, key, self._serial, size_bytes)

    def watch_for_release(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch when storages that existed before are freed, as when a cache is copied to a larger one."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key not in self._known:
                self._known.add(key)
                finalize(tensor.untyped_storage(), self.release, key, tensor.untyped_storage().nbytes())

    def release(self, key: int, size_bytes: int) -> None:
        """Note that a storage which existed before is freed."""
        self._known.discard(key)
        self.events.append(Allocation(self.running, -1, -size_bytes))

    def forget(self, key: int, serial: int, size_bytes: int) -> None:
        """Note that a recorded storage is freed."""
        if self._alive.get(key) == serial:
            del self._alive[key]
            block, others = self.stands_for.pop(serial, ("", 0))
            gone = Allocation(self.running, serial, -size_bytes)
            self.events += [gone] * (1 if block in self.running else 1 + others)

    def serial_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number under which a tensor's storage was recorded."""
        return self._alive.get(storage_key(tensor))


MOST_OPERATIONS = 1_000_000
"""The most operations that a model is run for without data: about three minutes; DeepSeek-V3 takes a second."""


class TooManyOperationsError(OtherInputsError):
    """A model that is run without data needs too many operations."""


@dataclass
class OperationBudget:
    """The number of operations that recorders may see before they refuse one."""

    spent: int = 0

    def spend(self) -> None:
        """Count an operation.

        Raises:
            TooManyOperationsError: if the budget is spent.
        """
        self.spent += 1
        if self.spent > MOST_OPERATIONS:
            raise TooManyOperationsError(f"it takes more than {MOST_OPERATIONS:,} operations to find out what it does")

    @contextmanager
    def within(self) -> Iterator[None]:
        """Have recorders of this thread draw on this budget while the context lasts."""
        before = _BUDGET.set(self)
        try:
            yield
        finally:
            _BUDGET.reset(before)


_BUDGET: ContextVar[OperationBudget | None] = ContextVar("operation budget", default=None)


class Meter(Recorder):
    """A recorder that also counts what modules compute and touch, and records what passes between blocks."""

    def __init__(self, names: dict[int, str], known: tuple[torch.Tensor, ...], traffic: Traffic) -> None:
        super().__init__(names, known, traffic)
        self.operations: dict[str, int] = {}
        self.touched_bytes: dict[str, int] = {}
        self.attention_operations: dict[str, int] = {}
        self.launches: dict[str, int] = {}
        self.dispatches: dict[str, int] = {}
        self._is_within_kernel = False
        self.order: dict[str, None] = {}
        self.kept: frozenset[int] = frozenset()  # the storages of the final cache

    def enter(self, module: torch.nn.Module, arguments: Any, options: Any) -> None:
        """Note that a module begins to run."""
        super().enter(module, arguments, options)
        self.order.setdefault(self.running[-1])

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch the modules of a model, with attention replaced by a fused kernel."""
        # A patch suffices, as callers look the function up by name; a mode would slow down every other function.
        with super().watching(model), attending_with(self.attend):
            yield

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> Any:
        """Compute attention like a fused kernel, and count it as one, if there is one for the shape."""
        self._is_within_kernel = True
        output = fused_attention(query, key, value, *rest, **options)
        self._is_within_kernel = False
        if output is None:
            return TORCH_ATTENTION(query, key, value, *rest, **options)
        self.dispatch()
        operations = _attention_operations(query, key, value)
        self.add(operations, [query, key, value], [output])
        if query.element_size() == HALF_PRECISION_BYTES:
            before = self.attention_operations.get(self.innermost, 0)
            self.attention_operations[self.innermost] = before + operations
        return output

    def dispatch(self) -> None:
        """Count a dispatched operation."""
        if not self._is_within_kernel:
            self.dispatches[self.innermost] = self.dispatches.get(self.innermost, 0) + 1

    def observe(self, function: Any, arguments: Any, options: Any, result: Any, outputs: list[torch.Tensor]) -> None:
        """Count an operation."""
        super().observe(function, arguments, options, result, outputs)
        if operation_name(function) in WITHOUT_KERNEL:
            return
        inputs = list(tensors_in((arguments, options)))
        self.count(_operations(function, arguments, options, result), _touched_bytes(function, inputs, outputs))

    def add(self, operations: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Count the work of a kernel that is not run."""
        self.traffic.operate(map(self.serial_of, inputs), map(self.serial_of, outputs))
        self.count(operations, sum(map(shown_bytes, (*inputs, *outputs))))

    def count(self, operations: int, touched_bytes: int) -> None:
        """Add to the work of the innermost running module."""
        module = self.innermost
        self.operations[module] = self.operations.get(module, 0) + operations
        self.touched_bytes[module] = self.touched_bytes.get(module, 0) + touched_bytes
        self.launches[module] = self.launches.get(module, 0) + 1


@dataclass
class Traffic:
    """The tensors that pass between blocks: inputs with their makers, and reads of tensors that were no input."""

    blocks: Mapping[str, None]
    skipped: frozenset[str]
    input_bytes: dict[str, int] = field(default_factory=dict)
    output_bytes: dict[str, int] = field(default_factory=dict)
    crossings: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """The number of tensors and their bytes, by reader and maker."""
    bonds: dict[tuple[str, str], None] = field(default_factory=dict)
    origin: dict[int, str] = field(default_factory=dict)
    """The block that made a storage or, outside of blocks, the origin of what it was computed from."""
    current: str = ""
    given: frozenset[int] = frozenset()

    def enter(self, path: str, arguments: Any, options: Any, serial_of: Callable[[torch.Tensor], int | None]) -> None:
        """Record the inputs of a module, and the blocks that made them."""
        named = {name: value for name, value in options.items() if name not in self.skipped}
        tensors = list(brought_along((arguments, named)))
        self.input_bytes[path] = max(self.input_bytes.get(path, 0), total_bytes(tensors))
        if path not in self.blocks:
            return
        self.current = path
        serials = {serial: tensor for tensor in tensors if (serial := serial_of(tensor)) is not None}
        self.given = frozenset(serials)
        for serial, tensor in serials.items():
            maker = self.origin.get(serial, "")
            if maker != path:
                count, size_bytes = self.crossings.get((path, maker), (0, 0))
                self.crossings[path, maker] = (count + 1, size_bytes + shown_bytes(tensor))

    def leave(self, path: str, output: Any) -> None:
        """Record the outputs of a module."""
        returned = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.output_bytes[path] = max(self.output_bytes.get(path, 0), total_bytes(returned))
        if path == self.current:
            self.current, self.given = "", frozenset()

    def operate(self, inputs: Iterable[int | None], outputs: Iterable[int | None]) -> None:
        """Record the origin of an operation's results, and that its inputs must be on the same device."""
        read = dict.fromkeys(serial for serial in inputs if serial is not None)
        makers = dict.fromkeys(maker for serial in read if (maker := self.origin.get(serial)))
        if self.current:
            for serial in read:
                maker = self.origin.get(serial, "")
                if maker not in ("", self.current) and serial not in self.given:
                    self.bond(self.current, maker)
        else:
            first, *others = [*makers, ""]
            for other in others[:-1]:
                self.bond(other, first)
        home = self.current or next(iter(makers), "")
        for made in outputs:
            if home and made is not None:
                self.origin.setdefault(made, home)

    def bond(self, first: str, second: str) -> None:
        """Record that two blocks must run on one device."""
        self.bonds.setdefault((min(first, second), max(first, second)))


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_arguments: Any, **options: Any
) -> torch.Tensor | None:
    """Return the output of attention as a fused kernel allocates it: with one extra number for each row, and no matrix
    of scores.

    torch itself would fall back to the matrix for shapes without a kernel on the CPU, such as heads whose keys and
    values differ in size, as in latent attention. Return `None` if no fused kernel supports the shape.
    """
    if query.shape[:-2] != key.shape[:-2] and not options.get("enable_gqa"):
        return None  # fused kernels do not broadcast heads, so the scores are computed
    *outer, heads, length, _width = query.shape
    output = query.new_empty((*outer, length, heads, value.shape[-1])).transpose(-2, -3)  # in the layout of kernels
    query.new_empty(query.shape[:-1], dtype=torch.float32)  # the rows' normalisers, freed at once
    return output


def replace_tensors(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Replace the model's meta tensors with fake ones, keep ties, and return the fake ones."""
    replaced: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            replaced[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return replaced[id(tensor)]

    for module in model.modules():
        parameters, buffers = own_parameters(module), own_buffers(module)
        for name, parameter in parameters.items():
            if parameter is not None:
                # Without gradients, as after loading: torch computes products of trainable tensors in another way.
                parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = fake(buffer)
    return tuple(replaced.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of an operation."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def brought_along(inputs: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that accelerate copies to a module's device, including those in mappings with a `to` method."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, Mapping) and hasattr(leaf, "to"):
            yield from brought_along(dict(leaf))


def storage_key(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage."""
    return storage_identity(shown_storage(tensor))


def _grouped_product(arguments: Any) -> torch.Tensor | None:
    """Return the product of rows with their experts' weights, whose shape torch computes without data only for
    bfloat16.
    """
    rows, weights = arguments[:2]
    if rows.dim() != 2 or weights.dim() != 3:
        return None
    return rows.new_empty((rows.shape[0], weights.shape[-1]))


def _operations(function: Any, arguments: Any, options: Any, result: Any) -> int:
    """Return the floating-point operations of an operation of torch, by its name and shapes."""
    packet = operation_packet(function)
    if packet in (registry := flop_registry()):
        return int(registry[packet](*arguments, **options, out_val=result))
    if is_grouped_product(function):
        rows, inner = arguments[0].shape[-2:]
        return int(2 * rows * inner * arguments[1].shape[-1])
    return 0


def _attention_operations(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Return the floating-point operations of attention.

    Keys and values may have fewer heads, each shared by several heads of the queries.
    """
    products = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(2 * products * (query.shape[-1] + value.shape[-1]))


WITHOUT_KERNEL = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
)
"""Operations that make a tensor without any computation."""


def _touched_bytes(function: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Return the bytes that an operation reads and writes."""
    name = operation_name(function)
    written = sum(shown_bytes(tensor) for tensor in outputs)
    if name in ("aten::embedding", "aten::index", "aten::gather", "aten::index_select"):
        return 2 * written  # only the selected rows are read
    if is_grouped_product(function):
        rows, experts = inputs[0].shape[-2], inputs[1].shape[0]
        touched_experts_bytes = shown_bytes(inputs[1]) * min(rows, experts) // experts
        return int(shown_bytes(inputs[0]) + touched_experts_bytes + written)
    return written + sum(map(shown_bytes, inputs))


def shown_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the elements of a tensor, without the rest of its storage."""
    size_bytes: int = tensor.numel() * tensor.element_size()
    return size_bytes


def total_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the elements of all these tensors."""
    return sum(shown_bytes(tensor) for tensor in tensors)
