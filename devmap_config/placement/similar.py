"""Classes of blocks that are nearly alike, joined: the bound may be a little less, and is found far sooner."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from devmap_config.placement.classes import Classes, at

if TYPE_CHECKING:
    from devmap_config.placement.chain import Bytes, Option

JOINING_LOSS = 50_000
"""Blocks are joined whose times and bytes differ by at most this part, a fifty-thousandth, of what there is."""


class SimilarClasses(Classes):
    """Classes of which some are joined, each option with the least of what theirs take."""

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Positions of the free blocks, by what they were joined to."""
        return tuple(
            tuple(sorted(position for number in group for position in self._exact.members[number]))
            for group in self._joined
        )

    def options(self, number: int) -> tuple[Option, ...]:
        """The options of a class: of each, the least."""
        return self._least_options[number]

    @cached_property
    def _least_options(self) -> list[tuple[Option, ...]]:
        found = []
        for group in self._joined:
            options = self._exact.options(group[0])
            for other in group[1:]:
                options = tuple(map(_lesser, options, self._exact.options(other)))
            found.append(options)
        return found

    @cached_property
    def _exact(self) -> Classes:
        return Classes(self.chain)

    @cached_property
    def _joined(self) -> list[list[int]]:
        exact = self._exact
        total = self.fixed_nanoseconds + sum(
            min(option.nanoseconds for option in exact.options(number)) * len(positions)
            for number, positions in enumerate(exact.members)
        )
        room = max(self.chain.capacities.values(), default=0)
        groups: list[list[int]] = []
        for number in sorted(range(len(exact.members)), key=lambda each: (-len(exact.members[each]), each)):
            for group in groups:
                if self._are_similar(group[0], number, total // JOINING_LOSS, room // JOINING_LOSS):
                    group.append(number)
                    break
            else:
                groups.append([number])
        return groups

    def _are_similar(self, one: int, other: int, nanoseconds: int, size_bytes: int) -> bool:
        count = len(self._exact.members[one]) + len(self._exact.members[other])
        pairs = list(zip(self._exact.options(one), self._exact.options(other), strict=False))
        if [first.place for first, _ in pairs] != [second.place for _, second in pairs]:
            return False
        if len(self._exact.options(one)) != len(self._exact.options(other)):
            return False
        return all(
            count * abs(first.nanoseconds - second.nanoseconds) <= nanoseconds
            and count * _difference(first.demands, second.demands) <= size_bytes
            and _difference(first.peaks, second.peaks) <= size_bytes
            and _difference(first.pieces, second.pieces) <= size_bytes
            for first, second in pairs
        )


def _difference(first: Bytes, second: Bytes) -> int:
    return max(
        (abs(size - at(other, device)) for one, other in ((first, second), (second, first)) for device, size in one),
        default=0,
    )


def _lesser(first: Option, second: Option) -> Option:
    return replace(
        first,
        nanoseconds=min(first.nanoseconds, second.nanoseconds),
        demands=_lesser_bytes(first.demands, second.demands),
        peaks=_lesser_bytes(first.peaks, second.peaks),
        pieces=_lesser_bytes(first.pieces, second.pieces),
    )


def _lesser_bytes(first: Bytes, second: Bytes) -> Bytes:
    return tuple((device, min(size, at(second, device))) for device, size in first)
