"""Partial answers to how many blocks of each class take which option, side by side, and which of them are needed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

MOST_PARTIALS = 30_000
"""With more partial answers than this a count is given up."""

MOST_EXPANDED = 300_000
"""With so many, too, before those that are not needed are gone."""

MOST_PROMISING = 1_000
"""So many go on where not all need to."""

COMPARED = 16
"""A partial answer is compared with so many that come before it in order of time."""

WORTH_REPEATING = 4
"""They are compared again when that many-th part of them was not needed."""

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class TooManyError(Exception):
    """There are more partial answers than can be kept."""


@dataclass(frozen=True, slots=True)
class Partials:
    """Partial answers, one a row.

    `left` counts blocks by class. What is used of devices, one a column, is what is `held`, and the largest of the
    `peaks` and of the `pieces`. `is_entered` where anything runs on the device that takes blocks now.
    """

    nanoseconds: Integers
    left: Integers
    held: Integers
    peaks: Integers
    pieces: Integers
    is_entered: Integers

    def __len__(self) -> int:
        return len(self.nanoseconds)

    def rows(self, rows: Integers) -> Partials:
        """Some of them."""
        return Partials(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def used(self) -> Integers:
        """What each device needs."""
        used: Integers = self.held + self.peaks + self.pieces
        return used


@dataclass(frozen=True, slots=True)
class Step:
    """Any number of the blocks that are left of one class take an option; all of them where it is their last."""

    kind: int
    nanoseconds: int
    demands: Integers
    peaks: Integers
    pieces: Integers
    is_last: bool


@dataclass(frozen=True, slots=True)
class Tests:
    """Sums of time, of what is used and of what the rest takes at least, which must not be above limits; one a row."""

    weights: Integers
    rates: Integers
    least_costs: Integers
    limits: Integers
    ladders: tuple[Integers, ...]
    """For each device the peaks that blocks may have there, and what those with no higher peak can hold at most."""

    def slack(self, partials: Partials) -> Integers:
        """By how much each is below each limit."""
        sums = partials.nanoseconds[:, None] * self.weights + partials.used @ self.rates.T
        slack: Integers = self.limits - sums - partials.left @ self.least_costs.T
        return slack

    def least_slack(self, partials: Partials, room: Integers) -> Integers:
        """The same, without the room that cannot be used: more blocks may come with a higher peak only."""
        unusable = np.zeros_like(partials.held)
        for place, ladder in enumerate(self.ladders):
            free = room[place] - partials.used[:, place]
            higher = np.maximum(ladder[:, 0] - partials.peaks[:, place, None], 0)
            usable = np.minimum(free[:, None] - higher, ladder[:, 1]).max(axis=1)
            unusable[:, place] = np.maximum(free - usable, 0)
        slack: Integers = self.slack(partials) - unusable @ self.rates.T
        return slack


def after(
    partials: Partials, step: Step, tests: Tests, room: Integers, *, all_of_them: bool = True
) -> tuple[Partials, Integers, Integers]:
    """What comes of each, so far as it is possible and needed; which each comes from, and how many took the option.

    Raises:
        TooManyError: where all of them are wanted and are too many, or what each may come to is.
    """
    left = partials.left[:, step.kind]
    if step.is_last:
        parents, taken = np.arange(len(left)), left
    else:
        least, most = _range(partials, step, tests, room)
        ways = np.maximum(most - least + 1, 0)
        if int(ways.sum()) > MOST_EXPANDED:
            raise TooManyError
        parents = np.repeat(np.arange(len(left)), ways)
        taken = np.arange(len(parents)) - (np.cumsum(ways) - ways - least)[parents]
    before = partials.rows(parents)
    before.left[:, step.kind] -= taken
    is_taken = (taken > 0)[:, None]
    found = Partials(
        before.nanoseconds + taken * step.nanoseconds,
        before.left,
        before.held + taken[:, None] * step.demands,
        np.maximum(before.peaks, is_taken * step.peaks),
        np.maximum(before.pieces, is_taken * step.pieces),
        before.is_entered | (taken > 0),
    )
    slack = tests.least_slack(found, room)
    is_possible = np.all(found.used <= room, axis=1) & np.all(slack >= 0, axis=1)
    rows = np.flatnonzero(is_possible)
    rows = rows[needed(found.rows(rows))]
    if not all_of_them:
        by_time = slack[rows][:, tests.weights > 0].min(axis=1)
        rows = rows[np.sort(np.argsort(-by_time, kind="stable")[:MOST_PROMISING])]
    elif len(rows) > MOST_PARTIALS:
        raise TooManyError
    return found.rows(rows), parents[rows], taken[rows]


def _range(partials: Partials, step: Step, tests: Tests, room: Integers) -> tuple[Integers, Integers]:
    """How many blocks can take the option at least and at most, for all that is known of the rest."""
    least, most = np.zeros_like(partials.nanoseconds), partials.left[:, step.kind]
    free = room - partials.used
    for place in np.flatnonzero(step.demands):
        most = np.minimum(most, free[:, place] // step.demands[place])
    slack = tests.slack(partials)
    costs = tests.weights * step.nanoseconds + tests.rates @ step.demands
    for row, extra in enumerate(costs - tests.least_costs[:, step.kind]):
        if extra > 0:
            most = np.minimum(most, slack[:, row] // extra)
        elif extra < 0:
            least = np.maximum(least, -(slack[:, row] // -extra))
    return least, most


def needed(partials: Partials) -> Integers:
    """Those that none of the others that they were compared with makes needless, neither slower nor larger."""
    sizes = (partials.held, partials.peaks, partials.pieces)
    columns = [partials.is_entered, *(each[:, place] for each in sizes for place in range(each.shape[1]))]
    columns = [column for column in columns if len(column) and column.min() < column.max()]
    kinds = [kind for kind in partials.left.T if len(kind) and kind.min() < kind.max()]
    rows = np.lexsort((*reversed(columns), partials.nanoseconds, *kinds))
    count = 0
    while len(rows) > 1 and len(rows) != count:
        count = len(rows)
        is_needless = _is_needless([kind[rows] for kind in kinds], [column[rows] for column in columns], count)
        rows = rows[~is_needless]
        if len(rows) * WORTH_REPEATING > count * (WORTH_REPEATING - 1):
            break
    return rows


def _is_needless(
    kinds: list[Integers], columns: list[Integers], count: int
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Of rows in order of time, whether one of the last few before is of the same kinds and nowhere larger."""
    is_needless = np.zeros(count, bool)
    for distance in range(1, min(COMPARED, count - 1) + 1):
        is_worse = np.ones(count - distance, bool)
        for kind in kinds:
            is_worse &= kind[:-distance] == kind[distance:]
        for column in columns:
            is_worse &= column[:-distance] <= column[distance:]
        is_needless[distance:] |= is_worse
    return is_needless
