"""Cuts a chain into one run of blocks for each device: few hops, and what each device cannot hold elsewhere."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

from devmap_config.placement.classes import Classes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.placement.chain import Chain, Choice
    from devmap_config.placement.packing import Packing
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


def in_runs(chain: Chain, order: Sequence[DeviceId], packings: Mapping[DeviceId, Packing], known: int) -> Choice | None:
    """The best cut of the free blocks into one run for each device in this order; a run may be empty.

    What would take `known` or more is not looked at.
    """
    classes = Classes(chain)
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
