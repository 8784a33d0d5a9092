"""What room on each device is worth: Lagrange's multipliers, which make a bound of what blocks take one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.placement.classes import at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.placement.chain import Option
    from devmap_config.placement.classes import Classes
    from devmap_config.placement.problem import DeviceId

ROUNDS = 2_000
PATIENCE = 20
"""After so many rounds without a better bound, steps are halved, and start from the best prices so far."""

LAST_HALVING = 24

LEAST_STEP = 2**16
"""Nanoseconds: prices move even where nothing takes time, and only room matters."""

SHARE = 2**24
"""What is used of a device is counted in so many parts of its room."""


@dataclass(frozen=True, slots=True)
class Prices:
    """For each device whose room may be short: nanoseconds for all of the room that it has for free blocks.

    No choice can be below `bound_nanoseconds`.
    """

    room_bytes: Mapping[DeviceId, int]
    nanoseconds: Mapping[DeviceId, int]
    bound_nanoseconds: int

    def worth(self, option: Option) -> int:
        """What the room is worth that an option needs."""
        return sum(
            self.nanoseconds[device] * size_bytes // max(self.room_bytes[device], 1)
            for device, size_bytes in option.demands
            if device in self.room_bytes
        )


def scarce_bytes(classes: Classes) -> dict[DeviceId, int] | None:
    """The room for free blocks on the devices that might not hold all that could be put there; `None` if one is full.

    Peaks and pieces that there are in any case are taken off, and the peaks without which not so much can be there.
    """
    kinds = [(len(positions), classes.options(number)) for number, positions in enumerate(classes.members)]
    room: dict[DeviceId, int] = {}
    named = {device for _, options in kinds for option in options for device, _ in (*option.demands, *option.peaks)}
    named |= {*classes.fixed_bytes, *classes.fixed_peaks, *classes.fixed_pieces}
    for device in (*classes.chain.capacities, *sorted(named - set(classes.chain.capacities))):
        left = classes.chain.capacities.get(device, 0) - classes.fixed_bytes.get(device, 0)
        peaks = (classes.fixed_peaks.get(device, 0), [_range(options, "peaks", device) for _, options in kinds])
        pieces = (classes.fixed_pieces.get(device, 0), [_range(options, "pieces", device) for _, options in kinds])
        least_peak, least_piece = (max([fixed, *(low for low, _ in ranges)]) for fixed, ranges in (peaks, pieces))
        most = sum(max([fixed, *(high for _, high in ranges)]) for fixed, ranges in (peaks, pieces))
        if left < least_peak + least_piece:
            return None
        held = [
            (count, [(at(each.demands, device), at(each.peaks, device)) for each in options])
            for count, options in kinds
        ]
        if most_held(held) + most > left:
            higher = {peak for _, sizes in held for _, peak in sizes if peak > least_peak}
            room[device] = max(
                min(left - least_piece - peak, most_held(held, peak)) for peak in (least_peak, *sorted(higher))
            )
    return room


def most_held(kinds: Iterable[tuple[int, Sequence[tuple[int, int]]]], highest_peak: int | None = None) -> int:
    """What blocks can hold on a device at most, of each kind so many: by the ways whose peak there is at most so high.

    Ways are what they hold and their peak.
    """
    return sum(
        count * max((size for size, peak in ways if highest_peak is None or peak <= highest_peak), default=0)
        for count, ways in kinds
    )


def _range(options: tuple[Option, ...], what: str, device: DeviceId) -> tuple[int, int]:
    sizes = [at(getattr(option, what), device) for option in options]
    return min(sizes), max(sizes)


def find_prices(classes: Classes, known: int) -> Prices | None:
    """The prices with about the highest bound, by subgradients; `None` where nothing fits.

    Everything is in integers. A bound holds whatever the prices are, so that they need not be exact: they are not made
    better once the bound is as high as `known`.
    """
    room = scarce_bytes(classes)
    if room is None:
        return None
    devices = list(room)
    kinds = []
    for number, positions in enumerate(classes.members):
        ways = []
        for option in classes.options(number):
            shares = [
                (place, at(option.demands, device) * SHARE // max(room[device], 1))
                for place, device in enumerate(devices)
                if at(option.demands, device)
            ]
            ways.append((option.nanoseconds, shares))
        kinds.append((len(positions), ways))
    known -= classes.fixed_nanoseconds
    best, best_prices = -1, [0] * len(devices)
    prices, halvings, waited = best_prices, 0, 0
    for _ in range(ROUNDS):
        bound, use = _priced(kinds, prices)
        if bound > best:
            best, best_prices, waited = bound, prices, 0
        else:
            waited += 1
        if waited == PATIENCE:
            halvings, waited, prices = halvings + 1, 0, best_prices
            continue
        norm = sum(over * over for over, price in zip(use, prices, strict=True) if over > 0 or price > 0)
        if not norm or halvings > LAST_HALVING or best >= known:
            break
        step = max(known - bound, LEAST_STEP)
        prices = [
            max(price + ((step * over * SHARE // norm) >> halvings), 0) for price, over in zip(prices, use, strict=True)
        ]
    if best > sum(count * max(nanoseconds for nanoseconds, _ in ways) for count, ways in kinds):
        return None
    by_device = dict(zip(devices, best_prices, strict=True))
    return Prices(room, by_device, best + classes.fixed_nanoseconds)


def _priced(
    kinds: list[tuple[int, list[tuple[int, list[tuple[int, int]]]]]], prices: list[int]
) -> tuple[int, list[int]]:
    """What all blocks take at least when room has these prices, and by how many parts each device is overused."""
    total = -sum(prices)
    use = [-SHARE] * len(prices)
    for count, ways in kinds:
        least: int | None = None
        taken: list[tuple[int, int]] = []
        for nanoseconds, shares in ways:
            cost = nanoseconds
            for place, share in shares:
                cost += prices[place] * share // SHARE
            if least is None or cost < least:
                least, taken = cost, shares
        total += count * (least or 0)
        for place, share in taken:
            use[place] += count * share
    return total, use
