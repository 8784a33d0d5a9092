"""Finds the fastest choice for a chain of blocks, and proves how near to the best possible it is.

- *Small problems* are searched whole (`_search`): the choice is the optimum.
- *A choice* cuts the chain into a run for each device (`runs`), for several orders of the devices.
- *The bound* forgets the order: `counting` finds the best numbers of blocks of each class for every option, exactly.
  Where they are better than the choice by more than hops, they are laid out along the chain (`_laid_out`), and are the
  choice.

Order costs only hops, which are small beside blocks: the two meet, mostly within a thousandth.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import TYPE_CHECKING

from devmap_config.placement.classes import Classes, as_in, at, settled_ways
from devmap_config.placement.counting import Counted, count_blocks, good_numbers
from devmap_config.placement.packing import Packing
from devmap_config.placement.prices import find_prices
from devmap_config.placement.runs import in_runs, orders
from devmap_config.placement.similar import SimilarClasses

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.placement.chain import Chain, Choice, Gift, Option
    from devmap_config.placement.prices import Prices
    from devmap_config.placement.problem import DeviceId

SEARCHED_CHOICES = 200_000
"""Up to so many choices, all of them are searched."""

FIRST_ATTEMPTS = 6
"""So many ways to settle groups and to order devices are tried before blocks are counted."""

LATER_ATTEMPTS = 12
"""And so many afterwards."""

WORTH_TRYING = 200
"""But no more of them once the best choice is above the bound by at most this part, a two-hundredth."""

PROVEN_GAP = 600
"""Numbers are looked for that are better than the best choice by more than this part, a six-hundredth."""

ACCEPTED_GAP = 10_000
"""A choice that is above the bound by at most this part, a ten-thousandth, is good enough."""

FIRST_REACH = 256
"""The best numbers are first looked for up to this part, a 256th, above what prices say, then further."""

NEARER_REACHES = 2
"""Where that was too far to count, it is tried so often half as far above what is proven."""

FAR_ABOVE = 64
"""Where the best choice is above the bound by more than this part, a 64th, some good numbers are looked for first."""

MOST_CLASSES = 16
"""Where there are more classes of blocks, those that are nearly alike are joined."""

IMPROVING_PASSES = 8
"""So often at most single blocks are moved to where they are faster."""

UNREACHABLE = 2**62


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, what it takes, and what no choice can be below."""

    choice: Choice
    nanoseconds: int
    bound_nanoseconds: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fastest choice that was found, if any, and what no choice can be below."""

    solution: Solution | None
    bound_nanoseconds: int


def solve(chain: Chain) -> Solution | None:
    """The fastest feasible choice that was found and a proven bound, or `None` where there is none."""
    return solve_below(chain, UNREACHABLE).solution


def solve_below(chain: Chain, at_most: int) -> Outcome:
    """The fastest choice, of which it matters only whether it is below `at_most`: above that, there is no bound.

    Among equal choices the first in the order of devices wins, so that the answer never changes without a reason; the
    order of options does not matter.
    """
    ordered = _ordered(chain)
    if prod(len(block.options) for block in chain.blocks) <= SEARCHED_CHOICES:
        choice = _search(ordered)
        bound = UNREACHABLE if choice is None else chain.nanoseconds(as_in(chain, ordered, choice))
    else:
        choice, bound = _found(ordered, at_most)
    if choice is None:
        return Outcome(None, bound)
    choice = as_in(chain, ordered, choice)
    return Outcome(Solution(choice, chain.nanoseconds(choice), bound), bound)


def _ordered(chain: Chain) -> Chain:
    """The chain with the options of every block in an order that depends on nothing but what they are."""
    places = {device: place for place, device in enumerate(chain.capacities)}
    known: dict[tuple[Option, ...], tuple[Option, ...]] = {}

    def order(option: Option) -> tuple[object, ...]:
        sizes = (option.demands, option.peaks, option.pieces)
        return (places.get(option.home, len(places)), option.home, option.nanoseconds, option.mode, *map(sorted, sizes))

    for block in chain.blocks:
        if block.options not in known:
            known[block.options] = tuple(sorted(block.options, key=order))
    return replace(chain, blocks=tuple(replace(block, options=known[block.options]) for block in chain.blocks))


def _found(chain: Chain, at_most: int) -> tuple[Choice | None, int]:
    """The fastest choice that was found, and what none can be below."""
    bound = sum(min(option.nanoseconds for option in block.options) for block in chain.blocks)
    if bound >= at_most:
        return None, at_most
    settled = settled_ways(chain)
    first = list(islice(settled, 1))
    best = _best_in_runs(chain, None, islice(_attempts(map(_Way, first)), 1), bound, at_most)
    if not _is_near(best, bound):
        ways = _priced([*first, *settled], _to_beat(best, at_most))
        bound = min((way.bound_nanoseconds for way in ways), default=UNREACHABLE)
        attempts = _attempts(ways)
        best = _best_in_runs(chain, best, islice(attempts, FIRST_ATTEMPTS), bound, at_most)
        if not _is_near(best, bound):
            bound, best = _counted(chain, ways, best, at_most)
        if bound < at_most and not _is_near(best, bound, WORTH_TRYING):
            best = _best_in_runs(chain, best, islice(attempts, LATER_ATTEMPTS), bound, at_most)
    return None if best is None else _improved(chain, best[1]), bound


_Found = tuple[int, "Choice"] | None
_Attempt = tuple["_Way", tuple["DeviceId", ...], "Mapping[DeviceId, Packing]"]


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to settle groups, and what room is worth then, where that is known."""

    settled: Chain
    prices: Prices | None = None


def _is_near(best: _Found, bound: int, part: int = ACCEPTED_GAP) -> bool:
    return best is not None and (best[0] - bound) * part <= bound


def _attempts(ways: Iterable[_Way]) -> Iterator[_Attempt]:
    """Ways to settle groups and to order the devices."""
    for way in ways:
        classes = Classes(way.settled)
        packings = {device: Packing(classes, device) for device in way.settled.devices}
        for order in orders(way.settled):
            yield way, order, packings


def _best_in_runs(chain: Chain, best: _Found, attempts: Iterator[_Attempt], bound: int, at_most: int) -> _Found:
    """The best of the best and of what cuts the chain into runs, until one is good enough, or there is none."""
    while bound < UNREACHABLE and not _is_near(best, bound) and (attempt := next(attempts, None)) is not None:
        way, order, packings = attempt
        found = in_runs(way.settled, order, packings, at_most if best is None else min(at_most, best[0]), way.prices)
        best = _better(chain, best, None if found is None else as_in(chain, way.settled, found))
    return best


def _better(chain: Chain, best: _Found, choice: Choice | None) -> _Found:
    """The better of the best and a choice, which is made feasible first."""
    if choice is None or (best is not None and chain.nanoseconds(choice) > best[0]):
        return best  # what is kept elsewhere is only slower
    feasible = _within_stores(chain, choice)
    if feasible is None:
        return best
    candidate = (chain.nanoseconds(feasible), feasible)
    return candidate if best is None or candidate < best else best


@dataclass(frozen=True, slots=True)
class _PricedWay(_Way):
    prices: Prices

    @property
    def bound_nanoseconds(self) -> int:
        return self.prices.bound_nanoseconds


def _priced(settled_ways: Iterable[Chain], to_beat: int) -> list[_PricedWay]:
    """The ways to settle groups under which it may fit, the most promising first."""
    found = []
    for settled in settled_ways:
        prices = find_prices(_classes(settled), min(to_beat, _slowest(settled) + 1))
        if prices is not None:
            found.append(_PricedWay(settled, prices))
    return sorted(found, key=lambda way: way.bound_nanoseconds)


def _counted(chain: Chain, ways: list[_PricedWay], best: _Found, at_most: int) -> tuple[int, _Found]:
    """The least that any way to settle groups takes, and the best choice by the numbers that were met."""
    bound = UNREACHABLE
    for way in ways:
        least = way.bound_nanoseconds
        if least < _to_beat(best, at_most):
            if not _is_near(best, least, FAR_ABOVE):  # the better what is known, the less is counted
                below = min(_to_beat(best, at_most), _slowest(way.settled) + 1)
                good = good_numbers(_classes(way.settled), way.prices, below)
                best = _better(chain, best, None if good is None else _numbers_in(chain, way, good))
            counted = _counted_settled(way, _to_beat(best, at_most))
            if counted.numbers is not None:
                best = _better(chain, best, _numbers_in(chain, way, counted.numbers))
            least = counted.nanoseconds
        bound = min(bound, least)
    return bound, best


def _numbers_in(chain: Chain, way: _Way, numbers: Mapping[tuple[int, int], int]) -> Choice:
    return as_in(chain, way.settled, _laid_out(_classes(way.settled), numbers))


def _classes(settled: Chain) -> Classes:
    classes = Classes(settled)
    return classes if len(classes.members) <= MOST_CLASSES else SimilarClasses(settled)


def _to_beat(best: _Found, at_most: int) -> int:
    """Whatever is not below this is not looked at."""
    return at_most if best is None else min(at_most, best[0] - best[0] // PROVEN_GAP)


def _slowest(chain: Chain) -> int:
    return sum(max(option.nanoseconds for option in block.options) for block in chain.blocks)


def _counted_settled(way: _PricedWay, below: int) -> Counted:
    """The best numbers, looked for not far above what prices say first: where there are some, others go sooner."""
    classes, slowest = _classes(way.settled), _slowest(way.settled)
    bound = way.bound_nanoseconds
    reach = min(bound + bound // FIRST_REACH, slowest) + 1
    too_far: int | None = None
    nearer = 0
    while True:
        reach = min(reach, below)
        counted = count_blocks(classes, way.prices, reach)
        if counted is not None and (counted.numbers is not None or reach == below):
            return counted
        if counted is not None and reach > slowest:
            return Counted(UNREACHABLE)
        if counted is None:
            too_far = reach
        else:
            bound = counted.nanoseconds
        if too_far is not None:
            nearer += 1
            if nearer > NEARER_REACHES:
                return Counted(bound)
            reach = (bound + too_far) // 2
        else:
            reach = min(reach + 3 * (reach - way.bound_nanoseconds), slowest + 1)


def _laid_out(classes: Classes, numbers: Mapping[tuple[int, int], int]) -> Choice:
    """Numbers along the chain: as long as there are any, a block runs where the one before does."""
    waiting = dict(numbers)
    chosen: list[int] = []
    home: DeviceId | None = None
    for position, block in enumerate(classes.chain.blocks):
        index = 0
        number = classes.class_of.get(position)
        if number is not None:
            left = Counter[str]()
            for (kind, each), count in waiting.items():
                left[classes.options(kind)[each].home] += count
            ways = [each for each in range(len(block.options)) if waiting.get((number, each), 0)]
            index = min(
                ways, key=lambda each: (block.options[each].home != home, -left[block.options[each].home], each)
            )
            waiting[number, index] -= 1
        chosen.append(index)
        home = block.options[index].home
    return tuple(chosen)


def _within_stores(chain: Chain, choice: Choice) -> Choice | None:
    """The choice made feasible where too much is kept on a store: blocks kept in other ways, the cheapest first."""
    kept = list(choice)
    for _ in range(4 * len(kept)):
        used = chain.used_bytes(tuple(kept))
        room = {
            device: chain.capacities.get(device, 0) - used.get(device, 0) for device in {**chain.capacities, **used}
        }
        full = next((device for device, size_bytes in room.items() if size_bytes < 0), None)
        if full is None:
            return tuple(kept) if chain.is_feasible(tuple(kept)) else None  # else a group is apart
        first_of = {  # blocks with the same options that are kept alike are alike
            (id(block.options), kept[position]): position
            for position, block in reversed(list(enumerate(chain.blocks)))
            if block.group is None
        }
        ways = []
        for position in first_of.values():
            options = chain.blocks[position].options
            now = options[kept[position]]
            for index, option in enumerate(options):
                if option.home != now.home:
                    continue
                saved = at(now.demands, full) - at(option.demands, full)
                added = ((device, size - at(now.demands, device)) for device, size in option.demands)
                if saved > 0 and all(size <= max(room.get(device, 0), 0) for device, size in added if device != full):
                    ways.append(((option.nanoseconds - now.nanoseconds) / saved, position, index))
        if not ways:
            return None
        _, position, index = min(ways)
        kept[position] = index
    return None


def _search(chain: Chain) -> Choice | None:
    """Every choice, block by block, but those that cannot be better than the best so far."""
    blocks = chain.blocks
    cheapest = [min((option.nanoseconds for option in block.options), default=0) for block in blocks]
    remaining = [sum(cheapest[position:]) for position in range(len(blocks) + 1)]
    best_nanoseconds = UNREACHABLE
    best: Choice | None = None
    gifts: dict[int, list[Gift]] = {}  # by the later of the two blocks
    for gift in chain.gifts:
        gifts.setdefault(max(gift.maker, gift.reader), []).append(gift)
    places: dict[int, tuple[str, ...]] = {}
    demands: Counter[DeviceId] = Counter()

    def visit(position: int, taken: list[int], nanoseconds: int, before: DeviceId | None) -> None:
        nonlocal best, best_nanoseconds
        if nanoseconds + remaining[position] >= best_nanoseconds:
            return
        if position == len(blocks):
            choice = tuple(taken)
            if chain.is_feasible(choice):
                best, best_nanoseconds = choice, nanoseconds
            return
        block = blocks[position]
        entering = chain.entering[position]
        ways = []
        for index, option in enumerate(block.options):
            hop = 0 if before is None else entering.get((before, option.home), 0)
            for gift in gifts.get(position, ()):
                if gift.maker == position:
                    hop += gift.hops.get((option.home, blocks[gift.reader].options[taken[gift.reader]].home), 0)
                else:
                    hop += gift.hops.get((blocks[gift.maker].options[taken[gift.maker]].home, option.home), 0)
            ways.append((option.nanoseconds + hop, index, option))
        for cost, index, option in sorted(ways, key=lambda way: way[:2]):
            if block.group is not None and places.get(block.group, option.place) != option.place:
                continue
            if any(demands[device] + size > chain.capacities.get(device, 0) for device, size in option.demands):
                continue
            is_first = block.group is not None and block.group not in places
            if is_first and block.group is not None:
                places[block.group] = option.place
            for device, size in option.demands:
                demands[device] += size
            taken.append(index)
            visit(position + 1, taken, nanoseconds + cost, option.home)
            taken.pop()
            for device, size in option.demands:
                demands[device] -= size
            if is_first and block.group is not None:
                del places[block.group]

    visit(0, [], 0, None)
    return best


def _improved(chain: Chain, choice: Choice) -> Choice:
    """The choice with single blocks moved to where a neighbour runs, as long as that makes it faster."""
    best = list(choice)

    def homes_around(position: int) -> tuple[DeviceId | None, DeviceId | None]:
        before = chain.blocks[position - 1].options[best[position - 1]].home if position else None
        is_last = position == len(best) - 1
        after = None if is_last else chain.blocks[position + 1].options[best[position + 1]].home
        return before, after

    def local_nanoseconds(position: int, option: Option) -> int:
        before, after = homes_around(position)
        hop_in = 0 if before is None else chain.entering[position].get((before, option.home), 0)
        hop_out = 0 if after is None else chain.entering[position + 1].get((option.home, after), 0)
        return option.nanoseconds + hop_in + hop_out

    for _ in range(IMPROVING_PASSES):
        before = list(best)
        for position, block in enumerate(chain.blocks):
            if len(block.options) == 1 or block.group is not None:
                continue
            now = local_nanoseconds(position, block.options[best[position]])
            here = (*homes_around(position), block.options[best[position]].home)
            for index, option in enumerate(block.options):
                if index == best[position] or option.home not in here:
                    continue
                if (faster := local_nanoseconds(position, option)) < now:
                    changed = [*best[:position], index, *best[position + 1 :]]
                    is_faster = not chain.gifts or chain.nanoseconds(tuple(changed)) < chain.nanoseconds(tuple(best))
                    if is_faster and chain.is_feasible(tuple(changed)):
                        best, now = changed, faster
        if best == before:
            break
    return tuple(best)
