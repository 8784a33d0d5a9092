"""Cuts a list of layers into consecutive stages optimally, by dynamic programming over the first layer of each stage.

A stage's figures are matrices: the entry at `[first, last]` is that of the layers from `first` to `last`, both
included. All are integers, so that results are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Costs: TypeAlias = NDArray[np.int64]
    Mask: TypeAlias = NDArray[np.bool_]

NEVER = 2**60
"""Larger than any sum of costs, each of which is at most a thousandth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The first layer of each stage, the time of all stages one after another, and the time of the slowest."""

    starts: tuple[int, ...]
    total: int
    slowest: int

    def objective(self, batches: int) -> int:
        """Return the time between two steps of one batch, with this many batches in flight."""
        return max(self.total, batches * self.slowest)


def best_cut(costs: Sequence[Costs], allowed: Sequence[Mask], batches: int) -> Cut | None:
    """Return the cut with the least time between two steps of a batch, with this many in flight; `None` if there is
    none.

    A batch passes through all stages, and waits at the slowest one for the other batches. So its step takes the sum of
    all stages, or the time of the slowest stage for every batch, if that is longer. For each limit on the slowest
    stage, the least sum is found; it falls as the limit rises, so that the best limit is where the two are equal.

    Args:
        costs: the time of each stage, by its first and last layer.
        allowed: the layers that each stage may have.
        batches: the number of batches in flight.

    Example:
        >>> layers = np.arange(4)
        >>> even = layers[None, :] - layers[:, None] + 1
        >>> best_cut([even, 3 * even], [even > 0, even > 0], batches=2).starts
        (0, 3)
    """
    distinct = {(id(cost), id(mask)): cost[mask] for cost, mask in zip(costs, allowed, strict=True)}
    steps = [int(step) for step in np.unique(np.concatenate(list(distinct.values())))]
    if not steps or least_total(costs, allowed, steps[-1]) is None:
        return None
    low, high = 0, len(steps) - 1
    while low < high:  # the first limit whose sum is no more than the time of the slowest stage for all batches
        middle = (low + high) // 2
        cut = least_total(costs, allowed, steps[middle])
        if cut is not None and cut.total <= batches * steps[middle]:
            high = middle
        else:
            low = middle + 1
    cuts = [least_total(costs, allowed, steps[place]) for place in (low, low - 1) if place >= 0]
    return min((cut for cut in cuts if cut is not None), key=lambda cut: cut.objective(batches))


def least_total(costs: Sequence[Costs], allowed: Sequence[Mask], most: int) -> Cut | None:
    """Return the cut with the least sum, and no stage above `most`; of several, the one with early cuts."""
    count = costs[0].shape[0]
    sums = np.full(count + 1, NEVER, dtype=np.int64)
    sums[0] = 0
    chosen: list[NDArray[np.int64]] = []
    possible: dict[tuple[int, int], Costs] = {}
    for cost, mask in zip(costs, allowed, strict=True):
        key = (id(cost), id(mask))  # equal stages share their matrices
        if key not in possible:
            possible[key] = np.where(mask & (cost <= most), cost, NEVER)
        # The costs of a stage from a row's layer to a column's, with the best stages before it.
        reached = sums[:count, None] + possible[key]
        chosen.append(reached.argmin(axis=0))
        sums = np.full(count + 1, NEVER, dtype=np.int64)
        sums[1:] = np.minimum(reached.min(axis=0), NEVER)
    if sums[count] >= NEVER:
        return None
    starts: list[int] = []
    end = count
    for before in reversed(chosen):
        end = int(before[end - 1])
        starts.append(end)
    starts.reverse()
    ends = [*starts[1:], count]
    taken = [int(cost[start, end - 1]) for cost, start, end in zip(costs, starts, ends, strict=True)]
    return Cut(starts=tuple(starts), total=sum(taken), slowest=max(taken))


def between(values: Sequence[int]) -> Costs:
    """Return the sums of consecutive values, by the first and the last of them; 0 for empty ranges."""
    count = len(values)
    ends = np.concatenate([[0], np.cumsum(np.array(values, dtype=np.int64))])
    sums = ends[None, 1:] - ends[:count, None]
    result: Costs = np.where(forward(count), sums, 0)
    return result


def largest_between(values: Sequence[int]) -> Costs:
    """Return the largest of consecutive values, by the first and the last of them; 0 for empty ranges."""
    count = len(values)
    rows = [np.maximum.accumulate(np.array(values[start:], dtype=np.int64)) for start in range(count)]
    largest = np.zeros((count, count), dtype=np.int64)
    for start, row in enumerate(rows):
        largest[start, start:] = row
    return largest


def forward(count: int) -> Mask:
    """Return the mask of stages that have a layer: those whose last is not before their first."""
    numbers = np.arange(count)
    result: Mask = numbers[None, :] >= numbers[:, None]
    return result
