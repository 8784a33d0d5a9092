"""Blocks of a chain that can be placed alike, and its groups settled one way after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from devmap_config.placement.chain import Chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from devmap_config.placement.chain import Bytes, Choice, Option
    from devmap_config.placement.problem import DeviceId


def at(sizes: Bytes, device: DeviceId) -> int:
    """The bytes on a device."""
    return next((size_bytes for each, size_bytes in sizes if each == device), 0)


@dataclass(frozen=True)
class Classes:
    """A chain's free blocks by their options, and those that have one option only."""

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
        return sum(option.nanoseconds for option in self._fixed_options)

    @cached_property
    def fixed_bytes(self) -> dict[DeviceId, int]:
        """What the blocks without a choice hold, by device."""
        return self._by_device(lambda option: option.demands, sum)

    @cached_property
    def fixed_peaks(self) -> dict[DeviceId, int]:
        """The largest peak of a block without a choice, by device."""
        return self._by_device(lambda option: option.peaks, max)

    @cached_property
    def fixed_pieces(self) -> dict[DeviceId, int]:
        """The largest piece that is copied in for a block without a choice, by device."""
        return self._by_device(lambda option: option.pieces, max)

    @cached_property
    def _fixed_options(self) -> list[Option]:
        return [self.chain.blocks[position].options[0] for position in self.fixed]

    def _by_device(
        self, sizes_of: Callable[[Option], Bytes], joined: Callable[[list[int]], int]
    ) -> dict[DeviceId, int]:
        sizes: dict[DeviceId, list[int]] = {}
        for option in self._fixed_options:
            for device, size_bytes in sizes_of(option):
                sizes.setdefault(device, []).append(size_bytes)
        return {device: joined(each) for device, each in sizes.items()}


def with_groups_settled(chain: Chain) -> Iterator[Chain]:
    """The chain with every group of several blocks in one place, for one after another of such places."""
    groups: dict[int, list[int]] = {}
    for position, block in enumerate(chain.blocks):
        if block.group is not None:
            groups.setdefault(block.group, []).append(position)
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
            if block.group is None
            else replace(block, options=tuple(each for each in block.options if each.place == settled[block.group]))
            for block in chain.blocks
        )
        yield Chain(blocks, chain.capacities, chain.entering)


def as_in(chain: Chain, settled: Chain, choice: Choice) -> Choice:
    """The same choice by the options of the chain that was settled."""
    pairs = zip(chain.blocks, settled.blocks, choice, strict=True)
    return tuple(block.options.index(narrowed.options[index]) for block, narrowed, index in pairs)
