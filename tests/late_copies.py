"""Simulated streams of an accelerator whose copies are late, to test that everything which must wait for a copy does.

A copy arrives as late as it may, and until then its slot holds poison. Computation is immediate; a copy that may begin
before the computation with its slot has ended is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

POISON = 0xFF
"""Four such bytes are not a number."""


@dataclass(eq=False)
class Copy:
    source: torch.Tensor
    target: torch.Tensor
    is_there: bool = False

    def arrive(self):
        if not self.is_there:
            self.target.copy_(self.source)
            self.is_there = True


@dataclass(eq=False)
class Stream:
    """A stream.

    `position` returns how far it has been told to go, `reach` completes it up to a position, and `waits` makes it wait
    for an event.
    """

    position: Callable[[], int]
    reach: Callable[[int], None]
    waits: Callable[[Event], None]

    def record_event(self):
        return Event(self.position(), self.reach)

    def wait_event(self, event):
        self.waits(event)


@dataclass(eq=False)
class Event:
    position: int
    reach: Callable[[int], None]

    def synchronize(self):
        self.reach(self.position)


class LateCopies:
    """The two streams of an accelerator: copies are late, and computation is immediate.

    `computed` counts computations, and `used` tells for each memory when it was last used by one; `after` is the number
    of computations that end before copies issued from now on begin.
    """

    def __init__(self):
        self.copies, self.used, self.computed, self.after = [], {}, 0, 0
        self.computing = Stream(lambda: self.computed, lambda _: None, Event.synchronize)
        self.copying = Stream(lambda: len(self.copies), self.arrive, self.begin_after)

    def arrive(self, count):
        for copy in self.copies[:count]:
            copy.arrive()

    def begin_after(self, event):
        self.after = max(self.after, event.position)

    def copy(self, source, target):
        start, end = target.data_ptr(), target.data_ptr() + target.nbytes
        last = max((when for (first, last), when in self.used.items() if first < end and start < last), default=0)
        assert self.after >= last, "it may overwrite what is computed with"
        target.fill_(POISON)
        self.copies.append(Copy(source, target))

    def watch(self, module):
        """Record the memory that a module computes with; accelerate's hook calls this once the module's weights are in
        place.
        """
        module._old_forward = partial(self.compute, module, module._old_forward)

    def compute(self, module, forward, *arguments, **options):
        output = forward(*arguments, **options)
        self.computed += 1
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self.used[tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes] = self.computed
        return output
