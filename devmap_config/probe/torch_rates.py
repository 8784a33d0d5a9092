"""What accelerators reach, and the CPU in multiplying matrices: the torch half of `devmap probe --measure`.

Copies are made by torch. Everything is bounded in time and size.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import MEBIBYTE
from devmap_config.devices import CPU
from devmap_config.libraries.torch import dispatched_by
from devmap_config.probe.rates import SHARE_OF_FREE, NotMeasuredError, Rate, TooNoisyError, fastest_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from devmap_config.devices import Device
    from devmap_config.probe.machine import SeenAccelerator

COPY_BYTES = 256 * MEBIBYTE
LAYER_WIDTH = 4096
LAYER_BYTES = 2 * LAYER_WIDTH**2
LAYERS_BYTES = 1024 * MEBIBYTE
"""More than the caches of all but a few processors hold."""

SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
LONG_ENOUGH_SECONDS = 0.05
"""A layer that takes as long says how fast the device is, and not how fast a kernel is launched."""

LIMIT_SECONDS = 1.0

QUIET = 0.9
"""Of one thread's time, what is had on a machine with nothing else to do."""

NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}


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
        """Return the bytes that a copy within the device reads and writes, a second."""
        size_bytes = self._size(seen)
        per_second = 2 * self._copied_per_second(size_bytes, seen.id, seen.id)
        return Rate(per_second, f"{size_bytes // MEBIBYTE} MiB copied within the device")

    def layer_bandwidth(self, available_bytes: int) -> Rate:
        """Return the bytes of weights that the CPU reads a second as it multiplies one token by them, in linear layers.

        That is less than it reads of memory that nothing is computed with: two thirds on 16 threads, in bfloat16.

        Raises:
            NotMeasuredError: where there is too little memory for layers that caches do not hold.
        """
        count = min(LAYERS_BYTES, available_bytes // SHARE_OF_FREE) // LAYER_BYTES
        if not count:
            raise NotMeasuredError("there is too little memory free")
        dtype = self._half_precision(CPU)
        weights = [self._torch.ones(LAYER_WIDTH, LAYER_WIDTH, dtype=dtype) for _ in range(count)]
        token = self._torch.ones(1, LAYER_WIDTH, dtype=dtype)
        seconds = self._fastest(lambda: [self._torch.nn.functional.linear(token, weight) for weight in weights], CPU)
        return Rate(
            int(count * LAYER_BYTES / seconds), f"{count} linear layers of {LAYER_WIDTH} by {LAYER_WIDTH}, one token"
        )

    def dispatches(self, device: Device) -> Rate:
        """Return the operations a second that this machine's Python and torch dispatch, as models ask for them.

        A Llama so narrow that a device has next to nothing to do: what it takes is what the host takes, on one thread.

        Raises:
            TooNoisyError: where other work took the CPU meanwhile: then nothing that was measured here is of use.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        torch = self._torch
        model = LlamaForCausalLM(LlamaConfig(**NARROW)).eval().to(str(device), self._half_precision(device))
        forward = partial(model, torch.ones(1, 1, dtype=torch.long, device=str(device)), use_cache=False)
        with torch.no_grad():
            count = dispatched_by(forward)
            with self._one_thread():
                began, worked = time.perf_counter(), time.process_time()
                seconds = self._fastest(forward, device)
                share = (time.process_time() - worked) / (time.perf_counter() - began)
        if share < QUIET:
            raise TooNoisyError(f"other work takes the CPU: of one thread, this had {share:.0%}")
        return Rate(
            int(count / seconds), f"{count} operations of a Llama with {model.config.num_hidden_layers} narrow layers"
        )

    def flops(self, device: Device) -> Rate:
        """Return the operations a second of a square linear layer in bfloat16, or in float16 where it has none.

        As models call it, and not as a plain product: on CPUs, the two are different kernels.
        """
        dtype = self._half_precision(device)
        size, seconds = SMALLEST_MATRIX // 2, 0.0
        while seconds < LONG_ENOUGH_SECONDS and size < LARGEST_MATRIX:
            size *= 2
            inputs = self._torch.ones(size, size, dtype=dtype).to(str(device))
            layer = partial(self._torch.nn.functional.linear, inputs, inputs.clone())
            seconds = self._fastest(layer, device)
        named = str(dtype).removeprefix("torch.")
        return Rate(int(2 * size**3 / seconds), f"{named} linear layers of {size} by {size}")

    def from_host(self, accelerators: Iterable[SeenAccelerator], *, is_pinned: bool) -> Rate:
        """Return the bytes a second from the CPU to the accelerator that is slowest to reach."""
        rates = []
        for seen in accelerators:
            size_bytes = self._size(seen)
            per_second = self._copied_per_second(size_bytes, CPU, seen.id, is_pinned=is_pinned)
            kind = "pinned memory" if is_pinned else "memory that is not pinned"
            rates.append(Rate(per_second, f"{size_bytes // MEBIBYTE} MiB of {kind} copied"))
        return min(rates, key=lambda rate: rate.per_second)

    def between(self, first: SeenAccelerator, second: SeenAccelerator) -> Rate:
        """Return the bytes a second from one accelerator to another, in the slower direction."""
        size_bytes = min(self._size(first), self._size(second))
        ways = ((first.id, second.id), (second.id, first.id))
        per_second = min(self._copied_per_second(size_bytes, *way) for way in ways)
        return Rate(per_second, f"{size_bytes // MEBIBYTE} MiB copied each way")

    def _size(self, seen: SeenAccelerator) -> int:
        free_bytes = seen.free_bytes if seen.free_bytes is not None else seen.memory_bytes
        return COPY_BYTES if free_bytes is None else max(min(COPY_BYTES, free_bytes // SHARE_OF_FREE), MEBIBYTE)

    def _half_precision(self, device: Device) -> Any:
        try:
            self._torch.ones(1, dtype=self._torch.bfloat16).to(str(device))
        except RuntimeError:
            return self._torch.float16
        return self._torch.bfloat16

    def _copied_per_second(self, size_bytes: int, start: Device, end: Device, *, is_pinned: bool = False) -> int:
        source, target = (self._buffer(size_bytes, device) for device in (start, end))
        source = source.pin_memory() if is_pinned else source
        return int(size_bytes / self._fastest(partial(target.copy_, source), start, end))

    def _buffer(self, size_bytes: int, device: Device) -> Any:
        """Return memory that was written to: what never was is not there to be copied."""
        return self._torch.ones(size_bytes, dtype=self._torch.uint8).to(str(device))

    def _fastest(self, action: Callable[[], Any], *devices: Device) -> float:
        """Return the seconds in which the devices have done what an action gives them."""

        def run() -> None:
            action()
            for device in devices:
                self._wait(device)

        run()  # the first time, kernels are loaded and buffers made
        return fastest_pass(run, self._clock, LIMIT_SECONDS)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        threads = self._torch.get_num_threads()
        self._torch.set_num_threads(1)
        try:
            yield
        finally:
            self._torch.set_num_threads(threads)

    def _wait(self, device: Device) -> None:
        """Wait until a device has done what it was given: accelerators work on their own."""
        wait = getattr(getattr(self._torch, device.kind, None), "synchronize", None)
        if wait is not None and device != CPU:
            with suppress(NotImplementedError):
                wait(*(() if device.index is None else (device.index,)))
