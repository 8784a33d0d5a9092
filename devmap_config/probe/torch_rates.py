"""What accelerators reach, and the CPU in multiplying matrices: the torch half of `devmap probe --measure`.

Copies are made as the loader's are: from memory that is not pinned, by torch. Everything is bounded in time and size.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import MEBIBYTE
from devmap_config.probe.rates import PASSES, SHARE_OF_FREE, Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from devmap_config.probe.machine import SeenAccelerator

COPY_BYTES = 256 * MEBIBYTE
SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
LONG_ENOUGH_SECONDS = 0.05
"""A layer that takes as long says how fast the device is, and not how fast a kernel is launched."""

LIMIT_SECONDS = 1.0

PAIR_APART = 1.2
"""A pair of accelerators that is so much faster than the slowest gets a line of its own: it has a bridge, say."""


class Devices:
    """torch's devices, to be timed. Without torch there are none: `is_there` is false."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._torch: Any = None
        try:
            import torch
        except ImportError:
            return
        self._torch = torch

    @property
    def is_there(self) -> bool:
        """Whether torch is installed."""
        return self._torch is not None

    def memory_bandwidth(self, seen: SeenAccelerator) -> Rate:
        """Bytes that a copy within the device reads and writes, a second."""
        size_bytes = self._size(seen)
        source, target = self._buffer(size_bytes, seen.id), self._buffer(size_bytes, seen.id)
        seconds = self._best(partial(target.copy_, source), (seen.id,))
        return Rate(int(2 * size_bytes / seconds), f"{size_bytes // MEBIBYTE} MiB copied within the device")

    def flops(self, device: str) -> Rate:
        """Operations a second of a square linear layer in bfloat16, or in float16 where it has none.

        As models call it, and not as a plain product: on CPUs, the two are different kernels.
        """
        torch = self._torch
        size = SMALLEST_MATRIX
        dtype = torch.bfloat16
        while True:
            try:
                left = torch.ones(size, size, dtype=dtype).to(device)
            except RuntimeError:
                if dtype is torch.float16:
                    raise
                dtype = torch.float16
                continue
            right = left.clone()
            seconds = self._best(partial(torch.nn.functional.linear, left, right), (device,))
            if seconds >= LONG_ENOUGH_SECONDS or size >= LARGEST_MATRIX:
                named = str(dtype).removeprefix("torch.")
                return Rate(int(2 * size**3 / seconds), f"{named} linear layers of {size} by {size}")
            size *= 2

    def from_host(self, accelerators: Iterable[SeenAccelerator]) -> Rate:
        """Bytes a second from the CPU to the accelerator that is slowest to reach."""
        rates = []
        for seen in accelerators:
            size_bytes = self._size(seen)
            source, target = self._buffer(size_bytes, "cpu"), self._buffer(size_bytes, seen.id)
            seconds = self._best(partial(target.copy_, source), (seen.id,))
            rates.append(Rate(int(size_bytes / seconds), f"{size_bytes // MEBIBYTE} MiB of unpinned memory copied"))
        return min(rates, key=lambda rate: rate.per_second)

    def between(self, first: SeenAccelerator, second: SeenAccelerator) -> Rate:
        """Bytes a second from one accelerator to another, in the slower direction."""
        size_bytes = min(self._size(first), self._size(second))
        rates = []
        for start, end in ((first.id, second.id), (second.id, first.id)):
            source, target = self._buffer(size_bytes, start), self._buffer(size_bytes, end)
            seconds = self._best(partial(target.copy_, source), (start, end))
            rates.append(int(size_bytes / seconds))
        return Rate(min(rates), f"{size_bytes // MEBIBYTE} MiB copied each way")

    def _size(self, seen: SeenAccelerator) -> int:
        free_bytes = seen.free_bytes if seen.free_bytes is not None else seen.memory_bytes
        return COPY_BYTES if free_bytes is None else max(min(COPY_BYTES, free_bytes // SHARE_OF_FREE), MEBIBYTE)

    def _buffer(self, size_bytes: int, device: str) -> Any:
        """Written to: memory that never was is not there to be copied."""
        return self._torch.ones(size_bytes, dtype=self._torch.uint8).to(device)

    def _best(self, action: Callable[[], Any], devices: Sequence[str]) -> float:
        return min(self._passes(action, devices))

    def _passes(self, action: Callable[[], Any], devices: Sequence[str]) -> Iterator[float]:
        action()  # the first time, kernels are loaded and buffers made
        begin = self._clock()
        for _ in range(PASSES):
            self._wait(devices)
            before = self._clock()
            action()
            self._wait(devices)
            after = self._clock()
            yield max(after - before, 1e-9)
            if after - begin > LIMIT_SECONDS:
                return

    def _wait(self, devices: Sequence[str]) -> None:
        """Until the devices have done what they were given: they work on their own."""
        for device in devices:
            kind, _, index = device.partition(":")
            wait = getattr(getattr(self._torch, kind, None), "synchronize", None)
            if wait is not None and kind != "cpu":
                with suppress(NotImplementedError):
                    wait(*([int(index)] if index else []))


def peer_links(rates: dict[tuple[str, str], int]) -> dict[str, int]:
    """`peer`, which is the slowest pair, and the pairs that are much faster."""
    slowest = min(rates.values())
    apart = {f"{first}-{second}": rate for (first, second), rate in rates.items() if rate > slowest * PAIR_APART}
    return {"peer": slowest, **apart}
