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
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from devmap_config.graph.costs import Crossing, Measurement, ModuleCost, Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from devmap_config.graph.model import ModelGraph

CACHE_NAMES = ("past_key_values", "cache_params")
"""Under which models return their cache, and take it."""


class UnmeasurableModelError(Exception):
    """The model's code cannot be run without data; the text says why."""


def measure(model: PreTrainedModel, graph: ModelGraph, workload: Workload) -> Measurement:
    """The costs of a model that was built on the meta device. The model is of no use afterwards: its tensors are fake.

    Args:
        model: the model.
        graph: its graph, of whose blocks is noted what passes between them.
        workload: what is run.

    Raises:
        UnmeasurableModelError: where its code asks for data, or for other inputs than tokens.
    """
    model.eval()
    try:
        with (
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
            _paths(model) as names,
        ):
            weights = _replace_tensors(model)
            traffic = partial(_Traffic, dict.fromkeys(graph.blocks), frozenset(graph.skip_keys))
            return _Runner(model, workload, names, weights, traffic).measurement()
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

    def __init__(self, names: dict[int, str], known: frozenset[int], traffic: _Traffic) -> None:
        super().__init__()
        self.names = names
        self.traffic = traffic
        self.running: tuple[str, ...] = ()
        self.events: list[_Event] = []
        self.maker: dict[int, str] = {}
        self.operations: dict[str, int] = {}
        self.touched_bytes: dict[str, int] = {}
        self.launches: dict[str, int] = {}
        self.order: dict[str, None] = {}
        self.kept: frozenset[int] = frozenset()
        self._known = set(known)
        self._alive: dict[int, int] = {}
        self._serial = len(known)

    def enter(self, module: torch.nn.Module, arguments: Any, options: Any) -> None:
        path = self.names[id(module)]
        self.running = (*self.running, path)
        self.order.setdefault(path)
        self.traffic.enter(path, arguments, options, self.serial_of)

    def leave(self, module: torch.nn.Module, _arguments: Any, _options: Any, output: Any) -> None:
        self.running = self.running[:-1]
        self.traffic.leave(self.names[id(module)], output)

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Watch what runs. Cycles of references are left alone meanwhile: when they go depends on what went before."""
        with ExitStack() as stack:
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                leaving = module.register_forward_hook(self.leave, with_kwargs=True, always_call=True)
                stack.callback(leaving.remove)
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
        self.traffic.operate(map(self.serial_of, inputs), map(self.serial_of, outputs))
        self.count(_operations(function, arguments, options, result), _touched_bytes(function, inputs, outputs))
        return result

    def add(self, operations: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        """Count what a kernel does that is not run."""
        self.traffic.operate(map(self.serial_of, inputs), map(self.serial_of, outputs))
        self.count(operations, sum(map(_shown_bytes, (*inputs, *outputs))))

    def count(self, operations: int, touched_bytes: int) -> None:
        """Add to what the innermost running module does itself."""
        module = self.running[-1] if self.running else ""
        self.operations[module] = self.operations.get(module, 0) + operations
        self.touched_bytes[module] = self.touched_bytes.get(module, 0) + touched_bytes
        self.launches[module] = self.launches.get(module, 0) + 1

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


@dataclass
class _Traffic:
    """What passes between blocks: what each is given, by whom it was made, and what it reads without being given it."""

    blocks: Mapping[str, None]
    skipped: frozenset[str]
    input_bytes: dict[str, int] = field(default_factory=dict)
    output_bytes: dict[str, int] = field(default_factory=dict)
    crossings: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """By reader and maker: how many tensors, and their bytes."""
    bonds: dict[tuple[str, str], None] = field(default_factory=dict)
    origin: dict[int, str] = field(default_factory=dict)
    """The block that made a storage, or, outside of blocks, what it was computed from."""
    current: str = ""
    given: frozenset[int] = frozenset()

    def enter(self, path: str, arguments: Any, options: Any, serial_of: Callable[[torch.Tensor], int | None]) -> None:
        named = {name: value for name, value in options.items() if name not in self.skipped}
        tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
        self.input_bytes[path] = max(self.input_bytes.get(path, 0), _total(tensors))
        if path not in self.blocks:
            return
        self.current = path
        serials = {serial: tensor for tensor in tensors if (serial := serial_of(tensor)) is not None}
        self.given = frozenset(serials)
        for serial, tensor in serials.items():
            maker = self.origin.get(serial, "")
            if maker != path:
                count, size_bytes = self.crossings.get((path, maker), (0, 0))
                self.crossings[path, maker] = (count + 1, size_bytes + _shown_bytes(tensor))

    def leave(self, path: str, output: Any) -> None:
        returned = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.output_bytes[path] = max(self.output_bytes.get(path, 0), _total(returned))
        if path == self.current:
            self.current, self.given = "", frozenset()

    def operate(self, inputs: Iterable[int | None], outputs: Iterable[int | None]) -> None:
        """Note where the results of an operation are, and that what it reads must be there."""
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
        self.bonds.setdefault((min(first, second), max(first, second)))


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
    traffic: Callable[[], _Traffic]
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
                prefilled = recorder.traffic
            if length == workload.context_length:
                self.add_cache(recorder, _cache_tensors(cache))
        decoded = self.traffic()
        shown_before = _total(_cache_tensors(cache))
        if shown_before:
            recorder, grown = self.decode(cache)
            order |= recorder.order
            self.add_peaks(recorder, "decode")
            self.add_work(recorder, "decode")
            self.add_growth(recorder, _cache_tensors(grown), shown_before)
            decoded = recorder.traffic
        self.add_doubled()
        pairs = dict.fromkeys([*prefilled.crossings, *decoded.crossings])
        crossings = tuple(_crossing(pair, prefilled.crossings, decoded.crossings) for pair in pairs)
        bonds = tuple(dict.fromkeys([*prefilled.bonds, *decoded.bonds]))
        position = {path: place for place, path in enumerate(order)}
        modules = sorted(self.costs, key=lambda path: position.get(path, -1))
        costs = tuple(ModuleCost(path=path, **self.costs[path]) for path in modules)
        return Measurement(workload, costs, crossings, bonds)

    @property
    def has_encoder(self) -> bool:
        """Whether the model takes a decoder's tokens besides; the bare decoder of such a model does not."""
        return "decoder_input_ids" in inspect.signature(self.model.forward).parameters

    def prefill(self, length: int) -> tuple[_Recorder, Any]:
        tokens = torch.ones((self.workload.batch_size, length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self.has_encoder:
            inputs["decoder_input_ids"] = tokens
            if self.model.main_input_name == "input_features":
                del inputs["input_ids"]
                inputs["input_features"] = self.features()
        return self.run(inputs, None)

    def features(self) -> torch.Tensor:
        """What Whisper's encoder hears: windows of one length, of which its first convolutions keep every second."""
        config = self.model.config
        shape = (self.workload.batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        return torch.ones(shape, dtype=self.model.dtype)

    def decode(self, cache: Any) -> tuple[_Recorder, Any]:
        token = torch.ones((self.workload.batch_size, 1), dtype=torch.long)
        if not self.has_encoder:
            return self.run({"input_ids": token}, cache)
        return self.run({"decoder_input_ids": token, "encoder_outputs": self.encoded}, cache)

    def run(self, inputs: dict[str, Any], cache: Any) -> tuple[_Recorder, Any]:
        accepted = inspect.signature(self.model.forward).parameters
        if cache is not None:
            inputs[next(name for name in CACHE_NAMES if name in accepted)] = cache
        elif self.workload.cache == "static":
            from transformers import StaticCache

            # Room for the context and a token, and for more where more is prefilled.
            length = (
                max(self.workload.context_length, inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]) + 1
            )
            inputs["past_key_values"] = StaticCache(
                config=self.model.config.get_text_config(decoder=True), max_cache_len=length
            )
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 0 if self.workload.all_logits else 1
        if "use_cache" in accepted and self.model.can_generate():
            inputs["use_cache"] = True
        from transformers.modeling_outputs import BaseModelOutput

        recorder = _Recorder(self.names, self.weights, self.traffic())
        for tensor in _cache_tensors(cache):
            recorder.watch_for_release(tensor)
        with recorder.watching(self.model):
            output = self.model(**inputs)
        if (encoded := getattr(output, "encoder_last_hidden_state", None)) is not None:
            self.encoded = BaseModelOutput(last_hidden_state=encoded)
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

    def add_doubled(self) -> None:
        """Peaks and cache of a prefill that is twice as long, in which blocks that cost the same are run once."""
        classes = self.classes()
        doubled = self.doubled(classes) or self.doubled([])
        representatives = {path: first for first, *others in classes for path in others} if doubled else {}
        for path, cost in self.costs.items():
            block = next((each for each in (path, *_ancestors(path)) if each in representatives), None)
            like = path if block is None else representatives[block] + path[len(block) :]
            seen = doubled.get(like, {})
            for phase, figure in (("prefill", "doubled_peak_bytes"), ("own", "doubled_own_peak_bytes")):
                # What was not seen may grow as the matrix of scores does.
                once = cost.get(f"{phase}_peak_bytes", 0)
                cost[figure] = max(seen.get(f"{phase}_peak_bytes", 4 * once), once)
            once = cost.get("cache_bytes", 0)
            grown = cost.get("cache_bytes_per_token", 0) * self.workload.context_length
            prefilled_whole = self.workload.prompt_length == self.workload.context_length
            cost["doubled_cache_bytes"] = max(seen.get("cache_bytes", 0) if prefilled_whole else once + grown, once)

    def doubled(self, classes: list[list[str]]) -> dict[str, dict[str, int]]:
        """What a prefill twice as long costs; nothing where it cannot be run."""
        costs, self.costs = self.costs, {}
        try:
            with _run_once(self.model, classes):
                recorder, cache = self.prefill(2 * self.workload.prompt_length)
            self.add_peaks(recorder, "prefill")
            self.add_cache(recorder, _cache_tensors(cache))
        except Exception:  # positions that end before, or a block that needs the cache of one that was left out
            self.costs = {}
        doubled, self.costs = self.costs, costs
        return doubled

    def classes(self) -> list[list[str]]:
        """The blocks by what they and all within cost, each class in order."""
        alike: dict[tuple[object, ...], list[str]] = {}
        within: dict[str, list[object]] = {block: [] for block in self.traffic().blocks}
        for path in sorted(self.costs):
            block = next((each for each in (path, *_ancestors(path)) if each in within), None)
            if block is not None:
                # A decode's peak grows from block to block, with the cache that is made anew.
                own = sorted(item for item in self.costs[path].items() if item[0] != "decode_peak_bytes")
                within[block].append((path[len(block) :], tuple(own)))
        for block, figures in within.items():
            parent = block.rpartition(".")[0]
            alike.setdefault((parent, *figures), []).append(block)
        return list(alike.values())

    def add_work(self, recorder: _Recorder, phase: str) -> None:
        for module, count in recorder.operations.items():
            self.cost(module)[f"{phase}_operations"] = count
        for module, count in recorder.touched_bytes.items():
            self.cost(module)[f"{phase}_touched_bytes"] = count
        for module, count in recorder.launches.items():
            self.cost(module)[f"{phase}_launches"] = count
        for module, size_bytes in recorder.traffic.input_bytes.items():
            self.cost(module)[f"{phase}_input_bytes"] = size_bytes
        for module, size_bytes in recorder.traffic.output_bytes.items():
            self.cost(module)[f"{phase}_output_bytes"] = size_bytes

    def add_growth(self, recorder: _Recorder, tensors: list[torch.Tensor], shown_before: int) -> None:
        """What a token adds to the cache, by the module that made it; else by each module's share of the cache."""
        growth = _total(tensors) - shown_before
        shown: dict[str, int] = {}
        for tensor in tensors:
            if (serial := recorder.serial_of(tensor)) is not None:
                module = recorder.maker[serial]
                shown[module] = shown.get(module, 0) + _shown_bytes(tensor)
        added = {module: size_bytes - self.cost(module).get("cache_bytes", 0) for module, size_bytes in shown.items()}
        if sum(added.values()) != growth or any(size_bytes < 0 for size_bytes in added.values()):
            shares = {path: cost["cache_bytes"] for path, cost in self.costs.items() if cost.get("cache_bytes")}
            added = {path: growth * share // sum(shares.values()) for path, share in shares.items()}
        for module, size_bytes in added.items():
            self.cost(module)["cache_bytes_per_token"] = size_bytes

    def cost(self, module: str) -> dict[str, int]:
        return self.costs.setdefault(module, {})


def _crossing(
    pair: tuple[str, str],
    prefilled: Mapping[tuple[str, str], tuple[int, int]],
    decoded: Mapping[tuple[str, str], tuple[int, int]],
) -> Crossing:
    prefill_tensors, prefill_bytes = prefilled.get(pair, (0, 0))
    decode_tensors, decode_bytes = decoded.get(pair, (0, 0))
    return Crossing(
        reader=pair[0],
        maker=pair[1],
        prefill_tensors=prefill_tensors,
        prefill_bytes=prefill_bytes,
        decode_tensors=decode_tensors,
        decode_bytes=decode_bytes,
    )


@contextmanager
def _run_once(model: Any, classes: Iterable[Sequence[str]]) -> Iterator[None]:
    """Let only the first block of each class run; the others give back what it gave, made anew, and cache nothing."""
    with ExitStack() as stack:
        for first, *others in classes:
            if not others:
                continue
            given: list[Any] = []

            def keep(_module: Any, _arguments: Any, output: Any, given: list[Any] = given) -> None:
                given[:] = [tree_map(_shape, output)]

            def give(*_arguments: Any, given: list[Any] = given, **_options: Any) -> Any:
                return tree_map(_of_shape, given[0])

            stack.callback(model.get_submodule(first).register_forward_hook(keep).remove)
            for path in others:
                block = model.get_submodule(path)
                block.forward = give
                stack.callback(block.__dict__.pop, "forward")
        yield


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _shape(value: Any) -> Any:
    return _Shape(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _of_shape(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, _Shape) else value


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


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
