"""Runs on an accelerator what is stored in the CPU's memory: what is to run next is copied there ahead of its use.

accelerate copies one tensor after another, from memory that the system may move, each time that its module runs, and
computes meanwhile nothing. Here the weights of pieces that run one after another lie together in memory that is pinned,
as a load. The accelerator has two slots for loads: while modules compute with what is in one of them, the next load is
copied to the other, in a stream of its own. So a forward takes the longer of copying and computing, and no more than
two of the largest pieces are there at once, which the plan has room for (`placement/pieces.py` says what a piece is).
"""

from __future__ import annotations

import mmap
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.hooks import AlignDevicesHook

from devmap_config.amounts import format_bytes
from devmap_config.devices import CPU
from devmap_config.libraries.accelerate import (
    found_device,
    hooks_of,
    names_copied_in,
    replace_hook,
    replace_streamed,
    sent,
    streamed_from,
)
from devmap_config.libraries.torch import own_buffers, own_parameters, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    Hooks = Mapping[torch.nn.Module, AlignDevicesHook]
    """accelerate's hooks of the modules of a piece: of what is to be there at once."""

ALIGNMENT_BYTES = 256
"""Where a tensor may begin: kernels read wide words, and torch's own allocator gives them no less."""


class UnpinnedError(Exception):
    """Memory cannot be pinned, and copying from it would be slower than was planned."""


class Stream(Protocol):
    """Of torch's streams, what is used here: work is done in order, and after another's where that is said."""

    def wait_stream(self, stream: Any) -> None:
        """Do what is given from here on after all that the other was given until now."""

    def wait_event(self, event: Any) -> None:
        """Do what is given from here on after the event."""

    def record_event(self) -> Any:
        """Return the event that all that was given until now is done."""


class Streams(Protocol):
    """The two streams of an accelerator: one copies, the other computes."""

    copying: Stream

    @property
    def computing(self) -> Stream:
        """The stream that modules are run in."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy in the copying stream, and return at once."""


class CudaStreams:
    """Those of a CUDA (or ROCm) card."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copying = torch.cuda.Stream(device)

    @property
    def computing(self) -> torch.cuda.Stream:
        """The stream that modules are run in."""
        return torch.cuda.current_stream(self.device)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy in the copying stream, and return at once."""
        with torch.cuda.stream(self.copying):
            target.copy_(source, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a load a tensor lies, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """Return it, in the memory that has the load."""
        return memory[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Load:
    """The weights of modules that run one after another, as they lie in pinned memory."""

    memory: torch.Tensor
    places: Mapping[torch.nn.Module, Mapping[str, Place]]


@dataclass(eq=False)
class Slot:
    """Memory of an accelerator that takes one load after another.

    `copied` is the event that the load is there, `running` the modules that compute with it now.
    """

    memory: torch.Tensor
    load: Load | None = None
    copied: Any = None
    running: set[torch.nn.Module] = field(default_factory=set)


class Streamer:
    """Brings loads to the slots of an accelerator, each ahead of its use.

    Which load follows on a module's is learnt as the model runs; at first it is the next of `loads`, and after the last
    the first. Nothing here waits for the accelerator: it is told what is to wait for what.
    """

    def __init__(self, loads: Sequence[Load], streams: Streams, slots: tuple[Slot, Slot]) -> None:
        followed = zip(loads, (*loads[1:], *loads[:1]), strict=True)
        self._next = {module: following for load, following in followed for module in load.places}
        self._last: tuple[torch.nn.Module, Load] | None = None
        self._streams = streams
        self._slots = slots
        self.lock = threading.RLock()

    def begin(self, module: torch.nn.Module, load: Load) -> dict[str, torch.Tensor]:
        """Return the weights of a module that begins, where what is computed from here on finds them.

        Where modules of both slots run, around this one, its weights are copied beside them.
        """
        slot = self._slot_of(load)
        if slot is None:
            slot = next((each for each in self._slots if not each.running), None)
            if slot is None:
                memory = torch.empty_like(load.memory, device=self._slots[0].memory.device)
                memory.copy_(load.memory)
                return {name: place.within(memory) for name, place in load.places[module].items()}
            self._fetch(load, slot)
        slot.running.add(module)
        self._streams.computing.wait_event(slot.copied)
        if self._last is None or load is not self._last[1]:
            self._go_on_to(module, load)
        return {name: place.within(slot.memory) for name, place in load.places[module].items()}

    def end(self, module: torch.nn.Module) -> None:
        """Say that a module has run, or failed."""
        for slot in self._slots:
            slot.running.discard(module)

    def _go_on_to(self, module: torch.nn.Module, load: Load) -> None:
        """Have what follows on this load copied to the other slot, if nothing there runs."""
        if self._last is not None:
            self._next[self._last[0]] = load
        self._last = module, load
        following = self._next[module]
        other = next(each for each in self._slots if each.load is not load)
        if self._slot_of(following) is None and not other.running:
            self._fetch(following, other)

    def _slot_of(self, load: Load) -> Slot | None:
        return next((slot for slot in self._slots if slot.load is load), None)

    def _fetch(self, load: Load, slot: Slot) -> None:
        slot.load = None  # until it is known that it has the next
        # What was computed until now may read what is in the slot; what is computed from now on does not.
        self._streams.copying.wait_stream(self._streams.computing)
        self._streams.copy(load.memory, slot.memory[: load.memory.numel()])
        slot.load, slot.copied = load, self._streams.copying.record_event()


class StreamingHook(AlignDevicesHook):  # type: ignore[misc]
    """Stands in for accelerate's hook of a module that is streamed: its weights are there while it runs, and only then.

    Where its weights are asked for otherwise, as they are when the model is saved, it does what accelerate's does.
    """

    def __init__(self, replaced: AlignDevicesHook, streamer: Streamer, load: Load) -> None:
        self.__dict__.update(replaced.__dict__)
        self._streamer = streamer
        self._load = load
        self._device = replaced.execution_device
        self._weights = replaced.weights_map
        self._running_in: int | None = None
        self._absent: dict[str, torch.Tensor] = {}

    def around(self, module: torch.nn.Module) -> Callable[..., Any]:
        """Return its forward, during which other threads wait; its weights are away after it, whatever ends it."""
        forward = module.forward

        @wraps(forward)
        def run(*arguments: Any, **options: Any) -> Any:
            with self._streamer.lock:
                try:
                    self._running_in = threading.get_ident()
                    return forward(*arguments, **options)
                finally:
                    self._streamer.end(module)
                    _set(module, self._absent)
                    self._absent, self._running_in = {}, None

        return run

    def pre_forward(self, module: torch.nn.Module, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Called by accelerate before the module runs, and by PEFT where its weights are to be changed."""
        if not self._is_ahead:
            given: tuple[Any, Any] = super().pre_forward(module, *arguments, **options)
            return given
        if self.io_same_device:
            self.input_device = found_device([arguments, options])
        self._absent = {name: getattr(module, name) for name in self._load.places[module]}
        _require_unchanged(module, self._absent, self._load.places[module])
        _set(module, self._streamer.begin(module, self._load))
        skipped = self.skip_keys
        return sent(arguments, self._device), sent(options, self._device, skipped)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Called by accelerate after the module has run."""
        if not self._is_ahead:
            return super().post_forward(module, output)
        returns = self.io_same_device and self.input_device is not None
        return sent(output, self.input_device, self.skip_keys) if returns else output

    @property
    def _is_ahead(self) -> bool:
        """Whether the module runs where it was planned to, with the weights that are in its load."""
        is_running = self._running_in == threading.get_ident()
        return is_running and self.execution_device == self._device and self.weights_map is self._weights


def stream_weights(model: PreTrainedModel, pieces: Iterable[Sequence[str]]) -> None:
    """Copy ahead, to a CUDA card, the weights that accelerate would copy from the CPU's memory as they are needed.

    They are moved to pinned memory, load by load: so only one of these is there twice meanwhile.

    Args:
        model: the model, loaded by a map in which modules are on the CPU.
        pieces: the paths of modules whose weights are to be there at once, in the order in which they run.

    Raises:
        UnpinnedError: where memory cannot be pinned.
    """
    streamed = streamed_modules(model, pieces)
    if not streamed:
        return
    device = torch.device(next(iter(streamed[0].values())).execution_device)
    loads = loads_of(streamed)
    pinned: list[torch.Tensor] = []
    weakref.finalize(model, _unpin, pinned).atexit = False
    for load in loads:
        if not _pin(load.memory, device):
            raise UnpinnedError(f"{format_bytes(sum(each.memory.nbytes for each in loads))} of memory cannot be pinned")
        pinned.append(load.memory)
    slot_bytes = max(load.memory.nbytes for load in loads)
    first, second = (Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(2))
    attach(streamed, loads, Streamer(loads, CudaStreams(device), (first, second)))


def attach(streamed: Iterable[Hooks], loads: Iterable[Load], streamer: Streamer) -> None:
    """Have modules run with what a streamer brings, in place of what accelerate's hooks would copy."""
    replaced = {module: hook for hooks in streamed for module, hook in hooks.items()}
    for load in loads:
        for module in load.places:
            hook = StreamingHook(replaced[module], streamer, load)
            replace_hook(module, replaced[module], hook)
            module.forward = hook.around(module)  # torch's own hooks are not called at a Ctrl-C


def streamed_modules(model: PreTrainedModel, pieces: Iterable[Sequence[str]]) -> list[Hooks]:
    """Return accelerate's hooks of the modules of each piece, of what is copied in from the CPU."""
    found = []
    for paths in pieces:
        hooks = {}
        for path in paths:
            module = model.get_submodule(path)
            for hook in hooks_of(module):
                names = names_copied_in(module, hook)
                if {streamed_from(hook, path, f"{path}.{name}") for name in names} == {CPU}:
                    hooks[module] = hook
        found.append(hooks)
    return list(filter(None, found))


def loads_of(streamed: Iterable[Hooks]) -> list[Load]:
    """Move weights to loads, none of which is larger than the largest piece."""
    loads = []
    for pieces in _together(streamed):
        places, size_bytes = _placed(pieces)
        load = Load(_paged(size_bytes), places)
        for hooks in pieces:
            for module, hook in hooks.items():
                for name, place in places[module].items():
                    held = place.within(load.memory)
                    held.copy_(hook.weights_map[name])
                    replace_streamed(hook, name, held)
        loads.append(load)
    return loads


def _together(streamed: Iterable[Hooks]) -> Iterator[list[Hooks]]:
    """Yield as many pieces at a time, in their order, as take no more than the largest of them."""
    sizes_bytes = [(piece, _placed([piece])[1]) for piece in streamed]
    most_bytes = max(size_bytes for _, size_bytes in sizes_bytes)
    pieces: list[Hooks] = []
    room_bytes = most_bytes
    for piece, size_bytes in sizes_bytes:
        if size_bytes > room_bytes:
            yield pieces
            pieces, room_bytes = [], most_bytes
        pieces.append(piece)
        room_bytes -= size_bytes
    yield pieces


def _placed(pieces: Iterable[Hooks]) -> tuple[dict[torch.nn.Module, dict[str, Place]], int]:
    """Return where the tensors of modules lie, one behind the other, and what they take; what is shared lies once."""
    places: dict[torch.nn.Module, dict[str, Place]] = {}
    known: dict[tuple[int, torch.Size], Place] = {}
    start = 0
    for module, hook in ((module, hook) for hooks in pieces for module, hook in hooks.items()):
        places[module] = {}
        for name in names_copied_in(module, hook):
            tensor = hook.weights_map[name]
            storage = (tensor.data_ptr(), tensor.shape)
            if storage not in known:
                known[storage] = Place(start, start + tensor.nbytes, tensor.dtype, tensor.shape)
                start = -(-known[storage].end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            places[module][name] = known[storage]
    return places, start


def _paged(size_bytes: int) -> torch.Tensor:
    """Return memory of exactly this size: what torch pins itself, it rounds up to a power of two."""
    memory = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # quicker to be touched, and to be pinned
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Have memory stay where it is, so that the card reads it by itself; return whether it does."""
    with torch.cuda.device(device):
        return int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0


def _unpin(memories: Iterable[torch.Tensor]) -> None:
    torch.cuda.synchronize()
    for memory in memories:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _require_unchanged(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], places: Mapping[str, Place]
) -> None:
    """Refuse to run with weights that stand in for others while these are away, and that have been changed."""
    for name, tensor in tensors.items():
        if not tensor.is_meta or tensor.dtype != places[name].dtype or version_of(tensor):
            raise RuntimeError(
                f"`{name}` of a {type(module).__name__} was changed, which is copied to the accelerator as it was"
                " loaded: change the checkpoint, and load that"
            )


def _set(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters, buffers = own_parameters(module), own_buffers(module)
    for name, tensor in tensors.items():
        if name not in parameters:
            buffers[name] = tensor
        elif isinstance(tensor, torch.nn.Parameter):
            parameters[name] = tensor
        else:
            parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
