"""Cuts a chain into one run of blocks for each device: few hops, and what each device cannot hold elsewhere."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from devmap_config.placement.classes import Classes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.placement.chain import Chain, Choice, Option
    from devmap_config.placement.packing import Integers, Packing
    from devmap_config.placement.prices import Prices
    from devmap_config.placement.problem import DeviceId

UNREACHABLE = 2**62


def orders(chain: Chain) -> list[tuple[DeviceId, ...]]:
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


def in_runs(
    chain: Chain,
    order: Sequence[DeviceId],
    packings: Mapping[DeviceId, Packing],
    known: int,
    prices: Prices | None = None,
) -> Choice | None:
    """The best cut of the free blocks into one run for each device in this order; a run may be empty.

    What would take `known` or more is not looked at; what room is worth tells sooner where that is so.
    """
    classes = Classes(chain)
    free = sorted(classes.class_of)
    kinds = np.zeros((len(free), len(classes.members)), np.int64)
    kinds[np.arange(len(free)), [classes.class_of[position] for position in free]] = 1
    prefix = np.concatenate((np.zeros((1, kinds.shape[1]), np.int64), np.cumsum(kinds, axis=0)))

    def counts_of(begin: int, end: int) -> tuple[int, ...]:
        return tuple((prefix[end] - prefix[begin]).tolist())

    cheapest = _least_from(classes, free, order, None).tolist()
    # What is found here may need more of a store than there is: only what is known to be feasible rules out by price.
    most = feasible = known - classes.fixed_nanoseconds
    least: list[int] = [0] + [UNREACHABLE] * len(free)
    cuts: list[list[int]] = []
    for number, device in enumerate(order):
        packing = packings[device]
        here = _least_from(classes, free, (device,), prices)
        later = _least_from(classes, free, order[number + 1 :], prices)
        worth = _worth(classes, order[number:], prices)
        after, cut = list(least), list(range(len(least)))
        for begin, before in enumerate(least[:-1]):
            if before >= UNREACHABLE:
                continue
            entering = _entering(chain, free, begin, device, order)
            at_least = before + entering + here[begin] - here[begin + 1 :] + later[begin + 1 :] - worth
            for end in (begin + 1 + np.flatnonzero(at_least < feasible)).tolist():
                packed = packing.pack(counts_of(begin, end))
                if packed is None or before + packed + entering + cheapest[end] >= most:
                    break
                cost = before + packed + entering
                if cost < after[end]:
                    after[end], cut[end] = cost, begin
            most = min(most, after[-1])
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


def _least_from(classes: Classes, free: list[int], homes: Sequence[DeviceId], prices: Prices | None) -> Integers:
    """What the free blocks from each on take at least on these devices, what room is worth included."""
    never = UNREACHABLE // (len(free) + 1)
    costs = []
    for number in range(len(classes.members)):
        options = [option for option in classes.options(number) if option.home in homes]
        # Room that is nearly none makes prices that no sum could hold; less is still a bound.
        costs.append(min((min(_cost(option, prices), never) for option in options), default=never))
    by_position = [costs[classes.class_of[position]] for position in free]
    return np.cumsum(np.array([0, *reversed(by_position)], np.int64))[::-1]


def _cost(option: Option, prices: Prices | None) -> int:
    return option.nanoseconds + (0 if prices is None else prices.worth(option))


def _worth(classes: Classes, homes: Sequence[DeviceId], prices: Prices | None) -> int:
    """What all the room is worth that blocks may need which run on these devices."""
    if prices is None:
        return 0
    options = [each for number in range(len(classes.members)) for each in classes.options(number)]
    needed = {device for option in options if option.home in homes for device, _ in option.demands}
    return sum(nanoseconds for device, nanoseconds in prices.nanoseconds.items() if device in needed)
