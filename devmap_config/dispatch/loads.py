"""Groups weights into loads, which are copied to an accelerator at once: the weights of pieces that run one after
another.

A load is copied as one, however many tensors it has. In the CPU's memory it has the same layout as on the accelerator;
on disk it stays in its files. No load is larger than the largest piece (see `execution/pieces.py`), and the plan has
room for two of those.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from devmap_config.devices import DISK
from devmap_config.dispatch.weights_on_disk import Piece, TensorInFile, mapped_files, place_of
from devmap_config.libraries.accelerate import (
    hooks_of,
    names_copied_in,
    place_on_disk,
    replace_streamed,
    streamed_from,
)
from devmap_config.libraries.torch import own_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from accelerate.hooks import AlignDevicesHook
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    Places = Mapping[torch.nn.Module, Mapping[str, "TensorPlace"]]
    """The places of modules' weights in a load."""

ALIGNMENT_BYTES = 256
"""The alignment of tensors: kernels read wide words, and torch's own allocator aligns no less."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """The place of a tensor in a load, with its shape and dtype."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor within the memory of a load."""
        return self.bytes_within(memory).view(self.dtype).view(self.shape)

    def bytes_within(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the bytes of the tensor within the memory of a load."""
        return memory[self.start : self.end]


@dataclass(frozen=True, eq=False)
class Load:
    """The weights of modules that run one after another, from one store.

    Weights in the CPU's memory are in `memory`, which is pinned, with the layout of a slot. Weights on disk are read as
    a `piece`, each to its place in `targets`.
    """

    places: Places
    size_bytes: int
    memory: torch.Tensor | None = None
    piece: Piece | None = None
    targets: Mapping[TensorInFile, TensorPlace] = field(default_factory=dict)

    def copies(
        self, target: torch.Tensor, staging: NDArray[np.uint8] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of source and target for copying the load to a slot; weights on disk are read into the staging
        memory.

        Raises:
            OSError: if it cannot be read.
        """
        if self.memory is not None:
            return [(self.memory, target[: self.size_bytes])]
        if self.piece is None or staging is None:
            return []
        read = self.piece.read(staging[: self.piece.size_bytes])
        return [(data, self.targets[place].bytes_within(target)) for place, data in read.items()]


class WeightSource(NamedTuple):
    """The source of a weight: a place in a file, or an address in the CPU's memory; with its shape and dtype."""

    place: TensorInFile | int
    dtype: torch.dtype
    shape: torch.Size
    size_bytes: int


@dataclass(frozen=True, eq=False)
class StreamedPiece:
    """Modules whose weights are needed at once, from one store, with accelerate's hooks, and the device that runs
    them.
    """

    is_on_disk: bool
    device: torch.device
    hooks: Mapping[torch.nn.Module, AlignDevicesHook]
    sources: Mapping[torch.nn.Module, Mapping[str, WeightSource]]


def streamed_pieces(
    model: PreTrainedModel, pieces: Iterable[Sequence[str]], folder: Path | None
) -> list[StreamedPiece]:
    """Return the streamed part of each piece, according to accelerate's hooks."""
    streamed: list[StreamedPiece] = []
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
            streamed.append(StreamedPiece(is_on_disk, device, of_modules, sources))
    return streamed


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
    """Move weights to loads, none of which is larger than the largest piece; weights on disk stay there.

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


def load_of(module: torch.nn.Module) -> Load:
    """Move the weights of a module that computes on the CPU to a load; the module then uses them there."""
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
    """Yield consecutive pieces from one store, as many at a time as take no more than the largest of all."""
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
    """Lay out the weights of modules one after the other, shared ones only once, and return their places and total
    size.

    Also return the places of weights that are on disk.
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
    """Return memory of exactly this size, as torch would round pinned memory up to a power of two."""
    memory = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # huge pages are faster to touch and to pin
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
