"""Weights in files: their places, reading them into memory, and writing those that are cast."""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save

from devmap_config import files
from devmap_config.graph.checkpoint import CheckpointError, read_header
from devmap_config.graph.meta_loading import TORCH_DTYPES
from devmap_config.graph.model import ancestors
from devmap_config.libraries.accelerate import hooks_of, place_on_disk
from devmap_config.probe.host import seen_host

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from io import FileIO

    from numpy.typing import NDArray
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TensorInFile:
    """The place of a tensor: its name in a safetensors file, and the bytes from `start` to `end` of that file."""

    file: Path
    name: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The bytes that the tensor occupies."""
        return self.end - self.start

    @property
    def first_page(self) -> int:
        """The offset in the file of the first page that holds a part of the tensor."""
        return self.start // mmap.PAGESIZE * mmap.PAGESIZE

    @property
    def pages_bytes(self) -> int:
        """The bytes of the pages that hold the tensor; past the system's cache, whole pages are read."""
        return -(-self.end // mmap.PAGESIZE) * mmap.PAGESIZE - self.first_page


class MappedFile:
    """A file that is mapped to memory, so that pages are read when touched, or read ahead into other memory."""

    def __init__(self, path: Path, *, is_cached: bool = True) -> None:
        """Map a regular file, wherever its links lead; with `is_cached`, reading ahead goes through the system's cache.

        Raises:
            FileError: if it cannot be read.
        """
        with files.opened(path, files.ANYWHERE) as file:
            self._file = os.fdopen(os.dup(file.fileno()), "rb", buffering=0)
        # A private mapping, because torch requires writable memory; writes do not reach the file.
        self._memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        if not is_cached:
            _pass_cache_by(self._file)

    def data(self, place: TensorInFile) -> torch.Tensor:
        """Return the bytes of a tensor, without reading them."""
        if not place.size_bytes:
            return torch.empty(0, dtype=torch.uint8)  # torch refuses empty memory
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=place.size_bytes, offset=place.start)

    def read(self, place: TensorInFile, memory: NDArray[np.uint8]) -> None:
        """Read the pages of a tensor into page-aligned memory of their size.

        Raises:
            OSError: if they cannot be read, or the file has become shorter.
        """
        position = self._file.seek(place.first_page)
        while position < place.end:
            count = self._file.readinto(memory[position - place.first_page :].data)
            if not count:
                raise OSError(f"`{place.file.name}` ends at {position:,} bytes, before its tensors do")
            position += count

    def let_go(self, place: TensorInFile) -> None:
        """Release this process's pages that hold only this tensor; the system may keep them cached."""
        start = -(-place.start // mmap.PAGESIZE) * mmap.PAGESIZE
        size_bytes = place.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if hasattr(mmap, "MADV_DONTNEED") and size_bytes > 0:
            self._memory.madvise(mmap.MADV_DONTNEED, start, size_bytes)


def _pass_cache_by(file: FileIO) -> None:
    """Have a file read from its disk each time, if the system supports that, and drop its cached pages."""
    if not hasattr(os, "O_DIRECT"):
        return
    import fcntl  # noqa: PLC0415  Windows has none

    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        file.readinto(pages(mmap.PAGESIZE).data)
    except OSError:  # not every file system supports that, or reading by pages
        fcntl.fcntl(file, fcntl.F_SETFL, flags)


def pages(size_bytes: int) -> NDArray[np.uint8]:
    """Return page-aligned memory; numpy requests huge pages, into which disks read faster."""
    memory = np.empty(size_bytes + mmap.PAGESIZE, dtype=np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + size_bytes]


@dataclass(frozen=True, eq=False)
class Piece:
    """The weights of a module, without its children's, that are on disk.

    `is_sparse` is true if a token needs only a few rows of them, as of an embedding or of experts: these are read when
    they are touched, and not as a whole.
    """

    files: Mapping[TensorInFile, MappedFile]
    is_sparse: bool

    @cached_property
    def size_bytes(self) -> int:
        """The bytes of the pages that hold the tensors."""
        return sum(place.pages_bytes for place in self.files)

    def read(self, memory: NDArray[np.uint8]) -> dict[TensorInFile, torch.Tensor]:
        """Read the tensors into memory of this size, and return the bytes of each.

        Raises:
            OSError: if they cannot be read.
        """
        data, start = torch.from_numpy(memory), 0
        read: dict[TensorInFile, torch.Tensor] = {}
        for place, file in self.files.items():
            file.read(place, memory[start : start + place.pages_bytes])
            read[place] = data[start + place.start - place.first_page :][: place.size_bytes]
            start += place.pages_bytes
        return read

    def let_go(self) -> None:
        """Release this process's pages that hold only these tensors."""
        for place, file in self.files.items():
            file.let_go(place)


def mapped_files(places: Iterable[TensorInFile]) -> dict[Path, MappedFile]:
    """Map the files of these tensors, for reading ahead repeatedly.

    The system caches what it reads as long as memory is free. If less is free than these tensors take, every page would
    be dropped before it is needed again, so that reading bypasses the cache.

    Raises:
        FileError: if a file cannot be read.
    """
    distinct = dict.fromkeys(places)
    is_cached = sum(place.size_bytes for place in distinct) <= seen_host().available_bytes
    return {path: MappedFile(path, is_cached=is_cached) for path in dict.fromkeys(place.file for place in distinct)}


def place_in_file(model: PreTrainedModel, name: str) -> Mapping[str, Any] | None:
    """Return the place that accelerate's hook reads a tensor from, if it is on disk; else `None`."""
    for path in ancestors(name):
        for hook in hooks_of(model.get_submodule(path)):
            place = place_on_disk(hook, path, name)
            if place is not None:
                return place
    return None


def place_of(stated: Mapping[str, Any], dtype: torch.dtype, folder: Path) -> TensorInFile:
    """Return the place of a tensor in the model's dtype, and aligned: in its own file, or in one that is written for
    it.
    """
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
"""The name of a second tensor in a written file, which holds the digest of the first."""


def _digest(data: torch.Tensor) -> torch.Tensor:
    digest = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _written_place(path: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorInFile | None:
    """Return the place of a tensor in a written file; `None` if there is no such file, or it is damaged or of
    another tensor.
    """
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
    """Return the path for a tensor in another dtype; the name identifies what the tensor is made from."""
    state = place.file.stat()
    source = f"{place.file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{place.start}\0{dtype}"
    return folder / f"{files.CAST}{hashlib.sha256(os.fsencode(source)).hexdigest()[:32]}.safetensors"
