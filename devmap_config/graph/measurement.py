"""Runs a model's own code on tensors without data, and notes what every module allocates, computes and caches.

The model lives on a fake CPU: shapes and dtypes are real, data there is none. Attention is modelled as accelerators run
it (flash, memory-efficient): without the matrix of scores, whatever the CPU's kernels could do with these heads. For
experts transformers chooses the grouped product.
"""

from __future__ import annotations

import gc
import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from devmap_config.graph.costs import Measurement, ModuleCost, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

CACHE_NAMES = ("past_key_values", "cache_params")
"""Under which models return their cache, and take it."""


class UnmeasurableModelError(Exception):
    """The model's code cannot be run without data; the text says why."""


def measure(model: PreTrainedModel, workload: Workload) -> Measurement:
    """The costs of a model that was built on the meta device. The model is of no use afterwards: its tensors are fake.

    Raises:
        UnmeasurableModelError: where its code asks for data, or for other inputs than tokens.
    """
    model.eval()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _paths(model) as names:
            weights = _replace_tensors(model)
            runner = _Runner(model, workload, names, weights)
            return runner.measurement()
    except Exception as error:  # a model's own code may raise anything where there is no data
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise UnmeasurableModelError(f"{type(error).__name__}: {first_line}"[:300]) from error


def _replace_tensors(model: PreTrainedModel) -> frozenset[int]:
    """Put fake tensors in place of the meta ones, what is tied still tied; gives the storages that they occupy."""
    replaced: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in replaced:
            replaced[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return replaced[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - the public way would copy
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)  # noqa: SLF001
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                module._buffers[name] = fake(buffer)  # noqa: SLF001
    return frozenset(_storage(tensor) for tensor in replaced.values())


@contextmanager
def _paths(model: PreTrainedModel) -> Iterator[dict[int, str]]:
    """The path of every module by its identity."""
    yield {id(module): path for path, module in model.named_modules()}


@dataclass(frozen=True, slots=True)
class _Event:
    """A storage that came to be (positive) or went (negative), while these modules were running."""

    storage: int
    size_bytes: int
    running: tuple[str, ...]


class _Recorder(TorchDispatchMode):  # type: ignore[misc]  # torch is not read by the type checker
    """Notes storages as they come and go, operations and bytes touched, for the modules that are running."""

    def __init__(self, names: dict[int, str], known: frozenset[int]) -> None:
        super().__init__()
        self.names = names
        self.running: tuple[str, ...] = ()
        self.events: list[_Event] = []
        self.maker: dict[int, str] = {}
        self.operations: dict[str, int] = {}
        self.touched_bytes: dict[str, int] = {}
        self.order: dict[str, None] = {}
        self.kept: frozenset[int] = frozenset()
        self._known = set(known)
        self._alive: dict[int, int] = {}
        self._serial = len(known)

    def enter(self, module: torch.nn.Module, _inputs: Any) -> None:
        path = self.names.get(id(module))
        self.running = (*self.running, self.running[-1] if path is None and self.running else path or "")
        self.order.setdefault(self.running[-1])

    def leave(self, _module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        self.running = self.running[:-1]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs. Cycles of references are left alone meanwhile: when they go depends on what went before."""
        with ExitStack() as stack:
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            stack.callback(register_module_forward_pre_hook(self.enter).remove)
            stack.callback(register_module_forward_hook(self.leave, always_call=True).remove)
            stack.enter_context(self)
            stack.enter_context(_AttentionKernel(self))
            yield

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = options or {}
        result = _grouped_product(arguments) if _is_grouped(function) else None
        if result is None:
            result = function(*arguments, **options)
        if function.namespace == "prim" or function.is_view:
            return result
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self.note(tensor)
        self.count(_operations(function, arguments, options, result), _touched_bytes(function, inputs, outputs))
        return result

    def add(self, operations: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Count what a kernel does that is not run."""
        self.count(operations, sum(map(_shown_bytes, (*inputs, *outputs))))

    def count(self, operations: int, touched_bytes: int) -> None:
        """Add to what the innermost running module does itself."""
        module = self.running[-1] if self.running else ""
        self.operations[module] = self.operations.get(module, 0) + operations
        self.touched_bytes[module] = self.touched_bytes.get(module, 0) + touched_bytes

    def note(self, tensor: torch.Tensor) -> None:
        """Note a storage that is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - its identity
        if key in self._known or key in self._alive:
            return
        size_bytes = storage.nbytes()
        self._serial += 1  # an address may be used again
        self._alive[key] = self._serial
        self.maker[self._serial] = self.running[-1] if self.running else ""
        self.events.append(_Event(self._serial, size_bytes, self.running))
        finalize(storage, self.forget, key, self._serial, size_bytes)

    def watch_for_release(self, tensor: torch.Tensor) -> None:
        """Note when a storage goes that was there before: a cache that grows is a new one, then the old one goes."""
        key = _storage(tensor)
        if key not in self._known:
            self._known.add(key)
            finalize(tensor.untyped_storage(), self.release, key, tensor.untyped_storage().nbytes())

    def release(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.events.append(_Event(-1, -size_bytes, self.running))

    def forget(self, key: int, serial: int, size_bytes: int) -> None:
        if self._alive.get(key) == serial:
            del self._alive[key]
            self.events.append(_Event(serial, -size_bytes, self.running))

    def serial_of(self, tensor: torch.Tensor) -> int | None:
        """Under which number a tensor's storage was noted."""
        return self._alive.get(_storage(tensor))


class _AttentionKernel(TorchFunctionMode):  # type: ignore[misc]  # torch is not read by the type checker
    """Attention as a fused kernel runs it: besides the output it makes one number a row, and no matrix of scores.

    Left to itself, torch falls back to the matrix where the CPU has no kernel for the shape: heads whose keys and
    values differ in size, as in latent attention.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = options or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*arguments, **options)
        query, key, value = arguments[:3]
        if query.shape[:-2] != key.shape[:-2] and not options.get("enable_gqa"):
            return function(*arguments, **options)  # fused kernels do not broadcast heads; then the scores are formed
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        query.new_empty(query.shape[:-1], dtype=torch.float32)  # the rows' normalisers, gone at once
        self.recorder.add(int(sdpa_flop_count(query.shape, key.shape, value.shape)), [query, key, value], [output])
        return output


def _storage(tensor: torch.Tensor) -> int:
    identity: int = tensor.untyped_storage()._cdata  # noqa: SLF001
    return identity


def _is_grouped(function: Any) -> bool:
    return str(function) == "aten._grouped_mm.default"


def _grouped_product(arguments: Any) -> torch.Tensor | None:
    """The product of rows with their experts' weights: without data torch knows its shape for bfloat16 only."""
    rows, weights = arguments[:2]
    if rows.dim() != 2 or weights.dim() != 3:
        return None
    return rows.new_empty((rows.shape[0], weights.shape[-1]))


def _operations(function: Any, arguments: Any, options: Any, result: Any) -> int:
    """Floating-point operations of a product or an attention; others are bound by memory and count as none."""
    packet = function._overloadpacket  # noqa: SLF001
    if packet in flop_registry:
        return int(flop_registry[packet](*arguments, **options, out_val=result))
    if _is_grouped(function):
        rows, inner = arguments[0].shape[-2:]
        return int(2 * rows * inner * arguments[1].shape[-1])
    return 0


def _touched_bytes(function: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    name = str(function._overloadpacket)  # noqa: SLF001
    written = sum(_shown_bytes(tensor) for tensor in outputs)
    if name in ("aten.embedding", "aten.index", "aten.gather", "aten.index_select"):
        return 2 * written  # only what is looked up is read
    if _is_grouped(function):
        rows, experts = inputs[0].shape[-2], inputs[1].shape[0]
        touched_experts_bytes = _shown_bytes(inputs[1]) * min(rows, experts) // experts
        return int(_shown_bytes(inputs[0]) + touched_experts_bytes + written)
    return written + sum(map(_shown_bytes, inputs))


def _shown_bytes(tensor: torch.Tensor) -> int:
    size_bytes: int = tensor.numel() * tensor.element_size()
    return size_bytes


@dataclass
class _Runner:
    """Prefill and one decode step of a model whose tensors are fake."""

    model: Any
    workload: Workload
    names: dict[int, str]
    weights: frozenset[int]
    costs: dict[str, dict[str, int]] = field(default_factory=dict)

    def measurement(self) -> Measurement:
        workload = self.workload
        order: dict[str, None] = {}
        for length in dict.fromkeys((workload.prompt_length, workload.context_length)):
            recorder, cache = self.prefill(length)
            order |= recorder.order
            if length == workload.prompt_length:
                self.add_peaks(recorder, "prefill")
                self.add_work(recorder, "prefill")
            if length == workload.context_length:
                self.add_cache(recorder, _cache_tensors(cache))
        shown_before = _total(_cache_tensors(cache))
        if shown_before:
            recorder, grown = self.decode(cache)
            order |= recorder.order
            self.add_peaks(recorder, "decode")
            self.add_work(recorder, "decode")
            self.spread_growth(_total(_cache_tensors(grown)) - shown_before)
        position = {path: place for place, path in enumerate(order)}
        modules = sorted(self.costs, key=lambda path: position.get(path, -1))
        return Measurement(workload, tuple(ModuleCost(path=path, **self.costs[path]) for path in modules))

    @property
    def has_encoder(self) -> bool:
        """Whether the model takes a decoder's tokens besides; the bare decoder of such a model does not."""
        return "decoder_input_ids" in inspect.signature(self.model.forward).parameters

    def prefill(self, length: int) -> tuple[_Recorder, Any]:
        tokens = torch.ones((self.workload.batch_size, length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self.has_encoder:
            inputs["decoder_input_ids"] = tokens
        return self.run(inputs, None)

    def decode(self, cache: Any) -> tuple[_Recorder, Any]:
        token = torch.ones((self.workload.batch_size, 1), dtype=torch.long)
        if not self.has_encoder:
            return self.run({"input_ids": token}, cache)
        return self.run({"decoder_input_ids": token, "encoder_outputs": self.encoded}, cache)

    def run(self, inputs: dict[str, Any], cache: Any) -> tuple[_Recorder, Any]:
        accepted = inspect.signature(self.model.forward).parameters
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 0 if self.workload.all_logits else 1
        if cache is not None:
            inputs[next(name for name in CACHE_NAMES if name in accepted)] = cache
        elif self.workload.cache == "static":
            from transformers import StaticCache

            inputs["past_key_values"] = StaticCache(
                config=self.model.config.get_text_config(decoder=True), max_cache_len=self.workload.context_length + 1
            )
        if "use_cache" in accepted and self.model.can_generate():
            inputs["use_cache"] = True
        recorder = _Recorder(self.names, self.weights)
        for tensor in _cache_tensors(cache):
            recorder.watch_for_release(tensor)
        with recorder.watching():
            output = self.model(**inputs)
        if (encoded := getattr(output, "encoder_last_hidden_state", None)) is not None:
            self.encoded = (encoded,)
        made = next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
        if cache is None:
            serials = (recorder.serial_of(tensor) for tensor in _cache_tensors(made))
            recorder.kept = frozenset(serial for serial in serials if serial is not None)
        return recorder, made

    def add_cache(self, recorder: _Recorder, tensors: list[torch.Tensor]) -> None:
        """What the cache shows, and what its storages keep alive besides, by the module that made them."""
        storages: dict[int, tuple[str, int]] = {}
        shown: dict[str, int] = {}
        for tensor in tensors:
            serial = recorder.serial_of(tensor)
            module = recorder.maker.get(serial or -1, "")
            shown[module] = shown.get(module, 0) + _shown_bytes(tensor)
            storages[serial or -1] = (module, tensor.untyped_storage().nbytes())
        for module, size_bytes in shown.items():
            held = sum(held_bytes for made_by, held_bytes in storages.values() if made_by == module)
            self.cost(module)["cache_bytes"] = size_bytes
            self.cost(module)["retained_bytes"] = max(held - size_bytes, 0)

    def add_peaks(self, recorder: _Recorder, phase: str) -> None:
        """Replay what came and went, without what the cache keeps, and note each module's peak."""
        live = 0
        for event in recorder.events:
            if event.storage in recorder.kept:
                continue
            live += event.size_bytes
            for module in dict.fromkeys(event.running or ("",)):
                self.raise_to(module, f"{phase}_peak_bytes", live)
            self.raise_to(event.running[-1] if event.running else "", "own_peak_bytes", live)

    def raise_to(self, module: str, figure: str, size_bytes: int) -> None:
        cost = self.cost(module)
        cost[figure] = max(cost.get(figure, 0), size_bytes)

    def add_work(self, recorder: _Recorder, phase: str) -> None:
        for module, count in recorder.operations.items():
            self.cost(module)[f"{phase}_operations"] = count
        for module, count in recorder.touched_bytes.items():
            self.cost(module)[f"{phase}_touched_bytes"] = count

    def spread_growth(self, per_token: int) -> None:
        """A token's growth of the cache, over the modules that made it, by their shares."""
        shares = {path: cost["cache_bytes"] for path, cost in self.costs.items() if cost.get("cache_bytes")}
        total = sum(shares.values())
        for path, share in shares.items():
            self.cost(path)["cache_bytes_per_token"] = per_token * share // total

    def cost(self, module: str) -> dict[str, int]:
        return self.costs.setdefault(module, {})


def _cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Every tensor within a cache, whatever its class."""
    found: dict[int, torch.Tensor] = {}
    waiting, seen = [cache], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found.setdefault(id(each), each)
        elif id(each) not in seen:
            seen.add(id(each))
            if isinstance(each, dict):
                waiting += each.values()
            elif isinstance(each, (list, tuple)):
                waiting += each
            elif type(each).__module__.startswith("transformers") and "config" not in type(each).__module__:
                waiting += vars(each).values()
    return list(found.values())


def _total(tensors: list[torch.Tensor]) -> int:
    return sum(_shown_bytes(tensor) for tensor in tensors)
