"""Cuts a list of layers into consecutive stages, exactly: dynamic programming over where each stage begins.

A stage's figures are matrices: at `[first, last]` that of the layers from `first` to `last`, both included. All are
integers, so that answers are the same everywhere.
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
"""More than any sum of costs: costs are at most a thousandth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The first layer of each stage, the time of all stages one after another, and the time of the slowest."""

    starts: tuple[int, ...]
    total: int
    slowest: int

    def objective(self, batches: int) -> int:
        """Return what passes between two steps of one batch, of so many that are under way at once."""
        return max(self.total, batches * self.slowest)


def best_cut(costs: Sequence[Costs], allowed: Sequence[Mask], batches: int) -> Cut | None:
    """Return the cut by which one of so many batches in flight waits least for its next step; `None` if none may be.

    A batch goes through all stages, and through the slowest one only when the others have: so its step takes what all
    stages do together, or what the slowest one does for every batch, if that is longer. Under each bound of the
    slowest, the least sum is found; it falls as the bound rises, so that the best bound is where the two meet.

    Args:
        costs: of each stage, by its first and last layer, what it takes.
        allowed: of each stage, which layers it may have.
        batches: how many are in flight.

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
    while low < high:  # the first bound whose sum is no more than what the batches wait for each other
        middle = (low + high) // 2
        cut = least_total(costs, allowed, steps[middle])
        if cut is not None and cut.total <= batches * steps[middle]:
            high = middle
        else:
            low = middle + 1
    found = [least_total(costs, allowed, steps[place]) for place in (low, low - 1) if place >= 0]
    return min((cut for cut in found if cut is not None), key=lambda cut: cut.objective(batches))


def least_total(costs: Sequence[Costs], allowed: Sequence[Mask], most: int) -> Cut | None:
    """Return the cut that takes least in all, none of its stages more than `most`; of several, that of early cuts."""
    count = costs[0].shape[0]
    sums = np.full(count + 1, NEVER, dtype=np.int64)
    sums[0] = 0
    chosen: list[NDArray[np.int64]] = []
    possible: dict[tuple[int, int], Costs] = {}
    for cost, mask in zip(costs, allowed, strict=True):
        key = (id(cost), id(mask))  # equal stages share their matrices
        if key not in possible:
            possible[key] = np.where(mask & (cost <= most), cost, NEVER)
        # Of a stage that begins at a row's layer and ends with a column's, with the best stages before it.
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
    """Return the sums of consecutive values, by the first and the last of them; 0 where these are none."""
    count = len(values)
    ends = np.concatenate([[0], np.cumsum(np.array(values, dtype=np.int64))])
    sums = ends[None, 1:] - ends[:count, None]
    result: Costs = np.where(forward(count), sums, 0)
    return result


def largest_between(values: Sequence[int]) -> Costs:
    """Return the largest of consecutive values, likewise."""
    count = len(values)
    rows = [np.maximum.accumulate(np.array(values[start:], dtype=np.int64)) for start in range(count)]
    largest = np.zeros((count, count), dtype=np.int64)
    for start, row in enumerate(rows):
        largest[start, start:] = row
    return largest


def forward(count: int) -> Mask:
    """Return which stages have a layer: those whose last is not before their first."""
    numbers = np.arange(count)
    result: Mask = numbers[None, :] >= numbers[:, None]
    return result
