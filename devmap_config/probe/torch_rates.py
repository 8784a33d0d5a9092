"""Measures the rates of accelerators, and of the CPU's matrix products: the part of `devmap probe --measure` that uses
torch.

torch makes the copies. Time and size are bounded.
"""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import MEBIBYTE, counted
from devmap_config.devices import CPU
from devmap_config.libraries.torch import dispatched_by, torch_attention
from devmap_config.probe.host import usable_threads
from devmap_config.probe.rates import (
    ALL_SECONDS,
    LIMIT_SECONDS,
    SHARE_OF_FREE,
    SHORTEST_SECONDS,
    NotMeasuredError,
    Rate,
    TooNoisyError,
    passes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from devmap_config.devices import Device
    from devmap_config.probe.machine import SeenAccelerator

COPY_BYTES = 256 * MEBIBYTE
AT_ONCE_BYTES = 1024 * MEBIBYTE
LAYER_WIDTHS = (2048, 4096)
LAYERS_BYTES = 1024 * MEBIBYTE
"""More than fits in the caches of all but a few processors."""

LAYER_TOKENS = 512

NARROW_WIDTH, NARROW_BYTES, NARROW_TOKENS = 512, 256 * MEBIBYTE, 64
LEAST_SHARE = 0.1
"""The least share of a narrow layer's time, besides reading and computing, for which a rate of products is stated."""

HEADS, SHARED_HEADS, HEAD_WIDTH = 32, 8, 128
"""The heads of the queries, those of the keys and values, and the width of each, as in models of 8 billion weights."""

PROMPT_TOKENS = 1024
CONTEXT_TOKENS = 8192
LAYERS_WITH_A_CACHE = 4

EXPERTS, CHOSEN, EXPERT_WIDTHS = 64, 8, (2048, 768)
"""The experts of a mixture, the experts of a token, and the widths of their matrices. Qwen3-30B-A3B has twice as
many experts.
"""

SMALLEST_MATRIX, LARGEST_MATRIX = 256, 8192
LONG_ENOUGH_SECONDS = 0.05
"""The time of a layer that measures the speed of the device rather than that of launching a kernel."""

QUIET = 0.9
"""The least share of a thread's time that it runs on an otherwise idle machine."""

QUIET_TOGETHER = 0.8
"""The same for several threads, which wait for the slowest of them."""

NARROW = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}


class Devices:
    """Measures torch's devices. Without torch there are none: `is_there` is false."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, processor: Callable[[], float] = time.process_time
    ) -> None:
        """Use `clock` for the time, and `processor` for the processor time of all threads of the process."""
        self._clock, self._processor = clock, processor
        self._limit_seconds = LIMIT_SECONDS
        self._torch: Any = None
        self._product_seconds = 0.0
        try:
            import torch
        except ImportError:
            return
        self._torch = torch

    def share_time(self, measurements: int) -> None:
        """Shorten each of this many measurements if needed, so that all take less than a minute."""
        self._limit_seconds = min(LIMIT_SECONDS, ALL_SECONDS / measurements)

    @property
    def is_there(self) -> bool:
        """True if torch is installed."""
        return self._torch is not None

    def memory_bandwidth(self, seen: SeenAccelerator) -> Rate:
        """Return the bytes per second that a copy within the device reads and writes."""
        size_bytes = self._size(seen)
        seconds = self._copying_seconds(size_bytes, seen.id, seen.id)
        return Rate.of(2 * size_bytes, seconds, f"{size_bytes // MEBIBYTE} MiB copied within the device")

    def layers(self, dtype: str, available_bytes: int) -> tuple[Rate | None, ...]:
        """Return the rates of linear layers on the CPU in a dtype.

        The first rate is that of one token: the bytes of weights that are read and multiplied per second. It is lower
        than that of only reading memory: two thirds on 16 threads, in bfloat16. The second is that of a prompt: the
        operations per second, without the time of reading the weights. The others are the products per second of one
        token and of a prompt, without reading and computing; `None` if a narrow layer takes no longer than the first
        two rates imply.

        Raises:
            NotMeasuredError: if there is too little memory for layers that caches do not hold.
            TooNoisyError: if other work takes the CPU.
        """
        itemsize = getattr(self._torch, dtype).itemsize
        count = self._count(itemsize * sum(width**2 for width in LAYER_WIDTHS), available_bytes, LAYERS_BYTES)
        weights = [self._ones(dtype, width, width) for width in LAYER_WIDTHS * count]
        size_bytes = sum(weight.nbytes for weight in weights)
        threads = 1 if dtype == "float32" else self._threads  # for one token, BLAS uses one thread
        reading = self._seconds(partial(self._multiply, weights, 1), CPU, threads=threads)
        sizes = " and ".join(f"{width} by {width}" for width in LAYER_WIDTHS)
        method = f"{dtype} linear layers of {sizes}"
        bandwidth = Rate.of(size_bytes, reading, f"{len(weights)} {method}, one token")
        few = weights[: len(LAYER_WIDTHS)]
        besides = sum(weight.nbytes for weight in few) / bandwidth.per_second
        multiplying = self._seconds(partial(self._multiply, few, LAYER_TOKENS), CPU, threads=self._threads)
        computing = [max(seconds - besides, seconds / 2) for seconds in multiplying]
        operations = 2 * LAYER_TOKENS * sum(weight.numel() for weight in few)
        flops = Rate.of(operations, computing, f"{method}, {LAYER_TOKENS} tokens, beside reading them")
        one_token, prompt = (
            self._products(dtype, available_bytes, tokens, bandwidth, flops, threads=count)
            for tokens, count in ((1, threads), (NARROW_TOKENS, self._threads))
        )
        if dtype == "bfloat16" and one_token is not None:
            self._product_seconds = 1 / one_token.per_second
        return bandwidth, flops, one_token, prompt

    def _products(
        self, dtype: str, available_bytes: int, tokens: int, bandwidth: Rate, flops: Rate, *, threads: int
    ) -> Rate | None:
        """Return the products of narrow layers per second, without the time of reading and computing."""
        layer_bytes = NARROW_WIDTH**2 * getattr(self._torch, dtype).itemsize
        count = self._count(layer_bytes, available_bytes, NARROW_BYTES)
        weights = [self._ones(dtype, NARROW_WIDTH, NARROW_WIDTH) for _ in range(count)]
        seconds = self._seconds(partial(self._multiply, weights, tokens), CPU, threads=threads)
        operations = 2 * tokens * NARROW_WIDTH**2 if tokens > 1 else 0
        explained = count * (layer_bytes / bandwidth.per_second + operations / flops.per_second)
        besides = [time - explained for time in seconds]
        if median(besides) < LEAST_SHARE * median(seconds):
            return None
        several = f"{tokens} tokens" if tokens > 1 else "one token"
        method = f"{dtype} linear layers of {NARROW_WIDTH} by {NARROW_WIDTH}, {several}, beside reading and computing"
        return Rate.of(count, [max(time, LEAST_SHARE * explained) for time in besides], method)

    def _multiply(self, weights: list[Any], tokens: int) -> None:
        for weight in weights:
            self._torch.nn.functional.linear(weight[:tokens], weight)

    def attention(self, available_bytes: int, *, is_prefill: bool) -> Rate:
        """Return the operations per second of attention on the CPU: for a prompt, or for a query after a long context.

        All queries of a prompt are counted with all keys, as in predictions.

        Raises:
            NotMeasuredError: if there is too little memory for the cache of a layer.
            TooNoisyError: if other work takes the CPU.
        """
        queries, tokens = (PROMPT_TOKENS, PROMPT_TOKENS) if is_prefill else (1, CONTEXT_TOKENS)
        layer_bytes = 2 * 2 * SHARED_HEADS * tokens * HEAD_WIDTH
        count = self._count(layer_bytes, available_bytes, layer_bytes * (1 if is_prefill else LAYERS_WITH_A_CACHE))
        caches = [[self._ones("bfloat16", 1, SHARED_HEADS, tokens, HEAD_WIDTH) for _ in "kv"] for _ in range(count)]
        query = self._ones("bfloat16", 1, HEADS, queries, HEAD_WIDTH)
        attend = partial(torch_attention(), is_causal=is_prefill, enable_gqa=True)
        threads = min(self._threads, HEADS)  # for one query, each thread has at least one head
        seconds = self._seconds(lambda: [attend(query, *cache) for cache in caches], CPU, threads=threads)
        queries_in_words = f"{queries} queries" if is_prefill else "a query"
        method = f"{queries_in_words} of {HEADS} heads, {tokens} tokens of {SHARED_HEADS} heads, bfloat16"
        return Rate.of(4 * count * HEADS * queries * tokens * HEAD_WIDTH, seconds, method)

    def experts(self, available_bytes: int) -> Rate:
        """Return the bytes of experts per second that the CPU reads and multiplies for the choices of a token.

        The least time of the products is excluded, if `layers` has measured it.

        Raises:
            NotMeasuredError: if there is too little memory for the experts of a token.
            TooNoisyError: if other work takes the CPU.
        """
        torch = self._torch
        hidden, inner = EXPERT_WIDTHS
        rounds = self._count(CHOSEN * 2 * 3 * hidden * inner, available_bytes, EXPERTS * 2 * 3 * hidden * inner)
        experts = rounds * CHOSEN
        weights = [self._ones("bfloat16", experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner))]
        chosen = [(torch.arange(experts) % rounds == turn).cumsum(0, dtype=torch.int32) for turn in range(rounds)]

        def choose() -> None:
            for ends, weight in itertools.product(chosen, weights):
                rows = weight[0, :CHOSEN]
                torch.nn.functional.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)

        seconds = self._seconds(choose, CPU, threads=self._threads)
        besides = experts * len(weights) * self._product_seconds
        reading = [max(time - besides, time / 2) for time in seconds]
        method = f"{CHOSEN} of {experts} experts of {hidden} by {inner} for each of {rounds} tokens, bfloat16"
        return Rate.of(sum(weight.nbytes for weight in weights), reading, method)

    def dispatches(self, device: Device) -> Rate:
        """Return the operations per second that this machine's Python and torch dispatch in models.

        It runs a Llama that is so narrow that a device has almost nothing to do, so that its time is that of the host,
        on one thread.

        Raises:
            TooNoisyError: if other work used the CPU meanwhile, so that no measurement on this machine is reliable.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        torch = self._torch
        model = LlamaForCausalLM(LlamaConfig(**NARROW)).eval().to(str(device), self._half_precision(device))
        forward = partial(model, torch.ones(1, 1, dtype=torch.long, device=str(device)), use_cache=False)
        with torch.no_grad():
            count = dispatched_by(forward)
            with self._one_thread():
                seconds = self._seconds(forward, device, threads=1)
        method = f"{count} operations of a Llama with {model.config.num_hidden_layers} narrow layers"
        return Rate.of(count, seconds, method)

    def flops(self, device: Device, dtype: str | None = None) -> Rate:
        """Return the operations per second of a square linear layer, in bfloat16, or in float16 if the device has
        none.
        """
        dtype = dtype or str(self._half_precision(device)).removeprefix("torch.")
        size, seconds = SMALLEST_MATRIX // 2, 0.0
        while seconds < LONG_ENOUGH_SECONDS and size < LARGEST_MATRIX:
            size *= 2
            inputs = self._ones(dtype, size, size).to(str(device))
            layer = partial(self._torch.nn.functional.linear, inputs, inputs.clone())
            [seconds] = self._seconds(layer, device, limit_seconds=0)
        return Rate.of(2 * size**3, self._seconds(layer, device), f"{dtype} linear layers of {size} by {size}")

    def from_host(self, accelerators: Iterable[SeenAccelerator], *, is_pinned: bool) -> Rate:
        """Return the bytes per second from the CPU to the accelerator with the slowest link."""
        rates = []
        for seen in accelerators:
            size_bytes = self._size(seen)
            seconds = self._copying_seconds(size_bytes, CPU, seen.id, is_pinned=is_pinned)
            kind = "pinned memory" if is_pinned else "memory that is not pinned"
            rates.append(Rate.of(size_bytes, seconds, f"{size_bytes // MEBIBYTE} MiB of {kind} copied"))
        return min(rates, key=lambda rate: rate.per_second)

    def from_host_at_once(self, accelerators: Sequence[SeenAccelerator], available_bytes: int) -> Rate:
        """Return the bytes per second from pinned memory of the CPU to all accelerators together."""
        count = len(accelerators)
        most_bytes = min(available_bytes // SHARE_OF_FREE, AT_ONCE_BYTES) // count
        size_bytes = min(most_bytes, *map(self._size, accelerators))
        targets = [self._buffer(size_bytes, seen.id) for seen in accelerators]
        sources = [self._buffer(size_bytes, CPU).pin_memory() for _ in targets]

        def copy() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)

        seconds = self._seconds(copy, *(seen.id for seen in accelerators))
        method = f"{size_bytes // MEBIBYTE} MiB of pinned memory copied to each of {count} at once"
        return Rate.of(count * size_bytes, seconds, method)

    def between(self, first: SeenAccelerator, second: SeenAccelerator) -> Rate:
        """Return the bytes per second from one accelerator to another, in the slower direction."""
        size_bytes = min(self._size(first), self._size(second))
        ways = ((first.id, second.id), (second.id, first.id))
        slower = max((self._copying_seconds(size_bytes, *way) for way in ways), key=median)
        return Rate.of(size_bytes, slower, f"{size_bytes // MEBIBYTE} MiB copied each way")

    @property
    def _threads(self) -> int:
        """The number of threads that a product uses; on Apple's chips, other threads than torch's do the work."""
        return 1 if sys.platform == "darwin" else min(self._torch.get_num_threads(), usable_threads())

    def _count(self, each_bytes: int, available_bytes: int, most_bytes: int) -> int:
        """Return the number of items of a size that fit in the available memory, within a limit."""
        count = min(most_bytes, available_bytes // SHARE_OF_FREE) // each_bytes
        if not count:
            raise NotMeasuredError("there is too little memory free")
        return count

    def _ones(self, dtype: str, *shape: int) -> Any:
        return self._torch.ones(*shape, dtype=getattr(self._torch, dtype))

    def _size(self, seen: SeenAccelerator) -> int:
        free_bytes = seen.free_bytes if seen.free_bytes is not None else seen.memory_bytes
        return COPY_BYTES if free_bytes is None else max(min(COPY_BYTES, free_bytes // SHARE_OF_FREE), MEBIBYTE)

    def _half_precision(self, device: Device) -> Any:
        try:
            self._torch.ones(1, dtype=self._torch.bfloat16).to(str(device))
        except RuntimeError:
            return self._torch.float16
        return self._torch.bfloat16

    def _copying_seconds(self, size_bytes: int, start: Device, end: Device, *, is_pinned: bool = False) -> list[float]:
        source, target = (self._buffer(size_bytes, device) for device in (start, end))
        source = source.pin_memory() if is_pinned else source
        return self._seconds(partial(target.copy_, source), start, end)

    def _buffer(self, size_bytes: int, device: Device) -> Any:
        """Return memory that was written to, because untouched memory is not allocated."""
        return self._torch.ones(size_bytes, dtype=self._torch.uint8).to(str(device))

    def _seconds(
        self, action: Callable[[], Any], *devices: Device, threads: int = 0, limit_seconds: float | None = None
    ) -> list[float]:
        """Return the seconds of passes of an action, including the devices' work, until the time is up.

        Raises:
            TooNoisyError: if fewer than `threads` threads of this process were running meanwhile.
        """

        def run() -> None:
            action()
            for device in devices:
                self._wait(device)

        run()  # the first pass loads kernels and allocates buffers
        began, worked = self._clock(), self._processor()
        seconds = passes(run, self._clock, self._limit_seconds if limit_seconds is None else limit_seconds)
        elapsed, at_work = self._clock() - began, self._processor() - worked
        share = at_work / max(threads * elapsed, SHORTEST_SECONDS)
        if threads and share < (QUIET_TOGETHER if threads > 1 else QUIET):
            raise TooNoisyError(f"other work takes the CPU: of {counted(threads, 'thread')}, this had {share:.0%}")
        return seconds

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        threads = self._torch.get_num_threads()
        self._torch.set_num_threads(1)
        try:
            yield
        finally:
            self._torch.set_num_threads(threads)

    def _wait(self, device: Device) -> None:
        """Wait until a device has done its work, as accelerators work asynchronously."""
        wait = getattr(getattr(self._torch, device.kind, None), "synchronize", None)
        if wait is not None and device != CPU:
            with suppress(NotImplementedError):
                wait(*(() if device.index is None else (device.index,)))
