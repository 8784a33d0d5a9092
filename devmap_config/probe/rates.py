"""Measures how fast this machine reads its memory and its disk, within bounds of time and size.

Passes are repeated as long as time allows, and the median counts. `torch_rates` is the part that uses torch.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import MEBIBYTE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO


MEMORY_BUFFER_BYTES = 1024 * MEBIBYTE
"""More than fits in the caches of all but a few processors."""

DISK_FILE_BYTES = 1024 * MEBIBYTE
DISK_BLOCK_BYTES = 8 * MEBIBYTE
BLOCKS_A_PASS = 16
SHARE_OF_FREE = 8
"""At most an eighth of the free memory, or of the free disk, is used."""

LIMIT_SECONDS = 1.0
ALL_SECONDS = 30.0
"""The seconds for the passes of one measurement, and of all; with preparations, everything takes less than a minute."""

SHORTEST_SECONDS = 1e-9
DISK_LIMIT_SECONDS = 3.0
"""The seconds for writing the file, and again for reading it."""

MAC_NO_CACHE = 48
"""`F_NOCACHE` of macOS' `fcntl`, which Python does not name."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or operations per second, and the method of measuring, in words.

    `per_second` is the median over `passes`, `least` that of the slowest pass and `most` that of the fastest.
    """

    per_second: int
    method: str
    least: int
    most: int
    passes: int

    @classmethod
    def of(cls, amount: int, seconds: Sequence[float], method: str) -> Rate:
        """Return the rate of passes that each process the same amount in these seconds."""
        middle, least, most = (int(amount / time) for time in (median(seconds), max(seconds), min(seconds)))
        return cls(middle, method, least=least, most=most, passes=len(seconds))


class NotMeasuredError(Exception):
    """Something cannot be measured here; the text says why."""


class TooNoisyError(Exception):
    """Other work on the machine makes the measurement worthless; the text says how this was detected."""


def memory_bandwidth(
    available_bytes: int,
    threads: int,
    *,
    buffer_bytes: int = MEMORY_BUFFER_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Measure how fast all threads together read a buffer that no cache holds.

    Raises:
        NotMeasuredError: if there is too little memory for one.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    size_bytes = min(buffer_bytes, available_bytes // SHARE_OF_FREE)
    if size_bytes < MEBIBYTE:
        raise NotMeasuredError("there is too little memory free")
    buffer = np.ones(size_bytes // 4, dtype=np.float32)  # written to, because untouched memory is not allocated
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = passes(lambda: list(pool.map(np.max, parts)), clock, LIMIT_SECONDS)
    return Rate.of(buffer.nbytes, seconds, f"{threads} threads read {size_bytes // MEBIBYTE} MiB")


def passes(action: Callable[[], object], clock: Callable[[], float], limit_seconds: float) -> list[float]:
    """Return the seconds of each pass, of at least one, until the time is up."""
    seconds: list[float] = []
    end = clock() + limit_seconds
    while not seconds or clock() < end:
        before = clock()
        action()
        seconds.append(max(clock() - before, SHORTEST_SECONDS))
    return seconds


def disk_bandwidth(
    folder: Path, free_bytes: int, *, file_bytes: int = DISK_FILE_BYTES, clock: Callable[[], float] = time.perf_counter
) -> Rate:
    """Measure how fast a file that was just written to a folder is read from start to end.

    The file system's cache is bypassed if it allows that (`O_DIRECT`; on macOS `F_NOCACHE`). Otherwise the file's pages
    are dropped from it before (`posix_fadvise`), which needs no privilege for pages that are written back; and if that
    is not possible either, the method of the result says so. The drive's own cache, and that of a virtual machine's
    host, are out of reach.

    Raises:
        NotMeasuredError: if nothing can be written there.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".devmap-probe-") as file:
            written = _write(file, min(file_bytes, free_bytes // SHARE_OF_FREE), clock)
            if not written:
                raise NotMeasuredError("there is too little room on the disk")
            return _read(Path(file.name), written, clock)
    except OSError as error:
        raise NotMeasuredError(f"nothing can be written to `{folder}`: {error.strerror}") from None


def _write(file: Any, size_bytes: int, clock: Callable[[], float]) -> int:
    block = os.urandom(DISK_BLOCK_BYTES)  # random bytes, so that a file system cannot compress them
    begin, written = clock(), 0
    while written + DISK_BLOCK_BYTES <= size_bytes and (not written or clock() - begin < DISK_LIMIT_SECONDS):
        written += file.file.write(block)
    file.flush()
    os.fsync(file.fileno())
    return written


def _read(path: Path, size_bytes: int, clock: Callable[[], float]) -> Rate:
    descriptor, method = _opened(path)
    with os.fdopen(descriptor, "rb", buffering=0) as file, mmap.mmap(-1, DISK_BLOCK_BYTES) as block:
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a disk reads into huge pages at twice the rate, and the runner uses these
            with suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        end, seconds = clock() + DISK_LIMIT_SECONDS, [_seconds_to_read(file, block, clock)]
        while len(seconds) * DISK_BLOCK_BYTES < size_bytes and clock() < end:
            seconds.append(_seconds_to_read(file, block, clock))
    a_pass = [mean(seconds[first : first + BLOCKS_A_PASS]) for first in range(0, len(seconds), BLOCKS_A_PASS)]
    return Rate.of(DISK_BLOCK_BYTES, a_pass, f"{len(seconds) * DISK_BLOCK_BYTES // MEBIBYTE} MiB read {method}")


def _seconds_to_read(file: FileIO, block: mmap.mmap, clock: Callable[[], float]) -> float:
    before = clock()
    file.readinto(block)
    return max(clock() - before, SHORTEST_SECONDS)


def _opened(path: Path) -> tuple[int, str]:
    """Open a file for reading from the disk, and return how its cache is avoided."""
    if hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # not every file system has it
            return os.open(path, os.O_RDONLY | os.O_DIRECT), "around the cache (O_DIRECT)"  # noqa: TID251  its own file
    descriptor = os.open(path, os.O_RDONLY)  # noqa: TID251  its own file
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, MAC_NO_CACHE, 1)
        return descriptor, "around the cache (F_NOCACHE)"
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor, "after its pages were dropped from the cache (posix_fadvise)"
    return descriptor, "with the file system's cache, which could not be avoided"
