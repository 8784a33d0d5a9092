"""How fast this machine reads its memory and its disk, measured within bounds of time and size.

What plans are predicted with is what is reached, so the best of several passes is taken: neighbours only make a pass
slower. The torch half is `torch_rates`.
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
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import MEBIBYTE

if TYPE_CHECKING:
    from collections.abc import Callable


MEMORY_BUFFER_BYTES = 1024 * MEBIBYTE
"""More than the caches of all but a few processors hold."""

DISK_FILE_BYTES = 1024 * MEBIBYTE
DISK_BLOCK_BYTES = 8 * MEBIBYTE
SHARE_OF_FREE = 8
"""Not more than an eighth of what is free is taken, of memory as of the disk."""

PASSES = 8
LIMIT_SECONDS = 3.0
"""For each of: passing over memory, writing the file, reading it."""

MAC_NO_CACHE = 48
"""`F_NOCACHE` of macOS' `fcntl`, which Python does not name."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes (or operations) a second, and how that was measured, in words."""

    per_second: int
    method: str


class NotMeasuredError(Exception):
    """Something cannot be measured here; the text says why."""


class TooNoisyError(Exception):
    """Other work on the machine makes what is measured worthless; the text says how it is known."""


def memory_bandwidth(
    available_bytes: int,
    threads: int,
    *,
    buffer_bytes: int = MEMORY_BUFFER_BYTES,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """How fast all threads together read a buffer that caches do not hold.

    Raises:
        NotMeasuredError: where there is too little memory for one.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    size_bytes = min(buffer_bytes, available_bytes // SHARE_OF_FREE)
    if size_bytes < MEBIBYTE:
        raise NotMeasuredError("there is too little memory free")
    buffer = np.ones(size_bytes // 4, dtype=np.float32)  # written to: memory that never was is not there to be read
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = fastest_pass(lambda: list(pool.map(np.max, parts)), clock, LIMIT_SECONDS)
    return Rate(int(buffer.nbytes / best), f"{threads} threads read {size_bytes // MEBIBYTE} MiB")


def fastest_pass(action: Callable[[], object], clock: Callable[[], float], limit_seconds: float) -> float:
    """Return the seconds of the fastest of several passes, of at least one, until the time is up."""
    seconds = []
    begin = clock()
    for _ in range(PASSES):
        before = clock()
        action()
        after = clock()
        seconds.append(max(after - before, 1e-9))
        if after - begin > limit_seconds:
            break
    return min(seconds)


def disk_bandwidth(
    folder: Path, free_bytes: int, *, file_bytes: int = DISK_FILE_BYTES, clock: Callable[[], float] = time.perf_counter
) -> Rate:
    """How fast a file that was just written to a folder is read from its start to its end.

    The file system's cache is gone around where it lets itself (`O_DIRECT`; on macOS `F_NOCACHE`). Else the file's
    pages are dropped from it before (`posix_fadvise`), which needs no privilege for pages that are written back; and
    where that is not to be had either, the method says so. The drive's own cache, and that of a virtual machine's
    host, are out of reach.

    Raises:
        NotMeasuredError: where nothing can be written there.
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
    block = os.urandom(DISK_BLOCK_BYTES)  # a file system that compresses finds nothing to gain
    begin, written = clock(), 0
    while written + DISK_BLOCK_BYTES <= size_bytes and (not written or clock() - begin < LIMIT_SECONDS):
        written += file.file.write(block)
    file.flush()
    os.fsync(file.fileno())
    return written


def _read(path: Path, size_bytes: int, clock: Callable[[], float]) -> Rate:
    descriptor, method = _opened(path)
    with os.fdopen(descriptor, "rb", buffering=0) as file, mmap.mmap(-1, DISK_BLOCK_BYTES) as block:
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a disk reads into large pages at twice the rate, as the runner has it do
            with suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        begin, read = clock(), 0
        while read < size_bytes and (not read or clock() - begin < LIMIT_SECONDS):
            read += file.readinto(block) or size_bytes
        seconds = max(clock() - begin, 1e-9)
    return Rate(int(read / seconds), f"{read // MEBIBYTE} MiB read {method}")


def _opened(path: Path) -> tuple[int, str]:
    """A file that is to be read from the disk, and how its cache is avoided."""
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
