"""Runs on an accelerator what is stored elsewhere: what is to run next is copied there ahead of its use.

accelerate copies one tensor after another, from memory that the system may move, each time that its module runs, and
computes meanwhile nothing. Here the weights of pieces that run one after another lie together in memory that is pinned,
as a load. The accelerator has two slots for loads: while modules compute with what is in one of them, the next load is
copied to the other, in a stream of its own. So a forward takes the longer of copying and computing, and no more than
two of the largest pieces are there at once, which the plan has room for (`execution/pieces.py` says what a piece is).
What is on disk is read by a thread into pinned memory, of which there are two slots as well, and copied from there.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from accelerate.hooks import AlignDevicesHook

from devmap_config.amounts import format_bytes
from devmap_config.devices import DISK
from devmap_config.dispatch.prefills import prefill_on
from devmap_config.dispatch.weights_on_disk import Piece, TensorInFile, mapped_files, pages, place_of
from devmap_config.libraries.accelerate import (
    found_device,
    hooks_of,
    names_copied_in,
    place_on_disk,
    replace_hook,
    replace_streamed,
    sent,
    streamed_from,
)
from devmap_config.libraries.torch import own_buffers, own_parameters, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Places = Mapping[torch.nn.Module, Mapping[str, "TensorPlace"]]
    """Where the weights of modules lie in a load."""

ALIGNMENT_BYTES = 256
"""Where a tensor may begin: kernels read wide words, and torch's own allocator gives them no less."""


class UnpinnedError(Exception):
    """Memory cannot be pinned, and copying from it would be slower than was planned."""


class StreamEvent(Protocol):
    """That all is done which a stream was given until then."""

    def synchronize(self) -> None:
        """Wait for it."""


class Stream(Protocol):
    """Of torch's streams, what is used here: work is done in order, and after another's where that is said."""

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
class TensorPlace:
    """The place of a tensor in a load, with its shape and dtype."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """Return it, in the memory that has the load."""
        return self.bytes_within(memory).view(self.dtype).view(self.shape)

    def bytes_within(self, memory: torch.Tensor) -> torch.Tensor:
        """Return its bytes there."""
        return memory[self.start : self.end]


@dataclass(frozen=True, eq=False)
class Load:
    """The weights of modules that run one after another, of one store.

    Where they are in the CPU's memory, `memory` has them, pinned, as they lie in a slot. Where they are on disk, they
    are read from there as a `piece`, each to its place of `targets`.
    """

    places: Places
    size_bytes: int
    memory: torch.Tensor | None = None
    piece: Piece | None = None
    targets: Mapping[TensorInFile, TensorPlace] = field(default_factory=dict)

    def copies(
        self, target: torch.Tensor, staging: NDArray[np.uint8] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what is to be copied to where in a slot; what is on disk is read into the staging memory.

        Raises:
            OSError: if it cannot be read.
        """
        if self.memory is not None:
            return [(self.memory, target[: self.size_bytes])]
        if self.piece is None or staging is None:
            return []
        read = self.piece.read(staging[: self.piece.size_bytes])
        return [(data, self.targets[place].bytes_within(target)) for place, data in read.items()]


@dataclass(eq=False)
class Slot:
    """Memory of an accelerator that takes one load after another.

    `copied` returns the event that the load is there, once it was read; `running` are the modules that compute with it
    now.
    """

    memory: torch.Tensor
    load: Load | None = None
    copied: Callable[[], Any] = field(default=lambda: None)
    running: set[torch.nn.Module] = field(default_factory=set)


class ReaderThread:
    """A thread that reads loads from disk, one after another, and has each copied to its slot.

    It has pinned memory for two: into one a load is read while what was read before is copied from the other.
    """

    def __init__(self, streams: Streams, staging: Iterable[NDArray[np.uint8]]) -> None:
        self._streams = streams
        self._staging: deque[tuple[NDArray[np.uint8], StreamEvent | None]] = deque((memory, None) for memory in staging)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="devmap-read-ahead")

    def fetch(self, load: Load, target: torch.Tensor, computed: StreamEvent) -> Callable[[], StreamEvent]:
        """Read a load, and copy it after an event; return at once, with what waits for the event that it is there."""
        return self._thread.submit(self._fetch, load, target, computed).result

    def _fetch(self, load: Load, target: torch.Tensor, computed: StreamEvent) -> StreamEvent:
        memory, copied = self._staging.popleft()
        try:
            if copied is not None:
                copied.synchronize()  # what was read before may still be copied from there
            copied = None
            copies = load.copies(target, memory)
            copied = event = _copy(copies, self._streams, after=computed)
        finally:
            self._staging.append((memory, copied))
        return event


def _copy(copies: Iterable[tuple[torch.Tensor, torch.Tensor]], streams: Streams, after: StreamEvent) -> StreamEvent:
    """Copy after an event, and return the event that it is done."""
    streams.copying.wait_event(after)
    for source, target in copies:
        streams.copy(source, target)
    event: StreamEvent = streams.copying.record_event()
    return event


class Streamer:
    """Brings loads to the slots of an accelerator, each ahead of its use.

    Which load follows on a module's is learnt as the model runs; at first it is the next of `loads`, and after the last
    the first. Nothing here waits for the accelerator: it is told what is to wait for what. What is on disk is waited
    for until it has been read.
    """

    def __init__(self, loads: Sequence[Load], streams: Streams, slots: tuple[Slot, Slot], reader: ReaderThread) -> None:
        followed = zip(loads, (*loads[1:], *loads[:1]), strict=True)
        self._next = {module: following for load, following in followed for module in load.places}
        self._last: tuple[torch.nn.Module, Load] | None = None
        self._streams = streams
        self._slots = slots
        self._reader = reader
        self.lock = threading.RLock()

    def begin(self, module: torch.nn.Module, load: Load) -> dict[str, torch.Tensor]:
        """Return the weights of a module that begins, where what is computed from here on finds them.

        Where modules of both slots run, around this one, its weights are brought to a slot of its own.

        Raises:
            OSError: if they cannot be read.
        """
        slot = self._slot_of(load)
        if slot is None:
            slot = next((each for each in self._slots if not each.running), None)
            slot = slot or Slot(torch.empty_like(self._slots[0].memory))
            self._fetch(load, slot)
        try:
            copied = slot.copied()
        except BaseException:
            slot.load = None
            raise
        slot.running.add(module)
        self._streams.computing.wait_event(copied)
        if self._last is None or load is not self._last[1]:
            self._go_on_to(module, load)
        return {name: place.within(slot.memory) for name, place in load.places[module].items()}

    def end(self, module: torch.nn.Module) -> None:
        """Say that a module has run, or failed."""
        for slot in self._slots:
            slot.running.discard(module)

    def _go_on_to(self, module: torch.nn.Module, load: Load) -> None:
        """Have what follows on this load brought to the other slot, if nothing there runs."""
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
        with suppress(OSError):
            slot.copied()  # what was to be there may still be read
        slot.load = None  # until it is known that it has the next
        # What was computed until now may read what is in the slot; what is computed from now on does not.
        computed = self._streams.computing.record_event()
        if load.memory is None:
            slot.copied = self._reader.fetch(load, slot.memory, computed)
        else:
            event = _copy(load.copies(slot.memory, None), self._streams, after=computed)
            slot.copied = lambda: event
        slot.load = load


class StreamingHook(AlignDevicesHook):  # type: ignore[misc]
    """Stands in for accelerate's hook of a module that is streamed: its weights are there while it runs, and only then.

    Where its weights are asked for otherwise, as they are when the model is saved, it does what accelerate's does.
    """

    def __init__(self, module: torch.nn.Module, replaced: AlignDevicesHook, streamer: Streamer, load: Load) -> None:
        self.__dict__.update(replaced.__dict__)
        self._streamer = streamer
        self._load = load
        self._device = replaced.execution_device
        self._weights = replaced.weights_map
        self._running_in: int | None = None
        self._absent: dict[str, torch.Tensor] = {}
        self._versions = {name: version_of(getattr(module, name)) for name in load.places[module]}

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
        self._require_unchanged(module)
        _set(module, self._streamer.begin(module, self._load))
        skipped = self.skip_keys
        return sent(arguments, self._device), sent(options, self._device, skipped)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        """Called by accelerate after the module has run."""
        if not self._is_ahead:
            return super().post_forward(module, output)
        returns = self.io_same_device and self.input_device is not None
        return sent(output, self.input_device, self.skip_keys) if returns else output

    def _require_unchanged(self, module: torch.nn.Module) -> None:
        """Refuse to run with weights that stand in for others while these are away, and that have been changed."""
        for name, place in self._load.places[module].items():
            tensor = self._absent[name]
            if not tensor.is_meta or tensor.dtype != place.dtype or version_of(tensor) != self._versions[name]:
                raise RuntimeError(
                    f"`{name}` of a {type(module).__name__} was changed, which is copied to the accelerator as it was"
                    " loaded: change the checkpoint, and load that"
                )

    @property
    def _is_ahead(self) -> bool:
        """True if the module runs where it was planned to, with the weights of its load."""
        is_running = self._running_in == threading.get_ident()
        return is_running and self.execution_device == self._device and self.weights_map is self._weights


def stream_weights(
    model: PreTrainedModel,
    pieces: Iterable[Sequence[str]],
    folder: Path | None,
    main_device: torch.device,
    prefilled: Mapping[str, int],
) -> None:
    """Bring ahead, to CUDA cards, the weights that accelerate would bring as they are needed.

    What is in the CPU's memory is moved to pinned memory, load by load: so only one of these is there twice meanwhile.

    Args:
        model: the model, loaded by a map in which modules are on the CPU or the disk.
        pieces: the paths of modules whose weights are to be there at once, in the order in which they run.
        folder: where weights on disk are written anew that their file has in another dtype.
        main_device: where those run that are given in `prefilled`.
        prefilled: the paths of modules that compute on the CPU unless they are given so many tokens, or more.

    Raises:
        UnpinnedError: if memory cannot be pinned.
        FileError: if a file cannot be read.
        OSError: if one cannot be written.
    """
    pinned: list[torch.Tensor] = []
    weakref.finalize(model, _unpin, pinned).atexit = False
    streamed = streamed_pieces(model, pieces, folder)
    apart = [load_of(model.get_submodule(unit)) for unit in prefilled]
    for device in dict.fromkeys([*(piece.device for piece in streamed), *([main_device] if apart else ())]):
        on_device = [piece for piece in streamed if piece.device == device]
        always = loads_of(on_device) if on_device else []
        loads = [*always, *(apart if device == main_device else ())]
        read_bytes = [load.piece.size_bytes for load in loads if load.piece is not None]
        staging = [pages(max(read_bytes)) for _ in range(2) if read_bytes]
        memories = [load.memory for load in loads if load.memory is not None]
        for memory in (*memories, *map(torch.from_numpy, staging)):
            if not _pin(memory, device):
                total = sum(each.nbytes for each in (*memories, *staging))
                raise UnpinnedError(f"{format_bytes(total)} of memory cannot be pinned")
            pinned.append(memory)
        streams, slot_bytes = CudaStreams(device), max(load.size_bytes for load in loads)
        first, second = (Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(2))
        streamer = Streamer(loads, streams, (first, second), ReaderThread(streams, staging))
        attach(on_device, always, streamer)
        if device == main_device:
            prefill_on(model, prefilled, device, Apart(apart, streamer))


def run_on(module: torch.nn.Module, device: torch.device) -> None:
    """Have what accelerate streams of a module, to the main device, run on another; buffers that stay go there."""
    for each in module.modules():
        for hook in hooks_of(each):
            hook.execution_device = device
        buffers = own_buffers(each)
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(device)


def attach(streamed: Iterable[StreamedPiece], loads: Iterable[Load], streamer: Streamer) -> None:
    """Have modules run with what a streamer brings, in place of what accelerate's hooks would copy."""
    replaced = {module: hook for piece in streamed for module, hook in piece.hooks.items()}
    for load in loads:
        for module in load.places:
            hook = StreamingHook(module, replaced[module], streamer, load)
            replace_hook(module, replaced[module], hook)
            module.forward = hook.around(module)  # torch's own hooks are not called at a Ctrl-C


class Apart:
    """The loads of modules that have their weights on the CPU and run on an accelerator for long prompts."""

    def __init__(self, loads: Iterable[Load], streamer: Streamer) -> None:
        self._loads = {module: load for load in loads for module in load.places}
        self._streamer = streamer
        self.lock = streamer.lock

    def begin(self, module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
        """Return the weights of a module that begins; `None` if others were put in the place of its load's."""
        load, own = self._loads[module], own_parameters(module)
        for name, place in load.places[module].items():
            parameter = own[name]
            if parameter is None or load.memory is None:
                return None
            if parameter.data_ptr() != place.within(load.memory).data_ptr():
                return None
        return self._streamer.begin(module, load)

    def end(self, module: torch.nn.Module) -> None:
        """Say that a module has run, or failed."""
        self._streamer.end(module)


def load_of(module: torch.nn.Module) -> Load:
    """Move the weights of a module that computes on the CPU to a load, where it goes on computing with them."""
    own = {name: parameter for name, parameter in own_parameters(module).items() if parameter is not None}
    places, start = {}, 0
    for name, parameter in own.items():
        places[name] = TensorPlace(start, start + parameter.nbytes, parameter.dtype, parameter.shape)
        start = -(-places[name].end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    memory = _paged(start)
    for name, parameter in own.items():
        held = places[name].within(memory)
        held.copy_(parameter.data)
        parameter.data = held
    return Load({module: places}, start, memory=memory)


class WeightSource(NamedTuple):
    """The place of a weight: in a file, or at an address of the CPU's memory; and its shape and dtype."""

    place: TensorInFile | int
    dtype: torch.dtype
    shape: torch.Size
    size_bytes: int


@dataclass(frozen=True, eq=False)
class StreamedPiece:
    """Modules whose weights are to be there at once, of one store, with accelerate's hooks, and where they run."""

    is_on_disk: bool
    device: torch.device
    hooks: Mapping[torch.nn.Module, AlignDevicesHook]
    sources: Mapping[torch.nn.Module, Mapping[str, WeightSource]]


def streamed_pieces(
    model: PreTrainedModel, pieces: Iterable[Sequence[str]], folder: Path | None
) -> list[StreamedPiece]:
    """Return what is brought in of each piece, as the hooks that accelerate attached say."""
    found: list[StreamedPiece] = []
    for paths in pieces:
        hooks: dict[tuple[bool, torch.device], dict[torch.nn.Module, AlignDevicesHook]] = {}
        sources: dict[torch.nn.Module, dict[str, WeightSource]] = {}
        for path in paths:
            module = model.get_submodule(path)
            for hook in hooks_of(module):
                stores = {streamed_from(hook, path, f"{path}.{name}") for name in names_copied_in(module, hook)}
                if len(stores) == 1 and None not in stores:
                    sources[module] = _sources(module, hook, path, folder)
                    where = (stores == {DISK}, torch.device(hook.execution_device))
                    hooks.setdefault(where, {})[module] = hook
        for (is_on_disk, device), of_modules in hooks.items():
            found.append(StreamedPiece(is_on_disk, device, of_modules, sources))
    return found


def _sources(
    module: torch.nn.Module, hook: AlignDevicesHook, path: str, folder: Path | None
) -> dict[str, WeightSource]:
    sources = {}
    for name in names_copied_in(module, hook):
        stated = place_on_disk(hook, path, f"{path}.{name}")
        if stated is None or folder is None:
            weight: torch.Tensor = hook.weights_map[name]
            place: TensorInFile | int = weight.data_ptr()
        else:
            weight = getattr(module, name)
            place = place_of(stated, weight.dtype, folder)
        sources[name] = WeightSource(place, weight.dtype, weight.shape, weight.nbytes)
    return sources


def loads_of(streamed: Sequence[StreamedPiece]) -> list[Load]:
    """Move weights to loads, none of which is larger than the largest piece; those on disk stay there.

    Raises:
        FileError: if a file cannot be read.
    """
    loads = []
    on_disk = [piece for piece in streamed if piece.is_on_disk]
    files = mapped_files([place for piece in on_disk for place in _placed([piece])[1]])
    for pieces in _together(streamed):
        places, targets, size_bytes = _placed(pieces)
        if pieces[0].is_on_disk:
            piece = Piece({place: files[place.file] for place in targets}, is_sparse=False)
            loads.append(Load(places, size_bytes, piece=piece, targets=targets))
        else:
            loads.append(_moved(pieces, places, size_bytes))
    return loads


def _moved(pieces: Iterable[StreamedPiece], places: Places, size_bytes: int) -> Load:
    """Move weights in the CPU's memory to a load."""
    memory = _paged(size_bytes)
    for module, hook in ((module, hook) for piece in pieces for module, hook in piece.hooks.items()):
        for name, place in places[module].items():
            held = place.within(memory)
            held.copy_(hook.weights_map[name])
            replace_streamed(hook, name, held)
    return Load(places, size_bytes, memory=memory)


def _together(streamed: Sequence[StreamedPiece]) -> Iterator[list[StreamedPiece]]:
    """Yield as many pieces at a time, of one store and in their order, as take no more than the largest of all."""
    sizes_bytes = [_placed([piece])[2] for piece in streamed]
    pieces: list[StreamedPiece] = []
    room_bytes = 0
    for piece, size_bytes in zip(streamed, sizes_bytes, strict=True):
        if pieces and (size_bytes > room_bytes or piece.is_on_disk != pieces[0].is_on_disk):
            yield pieces
            pieces = []
        room_bytes = (room_bytes if pieces else max(sizes_bytes)) - size_bytes
        pieces.append(piece)
    yield pieces


def _placed(pieces: Iterable[StreamedPiece]) -> tuple[Places, dict[TensorInFile, TensorPlace], int]:
    """Return where the weights of modules lie, one behind the other, and what they take; what is shared lies once.

    Besides, where those lie that are on disk.
    """
    places: dict[torch.nn.Module, dict[str, TensorPlace]] = {}
    known: dict[tuple[TensorInFile | int, torch.Size], TensorPlace] = {}
    start = 0
    for module, sources in ((module, piece.sources[module]) for piece in pieces for module in piece.hooks):
        places[module] = {}
        for name, source in sources.items():
            key = (source.place, source.shape)
            if key not in known:
                known[key] = TensorPlace(start, start + source.size_bytes, source.dtype, source.shape)
                start = -(-known[key].end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            places[module][name] = known[key]
    on_disk = {place: known[place, shape] for place, shape in known if isinstance(place, TensorInFile)}
    return places, on_disk, start


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


def _set(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters, buffers = own_parameters(module), own_buffers(module)
    for name, tensor in tensors.items():
        if name not in parameters:
            buffers[name] = tensor
        elif isinstance(tensor, torch.nn.Parameter):
            parameters[name] = tensor
        else:
            parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
