"""The streams of an accelerator on which copies are late, to see that whatever must wait for them does.

Copies arrive as late as they may, and until then what is in a slot is poison. What is computed is computed at once; a
copy that may begin before what computes with the slot has ended is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


class LateCopies:
    """The two streams of an accelerator, which is late with copies and computes at once.

    `computed` counts what was computed, and `used` says of a slot when that was last done with it; `after` is how much
    of it is done before copies begin that are given from now on.
    """

    def __init__(self):
        self.computing = self.copying = self
        self.copies, self.used, self.computed, self.after = [], {}, 0, 0

    def wait_event(self, event):
        for copy in self.copies[:event]:
            copy.arrive()

    def wait_stream(self, _stream):
        self.after = self.computed

    def record_event(self):
        return len(self.copies)

    def copy(self, source, target):
        assert self.after >= self.used.get(target.data_ptr(), 0), "it may overwrite what is computed with"
        target.fill_(POISON)
        self.copies.append(Copy(source, target))

    def watch(self, module):
        """Note with which slots a module computes; accelerate's hook has it called where its weights are there."""
        forward = module._old_forward

        def compute(*arguments, **options):
            output = forward(*arguments, **options)
            self.compute_with(module)
            return output

        module._old_forward = compute

    def compute_with(self, module):
        self.computed += 1
        for copy in self.copies:
            start = copy.target.data_ptr()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if start <= tensor.data_ptr() < start + copy.target.nbytes:
                    self.used[start] = self.computed
