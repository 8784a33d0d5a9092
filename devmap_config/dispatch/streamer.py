"""Copies loads to the two slots of an accelerator ahead of their use, while it computes with the other slot.

The order of loads is learnt as the model runs. Nothing here depends on modules' hooks: `dispatch/streamed_weights.py`
reports when a module begins and ends. Weights on disk are read by a thread into pinned memory, and copied from there.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from devmap_config.dispatch.loads import Load


class StreamEvent(Protocol):
    """An event that a stream's work up to some point is done."""

    def synchronize(self) -> None:
        """Wait for the event."""


class Stream(Protocol):
    """The part of torch's streams that is used here: work is done in order, and may wait for events of other
    streams.
    """

    def wait_event(self, event: Any) -> None:
        """Let later work of this stream wait for the event."""

    def record_event(self) -> Any:
        """Return an event for the end of the work up to now."""


class Streams(Protocol):
    """The two streams of an accelerator: one for copying, one for computing."""

    copying: Stream

    @property
    def computing(self) -> Stream:
        """The stream that modules are run in."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy in the copying stream, and return at once."""


class CudaStreams:
    """The streams of a CUDA (or ROCm) card."""

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


@dataclass(eq=False)
class Slot:
    """Memory of an accelerator that takes one load after another.

    `copied` waits until the load has been read, and returns the event of its arrival; `running` are the modules that
    compute with it now.
    """

    memory: torch.Tensor
    load: Load | None = None
    copied: Callable[[], Any] = field(default=lambda: None)
    running: set[torch.nn.Module] = field(default_factory=set)


class ReaderThread:
    """A thread that reads loads from disk one after another, and copies each to its slot.

    It has pinned memory for two loads: one is read while the one before is copied.
    """

    def __init__(self, streams: Streams, staging: Iterable[NDArray[np.uint8]]) -> None:
        self._streams = streams
        self._staging: deque[tuple[NDArray[np.uint8], StreamEvent | None]] = deque((memory, None) for memory in staging)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="devmap-read-ahead")

    def fetch(self, load: Load, target: torch.Tensor, computed: StreamEvent) -> Callable[[], StreamEvent]:
        """Read a load and copy it after an event; return at once, with a function that waits for the event of its
        arrival.
        """
        return self._thread.submit(self._fetch, load, target, computed).result

    def _fetch(self, load: Load, target: torch.Tensor, computed: StreamEvent) -> StreamEvent:
        memory, copied = self._staging.popleft()
        try:
            if copied is not None:
                copied.synchronize()  # an earlier load may still be copied from this memory
            copied = None
            copies = load.copies(target, memory)
            copied = event = _copy(copies, self._streams, after=computed)
        finally:
            self._staging.append((memory, copied))
        return event


def _copy(copies: Iterable[tuple[torch.Tensor, torch.Tensor]], streams: Streams, after: StreamEvent) -> StreamEvent:
    """Copy after an event, and return the event of its end."""
    streams.copying.wait_event(after)
    for source, target in copies:
        streams.copy(source, target)
    event: StreamEvent = streams.copying.record_event()
    return event


class Streamer:
    """Copies loads to the slots of an accelerator ahead of their use.

    The order of loads is learnt as the model runs; initially it is that of `loads`, in a circle. Nothing here waits for
    the accelerator, whose streams wait for each other's events; only reading from disk is waited for.
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
        """Return the weights of a module that begins, ready for work that is queued from now on.

        If modules of both slots are running around this one, its weights are copied to a slot of its own.

        Raises:
            OSError: if they cannot be read.
        """
        slot = self._slot_of(load)
        if slot is None:
            slot = next((slot for slot in self._slots if not slot.running), None)
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
        """Have the next load copied to the other slot, if no module is running with that."""
        if self._last is not None:
            self._next[self._last[0]] = load
        self._last = module, load
        following = self._next[module]
        other = next(slot for slot in self._slots if slot.load is not load)
        if self._slot_of(following) is None and not other.running:
            self._fetch(following, other)

    def _slot_of(self, load: Load) -> Slot | None:
        return next((slot for slot in self._slots if slot.load is load), None)

    def _fetch(self, load: Load, slot: Slot) -> None:
        with suppress(OSError):
            slot.copied()  # an earlier load may still be being read
        slot.load = None  # until the next load is known to be there
        # Work that was queued until now may read the slot; later work does not.
        computed = self._streams.computing.record_event()
        if load.memory is None:
            slot.copied = self._reader.fetch(load, slot.memory, computed)
        else:
            event = _copy(load.copies(slot.memory, None), self._streams, after=computed)
            slot.copied = lambda: event
        slot.load = load
