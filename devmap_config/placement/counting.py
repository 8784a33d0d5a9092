"""How many blocks of each class take which option, their order forgotten: the best numbers, and so a bound.

Device by device, class by class and option by option, every number of blocks is tried, all partial answers side by
side. One goes when another with the same blocks left has taken neither more time nor more room, or when the rest must
take it beyond what is known. The rest is told by prices on room: the best prices, and the same with some of them at
nothing, which see better where room would be left over in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from devmap_config.placement.classes import at
from devmap_config.placement.partials import Partials, Step, Tests, TooManyError, after, needed
from devmap_config.placement.prices import most_held

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.placement.chain import Bytes, Option
    from devmap_config.placement.classes import Classes
    from devmap_config.placement.partials import Integers
    from devmap_config.placement.prices import Prices
    from devmap_config.placement.problem import DeviceId

PRICE_BITS = 20
"""Prices are counted in nanoseconds a byte, with so many binary places where they fit."""

WIDEST_BITS = 60
"""Sums of costs have at most so many bits."""

NEGLIGIBLE_SHARE = 100
"""Classes that together need at most so many millionths of a device's room are not counted."""

VARIED_PRICES = 3
"""Of so many prices at most, each is also tried at nothing."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What no choice can be below and, where they are known, the numbers that reach it: by class and option."""

    nanoseconds: int
    numbers: Mapping[tuple[int, int], int] | None = None


def count_blocks(classes: Classes, prices: Prices, below: int) -> Counted | None:
    """The best numbers that take less than `below`; without numbers there are none. `None` where it was given up."""
    try:
        return _Count(classes, prices, below).counted()
    except TooManyError:
        return None


def good_numbers(classes: Classes, prices: Prices, below: int) -> Mapping[tuple[int, int], int] | None:
    """Some good numbers that take less than `below`, where any are found: only what promises most goes on."""
    try:
        return _Count(classes, prices, below, all_of_them=False).counted().numbers
    except TooManyError:
        return None


@dataclass(frozen=True, slots=True)
class _Way:
    """Some of the blocks of a class may take an option; nothing follows for them where it is the last."""

    number: int
    index: int
    option: Option
    is_last: bool = False


_Rates = tuple[int, dict["DeviceId", int]]
"""The weight of time, and the price of a byte by device."""


class _Count:
    def __init__(self, classes: Classes, prices: Prices, below: int, *, all_of_them: bool = True) -> None:
        self._classes = classes
        self._all_of_them = all_of_them
        self._prices = prices
        self._devices = tuple(prices.room_bytes)
        self._entries = {device: self._least_entry(device) for device in classes.chain.devices}
        self._first_entry = max(self._entries.values(), default=0)  # of the device that runs the first block
        self._below = below + self._first_entry
        self._room = {
            device: classes.chain.capacities.get(device, 0) - classes.fixed_bytes.get(device, 0)
            for device in self._devices
        }

    def counted(self) -> Counted:
        """See `count_blocks`."""
        below = Counted(self._below - self._first_entry)
        if not all(self._options.values()):
            return below
        trail: list[tuple[_Way | None, Integers, Integers]] = []
        remaining = [way for _, ways in self._stages for way in ways]
        partials = self._start
        kept: tuple[DeviceId, ...] = ()  # the devices that the partial answers have columns for
        for stage, ways in self._stages:
            devices = tuple(device for device in self._devices if device in {*stage, *self._stores})
            partials = self._with_columns(partials, kept, devices)
            waiting = [
                device for device in self._devices if device not in devices and not self._is_before(device, stage)
            ]
            rates = self._rates(stage)
            tests = self._tests(rates, devices, waiting)
            least_costs = self._least_costs(rates, remaining)
            remaining = remaining[len(ways) :]
            room = np.array([self._room[device] for device in devices], np.int64)
            for way, least_cost in zip(ways, least_costs[1:], strict=False):
                step = self._step(way, devices)
                partials, parents, taken = after(
                    partials, step, replace(tests, least_costs=least_cost), room, all_of_them=self._all_of_them
                )
                trail.append((way, parents, taken))
                if not len(partials):
                    return below
            entry = min(self._entries[device] for device in stage)
            kept = tuple(device for device in devices if device in self._stores)
            partials = self._with_columns(partials, devices, kept)
            partials = replace(
                partials,
                nanoseconds=partials.nanoseconds + partials.is_entered * entry,
                is_entered=np.zeros_like(partials.is_entered),
            )
            rows = needed(partials)
            trail.append((None, rows, rows))
            partials = partials.rows(rows)
        row = int(np.argmin(partials.nanoseconds))
        nanoseconds = int(partials.nanoseconds[row]) - self._first_entry
        return Counted(nanoseconds, self._numbers(trail, row))

    def _numbers(self, trail: list[tuple[_Way | None, Integers, Integers]], row: int) -> dict[tuple[int, int], int]:
        numbers = {(number, self._cheapest(number)): self._size(number) for number in self._free}
        for way, parents, taken in reversed(trail):
            if way is not None and taken[row]:
                numbers[way.number, way.index] = int(taken[row])
            row = int(parents[row])
        return numbers

    # What is counted

    def _size(self, number: int) -> int:
        return len(self._classes.members[number])

    @cached_property
    def _free(self) -> list[int]:
        """Classes that need next to no room when they are as fast as can be."""
        free, lost = [], 0
        for share, number in sorted(
            (self._least_share(number), number) for number in range(len(self._classes.members))
        ):
            lost += share
            if lost <= NEGLIGIBLE_SHARE:
                free.append(number)
        return free

    def _least_share(self, number: int) -> int:
        """Of the fastest options, the least that one needs of any device's room, in millionths."""
        options = self._classes.options(number)
        fastest = min(option.nanoseconds for option in options)
        shares = []
        for option in options:
            if option.nanoseconds == fastest:
                share = 0
                for device in self._devices:
                    need = self._size(number) * at(option.demands, device)
                    need += max(at(option.peaks, device) - self._least_peaks[device], 0)
                    need += max(at(option.pieces, device) - self._least_pieces[device], 0)
                    share = max(share, -(-need * 10**6 // max(self._room[device], 1)))
                shares.append(share)
        return min(shares)

    @cached_property
    def _least_peaks(self) -> dict[DeviceId, int]:
        """The peaks that there are on each device in any case."""
        return {
            device: max(
                [
                    self._classes.fixed_peaks.get(device, 0),
                    *(min(at(each.peaks, device) for each in options) for options in self._kinds),
                ]
            )
            for device in self._devices
        }

    @cached_property
    def _least_pieces(self) -> dict[DeviceId, int]:
        """The pieces that are copied to each device in any case."""
        return {
            device: max(
                [
                    self._classes.fixed_pieces.get(device, 0),
                    *(min(at(each.pieces, device) for each in options) for options in self._kinds),
                ]
            )
            for device in self._devices
        }

    @cached_property
    def _kinds(self) -> list[tuple[Option, ...]]:
        return [self._classes.options(number) for number in range(len(self._classes.members))]

    @cached_property
    def _options(self) -> dict[int, list[tuple[int, Option]]]:
        """The options of the classes that are counted, what weighs most first."""

        def weight(number: int) -> int:
            return self._size(number) * max(sum(size for _, size in each.demands) for each in self._kinds[number])

        counted = [number for number in range(len(self._kinds)) if number not in self._free]
        return {
            number: self._useful(self._kinds[number])
            for number in sorted(counted, key=lambda number: (-weight(number), number))
        }

    def _useful(self, options: tuple[Option, ...]) -> list[tuple[int, Option]]:
        """Those that can fit, without those that need no less than another of the same home and are not faster."""
        kept: list[tuple[int, Option, list[int]]] = []
        for index, option in sorted(enumerate(options), key=lambda each: (each[1].nanoseconds, each[0])):
            sizes = [
                (at(option.demands, device), at(option.peaks, device), at(option.pieces, device))
                for device in self._devices
            ]
            if any(sum(size) > self._room[device] for size, device in zip(sizes, self._devices, strict=True)):
                continue
            need = [each for size in sizes for each in size]
            if not any(
                other.home == option.home and all(less <= more for less, more in zip(less_need, need, strict=True))
                for _, other, less_need in kept
            ):
                kept.append((index, option, need))
        return [(index, option) for index, option, _ in kept]

    def _cost(self, option: Option) -> int:
        """Time, and what its room is worth."""
        return option.nanoseconds + self._prices.worth(option)

    def _cheapest(self, number: int) -> int:
        options = self._kinds[number]
        return min(range(len(options)), key=lambda index: (self._cost(options[index]), index))

    # In which order

    @cached_property
    def _stores(self) -> tuple[DeviceId, ...]:
        """Devices that blocks need which run elsewhere."""
        options = [option for each in self._options.values() for _, option in each]
        needed_elsewhere = {
            device
            for option in options
            for sizes in (option.demands, option.peaks, option.pieces)
            for device, _ in sizes
            if device != option.home
        }
        return tuple(device for device in self._devices if device in needed_elsewhere)

    @cached_property
    def _stages(self) -> list[tuple[tuple[DeviceId, ...], list[_Way]]]:
        """The devices in turn, each with what can run there, the costliest first.

        Stores are done with last, and with them the first device, which has a way for all that is left.
        """
        devices = self._classes.chain.devices
        first = next((device for device in devices if device not in self._stores), None)
        last = tuple(device for device in devices if device == first or device in self._stores)
        stages = [*((device,) for device in devices if device not in last), last]
        ordered = [
            [_Way(number, index, option) for index, option in self._by_cost(number) if option.home in stage]
            for stage in stages
            for number in self._options
        ]
        last_ways = {way.number: way for ways in ordered for way in ways}
        width = len(self._options)
        return [
            (
                stage,
                [
                    replace(way, is_last=way is last_ways[way.number])
                    for ways in ordered[place * width : (place + 1) * width]
                    for way in ways
                ],
            )
            for place, stage in enumerate(stages)
        ]

    def _by_cost(self, number: int) -> list[tuple[int, Option]]:
        return sorted(self._options[number], key=lambda each: (-self._cost(each[1]), each[0]))

    def _is_before(self, device: DeviceId, stage: tuple[DeviceId, ...]) -> bool:
        """Whether a device is done with when this stage begins."""
        stages = [each for each, _ in self._stages]
        return any(device in each for each in stages[: stages.index(stage)])

    # What the rest takes at least

    @cached_property
    def _bits(self) -> int:
        """Binary places of prices, so many that no sum is too large."""
        room, prices = self._prices.room_bytes, self._prices.nanoseconds
        most = self._below
        for number, options in self._options.items():
            most += self._size(number) * max(self._cost(option) + 1 for _, option in options)
        for device in self._devices:
            most += 2 * prices[device] * self._room[device] // max(room[device], 1)
        return max(min(PRICE_BITS, WIDEST_BITS - most.bit_length()), 0)

    def _rates(self, stage: tuple[DeviceId, ...]) -> list[_Rates]:
        """What is tested while these devices take blocks.

        The time, by the best prices and with some at nothing; and room alone, of every device of the last stage.
        """
        room, prices = self._prices.room_bytes, self._prices.nanoseconds
        best = {device: (prices[device] << self._bits) // max(room[device], 1) for device in self._devices}
        last, _ = self._stages[-1]
        stay = [device for device in self._devices if device in {*last, *self._stores}]
        varied = [device for device in dict.fromkeys((*stage, *stay)) if best.get(device)][:VARIED_PRICES]
        rates: list[_Rates] = [
            (1 << self._bits, best | dict.fromkeys(none, 0))
            for size in range(len(varied) + 1)
            for none in combinations(varied, size)
        ]
        return [*rates, *((0, dict.fromkeys(self._devices, 0) | {device: 1}) for device in stay)]

    def _tests(self, rates: list[_Rates], devices: Sequence[DeviceId], waiting: Sequence[DeviceId]) -> Tests:
        """The tests while these devices have columns, and those that wait have taken nothing yet."""
        limits = []
        for weight, rate in rates:
            limit = (self._below << self._bits) - 1 if weight else 0
            limit += sum(rate[device] * self._room[device] for device in devices)
            limit += sum(rate[device] * self._prices.room_bytes[device] for device in waiting)
            limits.append(limit)
        return Tests(
            weights=np.array([weight for weight, _ in rates], np.int64),
            rates=np.array([[rate[device] for device in devices] for _, rate in rates], np.int64),
            least_costs=np.zeros((0, 0), np.int64),
            limits=np.array(limits, np.int64),
            ladders=tuple(self._ladders[device] for device in devices),
        )

    @cached_property
    def _ladders(self) -> dict[DeviceId, Integers]:
        """For each device the peaks that blocks may have there, and what those with no higher peak can hold at most."""
        ladders = {}
        for device in self._devices:
            kinds = [
                (self._size(number), [(at(each.demands, device), at(each.peaks, device)) for _, each in options])
                for number, options in self._options.items()
            ]
            peaks = sorted({self._least_peaks[device], *(peak for _, ways in kinds for _, peak in ways)})
            ladders[device] = np.array([(peak, most_held(kinds, peak)) for peak in peaks], np.int64)
        return ladders

    def _least_costs(self, rates: list[_Rates], ways: list[_Way]) -> list[Integers]:
        """After so many ways, for each test and class the least that a block takes by one of those that follow."""
        kinds = {number: kind for kind, number in enumerate(self._options)}
        costs: Integers = np.zeros((len(rates), len(kinds)), np.int64)
        following = [costs]
        for way in reversed(ways):
            cost = np.array(
                [
                    weight * way.option.nanoseconds
                    + sum(rate.get(device, 0) * size for device, size in way.option.demands)
                    for weight, rate in rates
                ],
                np.int64,
            )
            costs, kind = costs.copy(), kinds[way.number]
            costs[:, kind] = cost if way.is_last else np.minimum(costs[:, kind], cost)
            following.append(costs)
        return following[::-1]

    # Partial answers

    @cached_property
    def _start(self) -> Partials:
        nanoseconds = self._classes.fixed_nanoseconds + sum(
            self._size(number) * min(option.nanoseconds for option in self._kinds[number]) for number in self._free
        )
        none = np.zeros((1, 0), np.int64)
        left = np.array([[self._size(number) for number in self._options]], np.int64)
        return Partials(np.array([nanoseconds], np.int64), left, none, none, none, np.zeros(1, np.int64))

    def _with_columns(self, partials: Partials, now: Sequence[DeviceId], devices: Sequence[DeviceId]) -> Partials:
        """With columns for these devices: what is held on those that have none yet is what there is in any case."""

        def columns(sizes: Integers, least: Mapping[DeviceId, int] | None) -> Integers:
            found = [
                sizes[:, now.index(device)] if device in now else np.full(len(sizes), least[device] if least else 0)
                for device in devices
            ]
            return np.stack(found, axis=1) if found else np.zeros((len(sizes), 0), np.int64)

        return replace(
            partials,
            held=columns(partials.held, None),
            peaks=columns(partials.peaks, self._least_peaks),
            pieces=columns(partials.pieces, self._least_pieces),
        )

    def _step(self, way: _Way, devices: Sequence[DeviceId]) -> Step:
        def vector(sizes: Bytes) -> Integers:
            return np.array([at(sizes, device) for device in devices], np.int64)

        option = way.option
        return Step(
            kind=list(self._options).index(way.number),
            nanoseconds=option.nanoseconds,
            demands=vector(option.demands),
            peaks=vector(option.peaks),
            pieces=vector(option.pieces),
            is_last=way.is_last,
        )

    def _least_entry(self, device: DeviceId) -> int:
        """The least that it costs to come to a device from another."""
        others = [other for other in self._classes.chain.devices if other != device]
        entering = self._classes.chain.entering[1:]
        return min((costs.get((other, device), 0) for costs in entering for other in others), default=0)
