"""Runs on the CPU what is on disk: weights are mapped, read ahead of their use, and let go of behind it.

accelerate reads a tensor from its file and copies it, each time that its module runs, and computes meanwhile nothing.
Here a parameter is the file's own pages. A thread reads those of the module that is to run next while this one
computes, and gives the memory back once a module has run, so that no more is held than the plan has room for.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import save

from devmap_config import files
from devmap_config.graph.checkpoint import CheckpointError, read_header
from devmap_config.graph.meta_loading import TORCH_DTYPES
from devmap_config.graph.model import ancestors
from devmap_config.libraries.accelerate import hooks_of, place_on_disk
from devmap_config.libraries.torch import own_parameters
from devmap_config.libraries.transformers import chooses_experts_implementation
from devmap_config.probe.host import seen_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

READ_BYTES = 8 * 2**20
"""How much is read at once: enough for a disk to be at its rate, and little beside a module of a large model."""


@dataclass(frozen=True, slots=True)
class TensorInFile:
    """Where a tensor lies: its name in a safetensors file, and the bytes from `start` to `end` of that file."""

    file: Path
    name: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """What it occupies."""
        return self.end - self.start


class MappedFile:
    """A file as memory. Its pages are read when they are touched, or ahead, and are let go of where it is said."""

    def __init__(self, path: Path, *, is_forgotten: bool = False) -> None:
        """Map a regular file, wherever its links lead; what is let go of is `is_forgotten` by the system as well.


        Raises:
            FileError: where it cannot be read.
        """
        self._is_forgotten = is_forgotten
        with files.opened(path, files.ANYWHERE) as file:
            self._file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        # A private mapping: torch takes memory that may be written to only, and what it writes stays its own.
        self._memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def data(self, place: TensorInFile) -> torch.Tensor:
        """Return the bytes that lie there, without reading them."""
        if not place.size_bytes:
            return torch.empty(0, dtype=torch.uint8)  # torch takes no memory of no bytes
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=place.size_bytes, offset=place.start)

    def read(self, start: int, end: int, scratch: memoryview) -> None:
        """Bring these bytes into memory, through a piece of memory that is used again and again.

        Raises:
            OSError: where they cannot be read, or the file has become shorter.
        """
        self._file.seek(start)
        while start < end:
            count = self._file.readinto(scratch[: end - start])
            if not count:
                raise OSError(f"it ends at {start:,} bytes, before its tensors do")
            start += count

    def let_go(self, start: int, end: int) -> None:
        """Give back the memory of these bytes; the system may keep them, unless it is to forget them."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
        if self._is_forgotten and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class Piece:
    """The weights that a module holds itself and that are on disk.

    `is_sparse` where a token needs but a few rows of them, of an embedding or of experts: these come as they are
    touched, and not as a whole.
    """

    ranges: Mapping[TensorInFile, MappedFile]
    is_sparse: bool

    @cached_property
    def size_bytes(self) -> int:
        """What they occupy."""
        return sum(place.size_bytes for place in self.ranges)


class ReadAhead:
    """A thread that has in memory the pieces of a model that run, and those that are to run next.

    Which piece follows on which is learnt as the model runs; at first it is the next of `pieces`, and after the last
    the first. What is neither running nor expected is let go of.
    """

    def __init__(self, pieces: tuple[Piece, ...], most_bytes: int) -> None:
        """Start the thread, which reads no more than `most_bytes` ahead."""
        self.most_bytes = most_bytes
        self._next = dict(zip(pieces, (*pieces[1:], *pieces[:1]), strict=True))
        self._last: Piece | None = None
        self._running: list[Piece] = []
        self._wanted: list[Piece] = []
        self._present: dict[Piece, None] = {}
        self._failure: BaseException | None = None
        self._is_idle = self._is_closed = False
        self._changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="devmap-read-ahead", daemon=True)
        self.thread.start()

    def begin(self, piece: Piece, *, whole: bool) -> None:
        """Say that a module begins; where it needs the `whole` of its weights, wait until they are in memory.

        Raises:
            OSError: where they cannot be read.
        """
        with self._changed:
            if self._last is not None:
                self._next[self._last] = piece
            self._last = piece
            self._running.append(piece)
            if whole:
                self._wanted.append(piece)
            else:
                self._present[piece] = None  # what of it is touched
            self._changed.notify_all()
            while piece not in self._present and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def end(self, piece: Piece) -> None:
        """Say that a module has run."""
        with self._changed:
            self._running.remove(piece)
            self._changed.notify_all()

    def close(self) -> None:
        """Let the thread end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        scratch = memoryview(bytearray(READ_BYTES))
        try:
            while (work := self._next_work()) is not None:
                piece, goes = work
                for place, file in piece.ranges.items():
                    if goes:
                        file.let_go(place.start, place.end)
                    else:
                        file.read(place.start, place.end, scratch)
                if not goes:
                    with self._changed:
                        self._present[piece] = None
                        self._changed.notify_all()
        except BaseException as error:  # whoever waits is told, and does not wait for ever
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_work(self) -> tuple[Piece, bool] | None:
        """Return the piece to be let go of (`True`) or read next, once there is one; `None` at the end."""
        with self._changed:
            while not self._is_closed:
                self._wanted = [each for each in self._wanted if each not in self._present]
                expected = self._expected()
                for piece in self._present:
                    if piece not in self._running and piece not in expected:
                        del self._present[piece]
                        return piece, True
                for piece in (*self._wanted, *expected):
                    if piece not in self._present:
                        return piece, False
                self._is_idle = True
                self._changed.wait()
                self._is_idle = False
        return None

    def _expected(self) -> list[Piece]:
        """Return the pieces that are to run next, as many as there is room for; rows come as they are touched."""
        expected: list[Piece] = []
        if self._last is None:
            return expected
        piece, room_bytes = self._last, self.most_bytes
        for _ in self._next:
            piece = self._next[piece]
            if piece.is_sparse or piece in expected:
                continue
            room_bytes -= piece.size_bytes
            if room_bytes < 0:
                break
            expected.append(piece)
        return expected


@dataclass(frozen=True)
class MappedWeights:
    """What of a model is mapped: where each tensor lies, and at which address of this process."""

    places: Mapping[str, TensorInFile]
    addresses: Mapping[TensorInFile, int]


_MAPPED: weakref.WeakKeyDictionary[torch.nn.Module, MappedWeights] = weakref.WeakKeyDictionary()


def mapped_place(model: torch.nn.Module, name: str) -> TensorInFile | None:
    """Return where the tensor of a model that is mapped lies; `None` for one that is not, or not any more."""
    mapped = _MAPPED.get(model)
    place = None if mapped is None else mapped.places.get(name)
    if mapped is None or place is None:
        return None
    held = own_parameters(model.get_submodule(name.rpartition(".")[0])).get(name.rpartition(".")[2])
    return place if held is not None and held.data_ptr() == mapped.addresses[place] else None


def map_weights(model: PreTrainedModel, names: Iterable[str], folder: Path) -> None:
    """Map the weights of a model that accelerate would copy from disk; nothing of accelerate's remains on it.

    What is in memory is copied there from the checkpoint's pages, which the system would else let go of and read again.
    The system keeps what was read from disk as long as there is memory that nobody uses; where there is less of that
    than is on disk, it would let go of the wrong pages, and forgets each once its module has run.

    Args:
        model: the model, loaded by a map of `cpu` and `disk`.
        names: the tensors that are on disk.
        folder: where weights are written anew that their file has in another dtype.

    Raises:
        FileError: where a file cannot be read.
        OSError: where one cannot be written.
    """
    absent = {name for name, each in model.named_parameters(remove_duplicate=False) if each.is_meta}
    stated = {name: found for name in names if name in absent and (found := place_in_file(model, name)) is not None}
    if not stated:
        return
    remove_hook_from_submodules(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.clone()
    sizes_bytes = (model.get_parameter(name).nbytes for name in stated)
    is_forgotten = sum(sizes_bytes) > seen_host().available_bytes
    mapped: dict[Path, MappedFile] = {}
    parameters: dict[TensorInFile, torch.nn.Parameter] = {}
    places: dict[str, TensorInFile] = {}
    held: dict[torch.nn.Module, dict[TensorInFile, MappedFile]] = {}
    for name, found in stated.items():
        path, _, own_name = name.rpartition(".")
        module, meta = model.get_submodule(path), model.get_parameter(name)
        place = places[name] = _place_of(found, meta.dtype, folder)
        if place.file not in mapped:
            mapped[place.file] = MappedFile(place.file, is_forgotten=is_forgotten)
        if place not in parameters:  # names that are tied share it
            data = mapped[place.file].data(place).view(meta.dtype).view(meta.shape)
            parameters[place] = torch.nn.Parameter(data, requires_grad=False)
        own_parameters(module)[own_name] = parameters[place]
        held.setdefault(module, {})[place] = mapped[place.file]
    pieces = {each: Piece(held[each], _is_sparse(each)) for each in model.modules() if each in held}
    reader = ReadAhead(tuple(pieces.values()), max(piece.size_bytes for piece in pieces.values()))
    for module, piece in pieces.items():
        _attach(module, piece, reader)
    weakref.finalize(model, reader.close)
    _MAPPED[model] = MappedWeights(places, {place: each.data_ptr() for place, each in parameters.items()})


def place_in_file(model: PreTrainedModel, name: str) -> Mapping[str, Any] | None:
    """Return from where accelerate's hook reads a tensor that is on disk; `None` where none does."""
    for path in ancestors(name):
        for hook in hooks_of(model.get_submodule(path)):
            place = place_on_disk(hook, path, name)
            if place is not None:
                return place
    return None


def _attach(module: torch.nn.Module, piece: Piece, reader: ReadAhead) -> None:
    def before(module: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        reader.begin(piece, whole=not piece.is_sparse or _are_many_tokens(module, (*arguments, *options.values())))

    def after(*_: Any) -> None:
        reader.end(piece)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def _is_sparse(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Embedding) or chooses_experts_implementation(module)


def _are_many_tokens(module: torch.nn.Module, given: Iterable[Any]) -> bool:
    """Return whether experts are given more than one token, by which most of them are chosen; rows are always few."""
    if isinstance(module, torch.nn.Embedding):
        return False
    states = next((each for each in given if isinstance(each, torch.Tensor)), None)
    return states is not None and states.shape[:-1].numel() > 1


def _place_of(stated: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> TensorInFile:
    """Return where a tensor lies with the model's dtype, aligned to it: in its file, or where it is written anew."""
    source, name = Path(stated["safetensors_file"]), str(stated["weight_name"])
    stored_dtype, shape, start, end = read_header(source)[name]
    place, held_dtype = TensorInFile(source, name, start, end), getattr(torch, TORCH_DTYPES[stored_dtype])
    if held_dtype == dtype and start % dtype.itemsize == 0:
        return place
    path = _written_path(place, dtype, folder)
    if (written := _written_place(path, name, dtype, shape)) is not None:
        return written
    folder.mkdir(parents=True, exist_ok=True)
    data = MappedFile(source).data(place).view(held_dtype).view(shape).to(dtype)
    files.write_atomically(path, save({name: data, DIGEST: _digest(data)}))
    return TensorInFile(path, name, *read_header(path)[name][2:])


DIGEST = "sha256"
"""The name of a second tensor in a file that was written anew, of the digest of the first."""


def _digest(data: torch.Tensor) -> torch.Tensor:
    digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _written_place(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInFile | None:
    """Return where a tensor lies that was written anew; `None` where there is none, or another, or a damaged one."""
    try:
        header = read_header(path)
        stored_dtype, stored_shape, *ends = header[name]
        place, digest = TensorInFile(path, name, *ends), TensorInFile(path, DIGEST, *header[DIGEST][2:])
    except (CheckpointError, KeyError):
        return None
    if (TORCH_DTYPES.get(stored_dtype), stored_shape) != (str(dtype).removeprefix("torch."), shape):
        return None
    file = MappedFile(path)
    return place if torch.equal(_digest(file.data(place)), file.data(digest)) else None


def _written_path(place: TensorInFile, dtype: torch.dtype, folder: Path) -> Path:
    """Return the file of a tensor in another dtype, in whose name stands of what it was made."""
    state = place.file.stat()
    source = f"{place.file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{place.start}\0{dtype}"
    return folder / f"cast-{hashlib.sha256(os.fsencode(source)).hexdigest()[:32]}.safetensors"
