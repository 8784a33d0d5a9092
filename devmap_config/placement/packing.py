"""How one device takes given numbers of blocks of each class at least cost: which are streamed, which are split."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from devmap_config.placement.classes import at

if TYPE_CHECKING:
    from devmap_config.placement.chain import Option
    from devmap_config.placement.classes import Classes
    from devmap_config.placement.problem import DeviceId

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


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


class Packing:
    """How one device takes given numbers of blocks of each class, at least cost.

    What is kept elsewhere is not counted, and of each class the largest peak that it may have.
    """

    def __init__(self, classes: Classes, device: DeviceId) -> None:
        self._room = classes.chain.capacities.get(device, 0) - classes.fixed_bytes.get(device, 0)
        self._base_peak = classes.fixed_peaks.get(device, 0)
        self._base_piece = classes.fixed_pieces.get(device, 0)
        self._device = device
        self._known: dict[tuple[int, ...], int | None] = {}
        self._ways: list[list[tuple[int, Option]]] = [
            sorted(
                ((index, option) for index, option in enumerate(classes.options(number)) if option.home == device),
                key=lambda way: (way[1].nanoseconds, way[0]),
            )
            for number in range(len(classes.members))
        ]
        self._peaks: list[int] = []
        self._pieces: list[set[int]] = []
        self._demands: list[int] = []
        self._nanoseconds: list[int] = []
        for ways in self._ways:
            options = [option for _, option in ways]
            self._peaks.append(max((at(option.peaks, device) for option in options), default=0))
            self._pieces.append({at(option.pieces, device) for option in options})
            self._demands.append(at(options[0].demands, device) if options else 0)
            self._nanoseconds.append(options[0].nanoseconds if options else 0)
        self._singles: dict[tuple[int, int], _Frontier] = {}
        self._alike: dict[tuple[int, int], list[_Frontier]] = {}
        self._joined: dict[tuple[object, ...], _Frontier] = {}

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
                freed = self._demands[number] - at(option.demands, self._device)
                if freed > 0 and at(option.pieces, self._device) <= piece:
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
