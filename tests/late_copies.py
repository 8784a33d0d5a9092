"""The streams of an accelerator on which copies are late, to see that whatever must wait for them does.

Copies arrive as late as they may, and until then what is in a slot is poison. What is computed is computed at once; a
copy that may begin before what computes with the slot has ended is an error.
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
    """`position` says how far it was told to come, `waits` that it goes on only once another has come so far."""

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
    """The two streams of an accelerator, which is late with copies and computes at once.

    `computed` counts what was computed, and `used` says of memory when that was last done with it; `after` is how much
    of it is done before copies begin that are given from now on.
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
        """Note with what memory a module computes; accelerate's hook has it called where its weights are there."""
        module._old_forward = partial(self.compute, module, module._old_forward)

    def compute(self, module, forward, *arguments, **options):
        output = forward(*arguments, **options)
        self.computed += 1
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            self.used[tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes] = self.computed
        return output
