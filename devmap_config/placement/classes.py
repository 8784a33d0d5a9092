"""Blocks of a chain that can be placed alike, and its groups settled one way after another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from devmap_config.placement.chain import Block, Bytes, Chain, Choice, Hops, Option
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


SETTLED_HOMES = 32
"""Up to so many ways, the homes of blocks that give something to others are settled as well."""


def settled_ways(chain: Chain) -> Iterator[Chain]:
    """The chain with every group in one place, and those that give most to others on one device, in every way.

    What they give is then in the times of those that are given it. The rest of the gifts is left out: each way takes no
    more than the choices of which it is part, so that a bound on all ways is one on all choices. Of ways that differ in
    nothing but which of several devices that are alike is taken, there is one.
    """
    alike = _alike(chain)
    for places, together in _with_groups_settled(chain):
        makers = _greatest_makers(together)
        settled = [place[0] for place in places]
        for homes in product(*(_homes(together.blocks[maker]) for maker in makers)):
            if _takes_the_first(alike, [*settled, *homes]):
                yield _with_homes(together, dict(zip(makers, homes, strict=True)))


def _alike(chain: Chain) -> dict[DeviceId, tuple[DeviceId, ...]]:
    """For each device those that could change places with it and nothing would be different, itself among them."""
    kinds: list[list[DeviceId]] = []
    for device in chain.devices:
        for kind in kinds:
            if _could_change_places(chain, kind[0], device):
                kind.append(device)
                break
        else:
            kinds.append([device])
    return {device: tuple(kind) for kind in kinds for device in kind}


def _could_change_places(chain: Chain, one: DeviceId, other: DeviceId) -> bool:
    if chain.capacities.get(one) != chain.capacities.get(other):
        return False
    swapped = {one: other, other: one}

    def is_same(hops: Hops) -> bool:
        return all(
            hops.get((swapped.get(maker, maker), swapped.get(reader, reader))) == nanoseconds
            for (maker, reader), nanoseconds in hops.items()
        )

    def exchanged(option: Option) -> Option:
        sizes = (option.demands, option.peaks, option.pieces)
        demands, peaks, pieces = (tuple((swapped.get(device, device), size) for device, size in each) for each in sizes)
        home = swapped.get(option.home, option.home)
        return replace(option, home=home, demands=demands, peaks=peaks, pieces=pieces)

    ways = dict.fromkeys(block.options for block in chain.blocks)
    passages = {id(hops): hops for hops in (*chain.entering, *(gift.hops for gift in chain.gifts))}
    return all(set(options) == set(map(exchanged, options)) for options in ways) and all(
        map(is_same, passages.values())
    )


def _takes_the_first(alike: Mapping[DeviceId, tuple[DeviceId, ...]], homes: Iterable[DeviceId]) -> bool:
    """Whether no device is taken before those that are like it and come first."""
    taken: set[DeviceId] = set()
    for home in homes:
        before = alike.get(home, (home,))
        if not taken.issuperset(before[: before.index(home)]):
            return False
        taken.add(home)
    return True


def _with_groups_settled(chain: Chain) -> Iterator[tuple[tuple[tuple[str, ...], ...], Chain]]:
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
        yield places, replace(chain, blocks=blocks)


def _greatest_makers(chain: Chain) -> list[int]:
    """Those that give most to others, so many that there are not too many ways to settle their homes."""
    given: dict[int, int] = {}
    for gift in chain.gifts:
        given[gift.maker] = given.get(gift.maker, 0) + max(gift.hops.values(), default=0)
    makers: list[int] = []
    ways = 1
    for maker in sorted((each for each in given if given[each]), key=lambda each: (-given[each], each)):
        ways *= len(_homes(chain.blocks[maker]))
        if ways > SETTLED_HOMES:
            break
        makers.append(maker)
    return makers


def _homes(block: Block) -> list[DeviceId]:
    return list(dict.fromkeys(option.home for option in block.options))


def _with_homes(chain: Chain, homes: Mapping[int, DeviceId]) -> Chain:
    """The chain with these blocks on these devices, and what they give in the times of those that are given it."""
    if not homes:
        return replace(chain, gifts=())
    given: dict[int, list[tuple[DeviceId, Hops]]] = {}
    for gift in chain.gifts:
        if gift.maker in homes:
            given.setdefault(gift.reader, []).append((homes[gift.maker], gift.hops))
    blocks = list(chain.blocks)
    for position, home in homes.items():
        options = tuple(option for option in blocks[position].options if option.home == home)
        blocks[position] = replace(blocks[position], options=options)
    for position, gifts in given.items():
        options = tuple(
            replace(
                option,
                nanoseconds=option.nanoseconds + sum(hops.get((maker, option.home), 0) for maker, hops in gifts),
            )
            for option in blocks[position].options
        )
        blocks[position] = replace(blocks[position], options=options)
    return replace(chain, blocks=tuple(blocks), gifts=())


def as_in(chain: Chain, settled: Chain, choice: Choice) -> Choice:
    """The same choice by the options of the chain that was settled, whatever they take."""

    def what(option: Option) -> tuple[object, ...]:
        return (option.place, option.demands, option.peaks, option.pieces)

    found = []
    for block, narrowed, index in zip(chain.blocks, settled.blocks, choice, strict=True):
        wanted = what(narrowed.options[index])
        found.append(next(place for place, option in enumerate(block.options) if what(option) == wanted))
    return tuple(found)
