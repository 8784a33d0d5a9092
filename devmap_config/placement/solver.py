"""Finds the fastest choice for a chain of blocks, and proves how near to the best possible it is.

Three parts, each of which is simple for a reason:

- *Small problems* are searched whole (`_search`), with the cheapest completion as a bound: the choice is the optimum.
- *The bound* (`_Counting`) forgets the order. Blocks that have the same options are a class, and a dynamic program over
  devices decides how many of each class every device takes. What a device takes is packed exactly (`_Packing`): which
  of its blocks are streamed, or have a part computed on the CPU. All of it is in integers, so the granularity of
  layers, by which a linear relaxation is off, is in the bound.
- *The choice* (`_contiguous`) cuts the chain into a run for each device, for several orders of the devices, with the
  same packing. Where that leaves a gap, the counts of the dynamic program are a choice too, with more than one run.

Order costs only hops, which are small beside blocks: the two meet, mostly within a thousandth.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, permutations, product
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from devmap_config.placement.chain import Chain, Choice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devmap_config.placement.chain import Bytes, Option
    from devmap_config.placement.problem import DeviceId

SEARCHED_CHOICES = 200_000
"""Up to so many choices, all of them are searched."""

COUNTED_STATES = (1_000_000, 6_000, 1_500)
"""Up to so many combinations of counts, on one, two and more devices, the bound keeps classes apart.

Beyond, the lightest are set free.
"""

ATTEMPTS = 16
"""So many ways to settle groups and to order devices are tried."""

ACCEPTED_GAP = 200
"""Where one run for each device is further from the bound than this part, a two-hundredth, several are tried."""

IMPROVING_PASSES = 8
"""So often at most single blocks are moved to where they are faster."""

JOINING_LOSS = 1000
"""In the bound, classes are joined where that makes it less by at most this part, a thousandth."""

UNREACHABLE = 2**62

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, what it takes, and what no choice can be below."""

    choice: Choice
    nanoseconds: int
    bound_nanoseconds: int


def solve(chain: Chain, *, at_most: int = UNREACHABLE, proves: bool = True) -> Solution | None:
    """The fastest feasible choice that was found and a proven bound, or `None` where there is none below `at_most`.

    Unless it `proves`, the bound is 0 and takes no time. Among equal choices the first in the order of options wins, so
    that the answer never changes without a reason.
    """
    if prod(len(block.options) for block in chain.blocks) <= SEARCHED_CHOICES:
        found = _search(chain)
        return None if found is None else Solution(found, chain.nanoseconds(found), chain.nanoseconds(found))
    fastest = sum(min(option.nanoseconds for option in block.options) for block in chain.blocks)
    if fastest >= at_most:
        return None
    bound = fastest if proves else 0
    best: tuple[int, Choice] | None = None
    for price in _prices(chain):
        priced = _priced(chain, price)
        for settled, order, packings in _attempts(priced):
            known = UNREACHABLE if best is None or price.nanoseconds else best[0]
            found = _contiguous(settled, order, packings, known)
            best = _better(chain, best, None if found is None else _as_in(priced, settled, found))
            if best is not None and best[0] <= fastest:
                return Solution(best[1], best[0], fastest)
        if proves and best is not None:
            known = min(best[0], at_most)
            bound = max(bound, lower_bound(priced, known) - price.of(chain.capacities.get(price.device, 0)))
            if bound >= at_most:
                return None
        if best is None or (proves and (best[0] - bound) * ACCEPTED_GAP > bound):
            for settled in islice(_with_groups_settled(priced), ATTEMPTS):
                found = _Counting(_Classes(settled), optimistic=False).choice()
                best = _better(chain, best, None if found is None else _as_in(priced, settled, found))
    if best is None:
        return None
    improved = _improved(chain, best[1])
    nanoseconds = chain.nanoseconds(improved)
    return Solution(improved, nanoseconds, min(bound, nanoseconds))


def _better(chain: Chain, best: tuple[int, Choice] | None, choice: Choice | None) -> tuple[int, Choice] | None:
    """The better of the best and a choice, which is made feasible first."""
    if choice is None or (best is not None and chain.nanoseconds(choice) > best[0]):
        return best  # what is kept elsewhere is only slower
    feasible = _within_stores(chain, choice)
    if feasible is None:
        return best
    candidate = (chain.nanoseconds(feasible), feasible)
    return candidate if best is None or candidate < best else best


def lower_bound(chain: Chain, known: int) -> int:
    """What no choice can be below: the least of the bounds for each way to settle the groups.

    Ways that take `known` or more in any case are not looked at, and then that is the bound.
    """
    least = UNREACHABLE
    for settled in _with_groups_settled(chain):
        fastest = sum(min(option.nanoseconds for option in block.options) for block in settled.blocks)
        least = min(least, fastest if fastest >= known else _Counting(_SimilarClasses(settled)).bound())
    return least


def _attempts(chain: Chain) -> Iterator[tuple[Chain, tuple[DeviceId, ...], Mapping[DeviceId, _Packing]]]:
    """Chains with groups settled, and orders of the devices: so many as can be tried in little time."""

    def attempts() -> Iterator[tuple[Chain, tuple[DeviceId, ...], Mapping[DeviceId, _Packing]]]:
        for settled in _with_groups_settled(chain):
            classes = _Classes(settled)
            packings = {device: _Packing(classes, device, optimistic=False) for device in settled.devices}
            for order in _orders(settled):
                yield settled, order, packings

    return islice(attempts(), ATTEMPTS)


@dataclass(frozen=True, slots=True)
class _Price:
    """What room on a device is made to cost, in nanoseconds a byte: a rate that is a quotient of integers."""

    device: DeviceId
    nanoseconds: int = 0
    size_bytes: int = 1

    def of(self, size_bytes: int) -> int:
        """The price of so much, rounded up."""
        return -(-size_bytes * self.nanoseconds // self.size_bytes)


def _prices(chain: Chain) -> list[_Price]:
    """None; and, where what is kept on the CPU might not find room there, what it costs to keep it on the disk instead.

    A price on room that is short does not raise the optimum by more than the price of all of it: taken off again, what
    is left is a bound (Lagrange's), and the choice keeps on the disk what is better there.
    """
    free = _Price("cpu")
    most = sum(
        max((dict(option.demands).get("cpu", 0) for option in block.options), default=0) for block in chain.blocks
    )
    if most <= chain.capacities.get("cpu", 0):
        return [free]
    heaviest = max(chain.blocks, key=lambda block: max(sum(dict(option.demands).values()) for option in block.options))
    on_disk = next((option for option in heaviest.options if option.mode == ("streamed", "disk")), None)
    if on_disk is None:
        return [free]
    prices: dict[tuple[str, ...], _Price] = {}
    for option in heaviest.options:
        kept_bytes = _at(option.demands, "cpu")
        if kept_bytes and option.mode[:1] in (("streamed",), ("computed",)):
            prices[option.mode] = _Price("cpu", max(on_disk.nanoseconds - option.nanoseconds, 0), kept_bytes)
    return [free, *prices.values()]


def _priced(chain: Chain, price: _Price) -> Chain:
    """The chain with the price of what each option keeps on the device added to its time, rounded down."""
    if not price.nanoseconds:
        return chain
    known: dict[tuple[Option, ...], tuple[Option, ...]] = {}

    def priced(option: Option) -> Option:
        kept_bytes = dict(option.demands).get(price.device, 0)
        added = kept_bytes * price.nanoseconds // price.size_bytes
        return replace(option, nanoseconds=option.nanoseconds + added)

    for block in chain.blocks:
        if block.options not in known:
            known[block.options] = tuple(map(priced, block.options))
    return replace(chain, blocks=tuple(replace(block, options=known[block.options]) for block in chain.blocks))


def _within_stores(chain: Chain, choice: Choice) -> Choice | None:
    """The choice made feasible where too much is kept on a store: blocks kept in other ways, the cheapest first."""
    kept = list(choice)
    for _ in range(4 * len(kept)):
        if chain.is_feasible(tuple(kept)):
            return tuple(kept)
        used = chain.used_bytes(tuple(kept))
        room = {device: capacity - used.get(device, 0) for device, capacity in chain.capacities.items()}
        full = next((device for device, size_bytes in room.items() if size_bytes < 0), None)
        if full is None:
            return None  # a group is apart
        ways = []
        for position, block in enumerate(chain.blocks):
            now = block.options[kept[position]]
            for index, option in enumerate(block.options):
                if option.home != now.home or block.group is not None:
                    continue
                saved = _at(now.demands, full) - _at(option.demands, full)
                added = ((device, size - _at(now.demands, device)) for device, size in option.demands)
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


@dataclass(frozen=True)
class _Classes:
    """A chain's free blocks by their options, and what those that have one option only leave of the capacities."""

    chain: Chain

    @cached_property
    def fixed(self) -> tuple[int, ...]:
        """Positions of blocks without a choice."""
        return tuple(position for position, block in enumerate(self.chain.blocks) if len(block.options) == 1)

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the free blocks, by class, in order of their first."""
        alike: dict[tuple[Option, ...], list[int]] = {}
        for position, block in enumerate(self.chain.blocks):
            if len(block.options) > 1:
                alike.setdefault(block.options, []).append(position)
        return tuple(tuple(positions) for positions in alike.values())

    @cached_property
    def class_of(self) -> dict[int, int]:
        """The class of each free block."""
        return {position: number for number, positions in enumerate(self.members) for position in positions}

    def options(self, number: int) -> tuple[Option, ...]:
        """The options of a class."""
        return self.chain.blocks[self.members[number][0]].options

    @cached_property
    def fixed_nanoseconds(self) -> int:
        """What the blocks without a choice take."""
        return sum(self.chain.blocks[position].options[0].nanoseconds for position in self.fixed)

    @cached_property
    def base_peaks(self) -> dict[DeviceId, int]:
        """The largest peak of a block without a choice, by device."""
        peaks: dict[DeviceId, int] = {}
        for position in self.fixed:
            for device, size_bytes in self.chain.blocks[position].options[0].peaks:
                peaks[device] = max(peaks.get(device, 0), size_bytes)
        return peaks

    @cached_property
    def base_pieces(self) -> dict[DeviceId, int]:
        """The largest piece that is copied in for a block without a choice, by device."""
        pieces: dict[DeviceId, int] = {}
        for position in self.fixed:
            for device, size_bytes in self.chain.blocks[position].options[0].pieces:
                pieces[device] = max(pieces.get(device, 0), size_bytes)
        return pieces

    @cached_property
    def room(self) -> dict[DeviceId, int]:
        """Capacities less what the blocks without a choice hold."""
        room = dict(self.chain.capacities)
        for position in self.fixed:
            for device, size_bytes in self.chain.blocks[position].options[0].demands:
                room[device] = room.get(device, 0) - size_bytes
        return room


def _least_demand(options: tuple[Option, ...]) -> int:
    """What a block asks for at least when it is as fast as it can be; what never runs may be kept for nothing."""
    fastest = min(option.nanoseconds for option in options)
    return min(
        sum(size for device, size in option.demands if device == option.home)
        for option in options
        if option.nanoseconds == fastest
    )


class _SimilarClasses(_Classes):
    """Classes of which some are joined, each option with the least of what theirs take: for a bound.

    Joined are those whose blocks together would not be faster by more than a share of what all take.
    """

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the free blocks, by what they were joined to."""
        return tuple(
            tuple(sorted(position for number in group for position in self._exact.members[number]))
            for group in self._joined
        )

    def options(self, number: int) -> tuple[Option, ...]:
        """The options of a class: of each, the least."""
        group = self._joined[number]
        options = self._exact.options(group[0])
        for other in group[1:]:
            options = tuple(map(_lesser, options, self._exact.options(other)))
        return options

    @cached_property
    def _exact(self) -> _Classes:
        return _Classes(self.chain)

    @cached_property
    def _joined(self) -> list[list[int]]:
        exact = self._exact
        total = self.fixed_nanoseconds + sum(
            min(option.nanoseconds for option in exact.options(number)) * len(positions)
            for number, positions in enumerate(exact.members)
        )
        room = sum(self.chain.capacities.values())
        groups: list[list[int]] = []
        for number in sorted(range(len(exact.members)), key=lambda each: (-len(exact.members[each]), each)):
            for group in groups:
                lost = _lost(exact.options(group[0]), exact.options(number))
                if lost is None:
                    continue
                counts = (len(exact.members[group[0]]), len(exact.members[number]))
                nanoseconds = sum(count * each[0] for count, each in zip(counts, lost, strict=True))
                size_bytes = sum(count * each[1] for count, each in zip(counts, lost, strict=True))
                if nanoseconds * JOINING_LOSS <= total and size_bytes * JOINING_LOSS <= room:
                    group.append(number)
                    break
            else:
                groups.append([number])
        return groups


def _lesser(first: Option, second: Option) -> Option:
    return replace(
        first,
        nanoseconds=min(first.nanoseconds, second.nanoseconds),
        demands=tuple((device, min(size, _at(second.demands, device))) for device, size in first.demands),
        peaks=tuple((device, min(size, _at(second.peaks, device))) for device, size in first.peaks),
        pieces=tuple((device, min(size, _at(second.pieces, device))) for device, size in first.pieces),
    )


def _lost(first: tuple[Option, ...], second: tuple[Option, ...]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """By how many nanoseconds and bytes a block of each would be short; `None` where they differ in kind."""
    if [option.place for option in first] != [option.place for option in second]:
        return None
    of_first = of_second = 0
    bytes_first = bytes_second = 0
    for one, other in zip(first, second, strict=True):
        of_first = max(of_first, one.nanoseconds - other.nanoseconds)
        of_second = max(of_second, other.nanoseconds - one.nanoseconds)
        for device, size in one.demands:
            bytes_first = max(bytes_first, size - _at(other.demands, device))
        for device, size in other.demands:
            bytes_second = max(bytes_second, size - _at(one.demands, device))
    return (of_first, bytes_first), (of_second, bytes_second)


@dataclass(frozen=True)
class _Frontier:
    """What blocks can free by other than their fastest ways, each more at the least cost; what frees least comes first.

    `origin` says how each point came about: the point that it was before, and the class and option that were added.
    """

    freed_bytes: Integers
    extra_nanoseconds: Integers
    origin: tuple[tuple[_Frontier, Integers, Integers, int], ...] = ()
    """The frontiers that it was joined from: points of the first, points of the second."""
    ways: tuple[tuple[int, int], ...] = ()
    """For single blocks: the class and the option of each point, option -1 for the fastest."""

    def __len__(self) -> int:
        return len(self.freed_bytes)

    def counts(self, point: int) -> Counter[tuple[int, int]]:
        """How many blocks of which class take which option at a point."""
        if not self.origin:
            number, index = self.ways[point]
            return Counter() if index < 0 else Counter({(number, index): 1})
        (first, first_points, second_points, _), (second, _, _, _) = self.origin
        return first.counts(int(first_points[point])) + second.counts(int(second_points[point]))


NOTHING_FREED = _Frontier(np.zeros(1, np.int64), np.zeros(1, np.int64), ways=((0, -1),))


def _join(first: _Frontier, second: _Frontier) -> _Frontier:
    """What both free together, without what another point frees for less."""
    freed = (first.freed_bytes[:, None] + second.freed_bytes[None, :]).ravel()
    extra = (first.extra_nanoseconds[:, None] + second.extra_nanoseconds[None, :]).ravel()
    order = np.lexsort((-freed, extra))  # least cost first, of equal cost what frees most
    most_before = np.maximum.accumulate(freed[order])
    is_kept = np.concatenate(([True], freed[order][1:] > most_before[:-1]))
    kept = order[is_kept]
    first_points, second_points = np.divmod(kept, len(second))
    origin = ((first, first_points, second_points, 0), (second, first_points, second_points, 1))
    return _Frontier(freed[kept], extra[kept], origin)


class _Packing:
    """How one device takes given numbers of blocks of each class, at least cost. What is kept elsewhere is not counted.

    With `optimistic` the cost is a bound: peaks are the least that the options allow. Else the largest.
    """

    def __init__(self, classes: _Classes, device: DeviceId, *, optimistic: bool) -> None:
        self.device = device
        self._room = classes.room.get(device, 0)
        self._base_peak = classes.base_peaks.get(device, 0)
        self._base_piece = classes.base_pieces.get(device, 0)
        self._known: dict[tuple[int, ...], int | None] = {}
        self._ways: list[list[tuple[int, Option]]] = [
            sorted(
                ((index, option) for index, option in enumerate(classes.options(number)) if option.home == device),
                key=lambda way: (way[1].nanoseconds, way[0]),
            )
            for number in range(len(classes.members))
        ]
        extreme = min if optimistic else max
        self._peaks: list[int] = []
        self._pieces: list[set[int]] = []
        self._demands: list[int] = []
        self._nanoseconds: list[int] = []
        for ways in self._ways:
            options = [option for _, option in ways]
            self._peaks.append(extreme((_at(option.peaks, device) for option in options), default=0))
            self._pieces.append({_at(option.pieces, device) for option in options})
            self._demands.append(_at(options[0].demands, device) if options else 0)
            self._nanoseconds.append(options[0].nanoseconds if options else 0)
        self._singles: dict[tuple[int, int], _Frontier] = {}
        self._alike: dict[tuple[int, int], list[_Frontier]] = {}
        self._joined: dict[tuple[object, ...], _Frontier] = {}

    @cached_property
    def kind(self) -> object:
        """All that the answers depend on: devices that are alike have the same."""
        ways = tuple(
            tuple(
                (
                    option.nanoseconds,
                    _at(option.demands, self.device),
                    _at(option.peaks, self.device),
                    _at(option.pieces, self.device),
                )
                for _, option in ways
            )
            for ways in self._ways
        )
        return (self._room, self._base_peak, self._base_piece, ways)

    def pack(self, counts: tuple[int, ...]) -> int | None:
        """The least nanoseconds for so many blocks of each class; `None` where they do not fit."""
        if counts not in self._known:
            self._known[counts] = self._packed(counts)
        return self._known[counts]

    def choice(self, counts: tuple[int, ...]) -> Counter[tuple[int, int]]:
        """How many blocks of which class take which option, where they fit."""
        taken = Counter({(number, self._ways[number][0][0]): count for number, count in enumerate(counts) if count})
        need = self._need(counts)
        if need > 0 and (found := self._cheapest(counts, need)) is not None:
            frontier, rest, point, rest_point, _ = found
            for (number, index), count in (frontier.counts(point) + rest.counts(rest_point)).items():
                taken[number, self._ways[number][0][0]] -= count
                taken[number, index] += count
        return +taken

    def _need(self, counts: tuple[int, ...]) -> int:
        demanded, peak = 0, self._base_peak
        for number, count in enumerate(counts):
            if count:
                demanded += count * self._demands[number]
                peak = max(peak, self._peaks[number])
        return demanded + peak + self._base_piece - self._room

    def _packed(self, counts: tuple[int, ...]) -> int | None:
        if any(count and not self._ways[number] for number, count in enumerate(counts)):
            return None
        total = sum(count * self._nanoseconds[number] for number, count in enumerate(counts))
        need = self._need(counts)
        if need <= 0:
            return total
        found = self._cheapest(counts, need)
        return None if found is None else total + found[4]

    def _cheapest(self, counts: tuple[int, ...], need: int) -> tuple[_Frontier, _Frontier, int, int, int] | None:
        """The cheapest way to free what is needed.

        The largest piece that is copied in takes room as well: each is tried as the largest, and none.
        """
        present = sorted((count, number) for number, count in enumerate(counts) if count)
        if not present:
            return None
        best = None
        for piece in sorted({self._base_piece, *(piece for _, number in present for piece in self._pieces[number])}):
            if piece < self._base_piece:
                continue
            wanted = need + piece - self._base_piece
            largest = self._of_alike(present[-1][1], present[-1][0], piece)
            rest = self._of_several(tuple(present[:-1]), piece)
            places = np.searchsorted(largest.freed_bytes, wanted - rest.freed_bytes)
            possible = np.flatnonzero(places < len(largest))
            if not len(possible):
                continue
            extra = rest.extra_nanoseconds[possible] + largest.extra_nanoseconds[places[possible]]
            least = int(np.argmin(extra))
            if best is None or int(extra[least]) < best[4]:
                rest_point = int(possible[least])
                best = (largest, rest, int(places[rest_point]), rest_point, int(extra[least]))
        return best

    def _of_several(self, present: tuple[tuple[int, int], ...], piece: int) -> _Frontier:
        if not present:
            return NOTHING_FREED
        key = (present, piece)
        if key not in self._joined:
            count, number = present[-1]
            self._joined[key] = _join(self._of_several(present[:-1], piece), self._of_alike(number, count, piece))
        return self._joined[key]

    def _of_alike(self, number: int, count: int, piece: int) -> _Frontier:
        known = self._alike.setdefault((number, piece), [NOTHING_FREED])
        while len(known) <= count:
            known.append(_join(known[-1], self._of_one(number, piece)))
        return known[count]

    def _of_one(self, number: int, piece: int) -> _Frontier:
        """What one block of a class can free without copying in a larger piece."""
        key = (number, piece)
        if key not in self._singles:
            fastest = self._ways[number][0][1]
            points = [(0, 0, -1)]
            for index, option in self._ways[number][1:]:
                freed = self._demands[number] - _at(option.demands, self.device)
                if freed > 0 and _at(option.pieces, self.device) <= piece:
                    points.append((option.nanoseconds - fastest.nanoseconds, freed, index))
            kept = [points[0]]
            for extra, freed, index in sorted(points[1:], key=lambda point: (point[0], -point[1], point[2])):
                if freed > kept[-1][1]:
                    kept.append((extra, freed, index))
            self._singles[key] = _Frontier(
                np.array([freed for _, freed, _ in kept], np.int64),
                np.array([extra for extra, _, _ in kept], np.int64),
                ways=tuple((number, index) for _, _, index in kept),
            )
        return self._singles[key]


def _at(sizes: Bytes, device: DeviceId) -> int:
    return next((size_bytes for each, size_bytes in sizes if each == device), 0)


class _Counting:
    """How many blocks of each class every device takes, order forgotten: a bound, or, not `optimistic`, a choice."""

    def __init__(self, classes: _Classes, *, optimistic: bool = True) -> None:
        self._classes = classes
        self._optimistic = optimistic
        chain = classes.chain
        weights = [
            (_least_demand(classes.options(number)) * len(positions), number)
            for number, positions in enumerate(classes.members)
        ]
        counted: list[int] = []
        states = 1
        most_states = COUNTED_STATES[min(len(chain.devices), len(COUNTED_STATES)) - 1]
        for _, number in sorted(weights, reverse=True):
            if states * (len(classes.members[number]) + 1) <= most_states:
                states *= len(classes.members[number]) + 1
                counted.append(number)
        self._counted = sorted(counted)
        self._free = [number for number in range(len(classes.members)) if number not in counted]
        self._devices = chain.devices
        self._shape = tuple(len(classes.members[number]) + 1 for number in self._counted)
        self._all = tuple(length - 1 for length in self._shape)
        self._taken: dict[object, list[tuple[tuple[int, ...], int]]] = {}

    def bound(self) -> int:
        """Nanoseconds that no choice can be below."""
        classes = self._classes
        total = classes.fixed_nanoseconds
        for number in self._free:
            fastest = min(option.nanoseconds for option in classes.options(number))
            total += fastest * len(classes.members[number])
        entries = {device: self._least_entry(device) for device in self._devices}
        *others, last = self._devices
        if not others:
            packed = _Packing(classes, last, optimistic=True).pack(self._full(self._all))
            return UNREACHABLE if packed is None else total + packed
        least = np.full(self._shape, UNREACHABLE, dtype=np.int64)
        least[(0,) * len(self._shape)] = 0
        for device in others:
            least = self._after(least, device, entries[device])
        reached = int(least[self._all])
        for counts, packed in self._taken_by(last):
            before = tuple(all_of - count for all_of, count in zip(self._all, counts, strict=True))
            reached = min(reached, int(least[before]) + packed + entries[last])
        # The device that runs the first block is not entered.
        return total + max(reached - max(entries.values(), default=0), 0)

    def choice(self) -> Choice | None:
        """The blocks that every device takes, class by class in the order of the chain; `None` where nothing fits."""
        classes, chain = self._classes, self._classes.chain
        least = np.full(self._shape, UNREACHABLE, dtype=np.int64)
        least[(0,) * len(self._shape)] = 0
        steps: list[tuple[DeviceId, Integers]] = []
        for device in self._devices:
            steps.append((device, least))
            least = self._after(least, device, self._least_entry(device))
        if int(least[self._all]) >= UNREACHABLE:
            return None
        waiting = [list(positions) for positions in classes.members]
        chosen: dict[int, int] = dict.fromkeys(classes.fixed, 0)
        left = self._all
        for device, before in reversed(steps):
            after, entry = int(least[left]), self._least_entry(device)
            least = before
            if int(before[left]) == after:
                continue
            for counts, packed in self._taken_by(device):
                rest = tuple(have - count for have, count in zip(left, counts, strict=True))
                if min(rest) >= 0 and int(before[rest]) + packed + entry == after:
                    break
            left = rest
            packing = _Packing(classes, device, optimistic=self._optimistic)
            for (number, index), count in sorted(packing.choice(self._full(counts)).items()):
                for _ in range(count):
                    chosen[waiting[number].pop()] = index  # from the end, since the devices are gone through backwards
        for position, block in enumerate(chain.blocks):  # what is light goes where its neighbour is
            if position not in chosen:
                near = chain.blocks[position - 1].options[chosen[position - 1]].home if position else None
                homes = [option.home for option in block.options]
                chosen[position] = homes.index(near) if near in homes else 0
        return tuple(chosen[position] for position in range(len(chain.blocks)))

    def _after(self, least: Integers, device: DeviceId, entry: int) -> Integers:
        """The least for every count once this device has taken its part as well."""
        after: Integers = least.copy()
        for counts, packed in self._taken_by(device):
            before = tuple(slice(0, length - count) for length, count in zip(self._shape, counts, strict=True))
            target = tuple(slice(count, None) for count in counts)
            np.minimum(after[target], least[before] + (packed + entry), out=after[target])
        return after

    def _taken_by(self, device: DeviceId) -> list[tuple[tuple[int, ...], int]]:
        """What a device could take, and in which time; devices that are alike share the answer."""
        packing = _Packing(self._classes, device, optimistic=self._optimistic)
        if packing.kind not in self._taken:
            taken = [(counts, packing.pack(self._full(counts))) for counts in self._takeable(packing) if any(counts)]
            self._taken[packing.kind] = [(counts, packed) for counts, packed in taken if packed is not None]
        return self._taken[packing.kind]

    def _takeable(self, packing: _Packing) -> Iterator[tuple[int, ...]]:
        """Every number of blocks that a device could hold, found by growing what fits."""
        zero = (0,) * len(self._shape)
        seen = {zero}
        waiting = [zero]
        while waiting:
            counts = waiting.pop()
            yield counts
            for place, length in enumerate(self._shape):
                more = (*counts[:place], counts[place] + 1, *counts[place + 1 :])
                if more[place] < length and more not in seen:
                    seen.add(more)
                    if packing.pack(self._full(more)) is not None:
                        waiting.append(more)

    def _full(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        full = [0] * len(self._classes.members)
        for number, count in zip(self._counted, counts, strict=True):
            full[number] = count
        return tuple(full)

    def _least_entry(self, device: DeviceId) -> int:
        """The least that it costs to come to a device from another."""
        others = [other for other in self._devices if other != device]
        entering = self._classes.chain.entering[1:]
        return min((costs.get((other, device), 0) for costs in entering for other in others), default=0)


def _with_groups_settled(chain: Chain) -> Iterator[Chain]:
    """The chain with every group of several blocks in one place, for one after another of such places."""
    groups: dict[int, list[int]] = {}
    for position, block in enumerate(chain.blocks):
        if block.group is not None:
            groups.setdefault(block.group, []).append(position)
    if not groups:
        yield chain
        return
    possible = [
        [
            place
            for place in dict.fromkeys(option.place for option in chain.blocks[positions[0]].options)
            if all(any(option.place == place for option in chain.blocks[each].options) for each in positions)
        ]
        for positions in groups.values()
    ]
    for places in product(*possible):
        settled = dict(zip(groups, places, strict=True))
        blocks = tuple(
            block
            if block.group not in settled
            else replace(block, options=_options_at(block.options, settled[block.group]))
            for block in chain.blocks
        )
        yield Chain(blocks, chain.capacities, chain.entering)


def _as_in(chain: Chain, settled: Chain, choice: Choice) -> Choice:
    """The same choice by the options of the chain that was settled."""
    pairs = zip(chain.blocks, settled.blocks, choice, strict=True)
    return tuple(block.options.index(narrowed.options[index]) for block, narrowed, index in pairs)


def _options_at(options: tuple[Option, ...], place: tuple[str, ...]) -> tuple[Option, ...]:
    return tuple(option for option in options if option.place == place)


def _orders(chain: Chain) -> list[tuple[DeviceId, ...]]:
    """Orders of the devices that are worth a try: as listed, by speed, by room, and all where there are few."""
    devices = chain.devices
    sample = max(chain.blocks, key=lambda block: sum(size for _, size in block.options[0].demands))
    speed = {option.home: option.nanoseconds for option in reversed(sample.options)}
    orders = [
        devices,
        tuple(sorted(devices, key=lambda device: (speed.get(device, 0), devices.index(device)))),
        tuple(sorted(devices, key=lambda device: (-chain.capacities[device], devices.index(device)))),
        (*devices[-1:], *devices[:-1]),
    ]
    if len(devices) <= 3:
        orders = list(permutations(devices))
    return list(dict.fromkeys(orders))


def _contiguous(
    chain: Chain, order: Sequence[DeviceId], packings: Mapping[DeviceId, _Packing], known: int
) -> Choice | None:
    """The best cut of the free blocks into one run for each device in this order; a run may be empty.

    What would take `known` or more is not looked at.
    """
    classes = _Classes(chain)
    free = sorted(classes.class_of)
    prefix: list[tuple[int, ...]] = [(0,) * len(classes.members)]
    for position in free:
        kind = classes.class_of[position]
        prefix.append((*prefix[-1][:kind], prefix[-1][kind] + 1, *prefix[-1][kind + 1 :]))

    def counts_of(begin: int, end: int) -> tuple[int, ...]:
        return tuple(high - low for high, low in zip(prefix[end], prefix[begin], strict=True))

    cheapest = [0]  # what the blocks from here on take at least
    for position in reversed(free):
        cheapest.append(cheapest[-1] + min(option.nanoseconds for option in chain.blocks[position].options))
    cheapest.reverse()
    most = known - classes.fixed_nanoseconds
    least: list[int] = [0] + [UNREACHABLE] * len(free)
    cuts: list[list[int]] = []
    for device in order:
        packing = packings[device]
        after, cut = list(least), list(range(len(least)))
        for begin, before in enumerate(least[:-1]):
            if before >= UNREACHABLE:
                continue
            entering = _entering(chain, free, begin, device, order)
            for end in range(begin + 1, len(free) + 1):
                packed = packing.pack(counts_of(begin, end))
                if packed is None or before + packed + entering + cheapest[end] >= most:
                    break
                cost = before + packed + entering
                if cost < after[end]:
                    after[end], cut[end] = cost, begin
        least = after
        cuts.append(cut)
    if least[-1] >= UNREACHABLE:
        return None
    runs: list[tuple[int, int, int]] = []
    end = len(free)
    for number in range(len(order) - 1, -1, -1):
        begin = cuts[number][end]
        runs.append((number, begin, end))
        end = begin
    choice = [0] * len(chain.blocks)
    for number, begin, end in runs:
        for (kind, index), count in sorted(packings[order[number]].choice(counts_of(begin, end)).items()):
            waiting = [place for place in free[begin:end] if classes.class_of[place] == kind and not choice[place]]
            for place in waiting[:count]:
                choice[place] = index + 1  # so that none is taken twice
    return tuple(max(index - 1, 0) for index in choice)


def _entering(chain: Chain, free: list[int], begin: int, device: DeviceId, order: Sequence[DeviceId]) -> int:
    """About what it costs to begin a run here: the cheapest way from a device that may come before."""
    if begin == 0:
        return 0
    costs = chain.entering[free[begin]]
    before = [other for other in order if other != device]
    return min((costs.get((other, device), 0) for other in before), default=0)


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
                    if chain.is_feasible(tuple(changed)):
                        best, now = changed, faster
        if best == before:
            break
    return tuple(best)
