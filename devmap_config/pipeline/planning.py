"""Searches for the best pipeline: its devices, and the layers of each; exact and deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING

from devmap_config.pipeline.cuts import NEVER, Cut, best_cut, forward, least_total
from devmap_config.pipeline.problem import bounds_of
from devmap_config.pipeline.slots import MOST_CHOICES, choices

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from devmap_config.pipeline.cuts import Costs, Mask
    from devmap_config.pipeline.problem import PipelineProblem
    from devmap_config.pipeline.slots import Slot

WITHIN = 100
"""Among plans within a hundredth of the fastest, the one with the largest cache is chosen."""


class TooManyChoicesError(ValueError):
    """There are too many ways to choose the devices of a pipeline."""


@dataclass(frozen=True)
class StagePlacement:
    """The devices and layers of the stages, with the times of a request and the size of the cache."""

    slots: tuple[Slot, ...]
    bounds: tuple[tuple[int, int], ...]
    objective: int
    blocks: int
    tokens: int


@dataclass(frozen=True)
class PipelineCandidate:
    """A choice of devices for the stages of a pipeline."""

    problem: PipelineProblem
    slots: tuple[Slot, ...]

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.slots)

    @cached_property
    def needed_blocks(self) -> int:
        """The cache blocks of all requests in flight."""
        return self.problem.needed_blocks(self.stages)

    @cached_property
    def most_blocks(self) -> int:
        """The most blocks that any stage has room for."""
        return max(int(room.max()) for room in self._rooms)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks of a cache of this many tokens."""
        return -(-tokens * self.problem.blocks_per_request(self.stages) // self.problem.context_length)

    def best(self, blocks: int) -> StagePlacement | None:
        """Return the fastest cut with room for this many cache blocks; `None` if there is none."""
        cut = best_cut(self._costs, self._allowed(blocks), self._batches)
        return None if cut is None else self._place(cut)

    def within(self, blocks: int, budget: int | None) -> Cut | None:
        """Return a cut with room for this many cache blocks that takes no longer than the budget."""
        if budget is None:
            return least_total(self._costs, self._allowed(blocks), NEVER - 1)
        cut = least_total(self._costs, self._allowed(blocks), budget // self._batches)
        return cut if cut is not None and cut.total <= budget else None

    def _allowed(self, blocks: int) -> Sequence[Mask]:
        blocks = min(blocks, NEVER)
        known: dict[tuple[int, int], Mask] = {}
        for mask, room in zip(self._masks, self._rooms, strict=True):
            key = (id(mask), id(room))
            if key not in known:
                known[key] = mask & forward(len(self.problem.layers.paths)) & (room >= blocks)
        return [known[id(mask), id(room)] for mask, room in zip(self._masks, self._rooms, strict=True)]

    def _place(self, cut: Cut) -> StagePlacement:
        bounds = bounds_of(cut.starts, len(self.problem.layers.paths))
        blocks = min(int(room[bound]) for room, bound in zip(self._rooms, bounds, strict=True))
        return StagePlacement(
            slots=self.slots,
            bounds=tuple(bounds),
            objective=cut.objective(self._batches),
            blocks=blocks,
            tokens=blocks * self.problem.context_length // self.problem.blocks_per_request(self.stages),
        )

    @property
    def _batches(self) -> int:
        return self.problem.batches(self.stages)

    @cached_property
    def _costs(self) -> list[Costs]:
        return self.problem.costs(self.slots)

    @cached_property
    def _masks(self) -> Sequence[Mask]:
        return self.problem.allowed(self.slots)

    @cached_property
    def _rooms(self) -> list[Costs]:
        return self.problem.rooms(self.slots)


def best_place(
    problem: PipelineProblem, *, prefers_cache: bool, prefers_few_devices: bool = False
) -> StagePlacement | None:
    """Return the best stages in which all requests fit; `None` if there are none.

    The fastest is the one with the least time between two tokens of a request: with one request, the sum of all stages;
    with one for each stage, the time of the slowest times the number of stages. Within a hundredth of the fastest, the
    largest cache wins, then the fewest devices.

    Args:
        problem: the problem to solve.
        prefers_cache: whether a large cache matters more than speed.
        prefers_few_devices: whether few devices matter more than both.

    Raises:
        TooManyChoicesError: if there are too many ways to choose devices, or to order them and none was found.
    """
    candidates, are_all = _candidates(problem)
    counts = sorted({candidate.stages for candidate in candidates}) if prefers_few_devices else []  # all as large
    alternatives = [[each for each in candidates if each.stages == count] for count in counts] or [candidates]
    found = (_best_of(alternative, prefers_cache=prefers_cache) for alternative in alternatives)
    place = next((place for place in found if place is not None), None)
    if place is None and not are_all:
        raise TooManyChoicesError
    return place


def _best_of(candidates: Sequence[PipelineCandidate], *, prefers_cache: bool) -> StagePlacement | None:
    if prefers_cache:
        fitting = [candidate for candidate in candidates if candidate.within(candidate.needed_blocks, None) is not None]
        return _widest(fitting, None)
    least: int | None = None
    near: list[tuple[PipelineCandidate, int]] = []
    for candidate in candidates:
        # A candidate that is slower than the best so far is not searched further.
        if least is not None and candidate.within(candidate.needed_blocks, _with_slack(least)) is None:
            continue
        place = candidate.best(candidate.needed_blocks)
        if place is not None:
            near.append((candidate, place.objective))
            least = place.objective if least is None else min(least, place.objective)
    if least is None:
        return None
    budget = _with_slack(least)
    return _widest((candidate for candidate, objective in near if objective <= budget), budget)


def tries_all_orders(problem: PipelineProblem) -> bool:
    """Return whether all orders of the devices are searched."""
    return _candidates(problem)[1]


def widest_place(problem: PipelineProblem) -> StagePlacement | None:
    """Return the stages with the largest cache, even if not all requests fit; `None` if the weights do not."""
    return _widest(
        (candidate for candidate in _candidates(problem)[0] if candidate.within(0, None) is not None), None, needed=0
    )


def _with_slack(least: int) -> int:
    return least + least // WITHIN


def _candidates(problem: PipelineProblem) -> tuple[list[PipelineCandidate], bool]:
    """Return the candidates, each choice first in the given order, and whether these are all orders.

    Raises:
        TooManyChoicesError: if there are too many choices, even with one order each.
    """
    layers = len(problem.layers.paths)
    found = choices(problem.slots, problem.needed, problem.distinct, problem.inventory.links, layers)
    chosen = list(islice(found, MOST_CHOICES + 1))
    if len(chosen) > MOST_CHOICES:
        raise TooManyChoicesError
    others = _in_turn([islice(problem.orders(slots), 1, None) for slots in chosen])
    looked_at = list(islice(chain(chosen, others), MOST_CHOICES + 1))
    candidates = [PipelineCandidate(problem, slots) for slots in looked_at[:MOST_CHOICES]]
    return candidates, len(looked_at) == len(candidates)


def _in_turn(several: Sequence[Iterator[tuple[Slot, ...]]]) -> Iterator[tuple[Slot, ...]]:
    """Yield the first item of each iterator, then the second of each, until all are exhausted."""
    while several:
        heads = [(iterator, next(iterator, None)) for iterator in several]
        yield from (order for _, order in heads if order is not None)
        several = [iterator for iterator, order in heads if order is not None]


def _widest(
    candidates: Iterable[PipelineCandidate], budget: int | None, needed: int | None = None
) -> StagePlacement | None:
    """Return the cut with the largest cache within the budget; of several, the one on the fewest devices."""
    best: StagePlacement | None = None
    for candidate in sorted(candidates, key=lambda placement: placement.stages):
        low = candidate.needed_blocks if needed is None else needed
        if best is not None:
            low = max(low, candidate.blocks_for(best.tokens + 1))
        if candidate.within(low, budget) is None:
            continue
        high = max(candidate.most_blocks, low)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if candidate.within(middle, budget) is None else (middle, high)
        best = candidate.best(low) or best
    return best
