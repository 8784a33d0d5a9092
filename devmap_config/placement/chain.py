"""The problem that the solver solves: blocks that run one after another, each with the options for placing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from devmap_config.execution.overlap import total_nanoseconds

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.execution.overlap import Ahead

Mode = (
    tuple[Literal["resident"]]
    | tuple[Literal["computed"]]
    | tuple[Literal["streamed", "streamed elsewhere"], "Device"]
    | tuple[Literal["part", "streamed around"], str]
)
"""How a block is stored: resident on its device, computed on the CPU, streamed from a device to the main device or
another one, or except for a part that the CPU computes: resident, or streamed from the CPU to the main device.
"""

STREAMED = ("streamed", "streamed elsewhere", "streamed around")
"""The modes of blocks that are copied in at every forward."""

Place = tuple["Device", Mode]

Bytes = tuple[tuple["Device", int], ...]
"""Bytes by device."""

Choice = tuple[int, ...]
"""The index of an option for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way of placing a block.

    The block runs on `home` and takes `nanoseconds` there; `ahead` is the time that overlaps with copies to other
    cards. A device needs the sum of its blocks' `demands`, but only the largest of their `peaks`, since blocks run one
    after another, and likewise of their `pieces` (weights that are copied in) and `visits` (parts of an offloaded cache
    in transit). `mode` says how the block is stored. Parts that no rule pins run on `around`, if that is not `home`.
    With `offloads_cache`, the plan chooses to have the block's cache on the CPU while it does not run.
    """

    home: Device
    nanoseconds: int
    demands: Bytes = ()
    peaks: Bytes = ()
    pieces: Bytes = ()
    visits: Bytes = ()
    mode: Mode = ("resident",)
    around: Device | None = None
    ahead: tuple[Ahead, ...] = ()
    offloads_cache: bool = False

    @property
    def place(self) -> Place:
        """The device and the mode, which blocks of one group share."""
        return (self.around or self.home, self.mode)


def together(options: Sequence[Option]) -> Option:
    """Return the sum of the options of several blocks; its place is that of the first."""
    demands: Counter[Device] = Counter()
    peaks: dict[Device, int] = {}
    pieces: dict[Device, int] = {}
    visits: dict[Device, int] = {}
    for option in options:
        demands.update(dict(option.demands))
        for largest, sizes in ((peaks, option.peaks), (pieces, option.pieces), (visits, option.visits)):
            for device, size_bytes in sizes:
                largest[device] = max(largest.get(device, 0), size_bytes)
    return Option(
        home=options[0].home,
        nanoseconds=sum(option.nanoseconds for option in options),
        demands=tuple(demands.items()),
        peaks=tuple(peaks.items()),
        pieces=tuple(pieces.items()),
        visits=tuple(visits.items()),
        mode=options[0].mode,
        ahead=tuple(block for option in options for block in option.ahead),
        offloads_cache=any(option.offloads_cache for option in options),
    )


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model that is placed as a whole. Blocks of one `group` share a place."""

    name: str
    options: tuple[Option, ...]
    group: int | None = None


TransferTimes = Mapping[tuple["Device", "Device"], int]
"""The time of a transfer by source and target device, in nanoseconds; missing pairs take no time."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The activations that one block passes to another: hidden states to the next, an encoder's output to its decoder.

    Attributes:
        source: the position of the block that makes them.
        target: the position of the block that takes them.
        nanoseconds: the time by pair of devices; transfers with equal times share one mapping.
    """

    source: int
    target: int
    nanoseconds: TransferTimes


@dataclass(frozen=True)
class Chain:
    """Blocks in the order in which they run, and the transfers between them."""

    blocks: tuple[Block, ...]
    capacities: Mapping[Device, int]
    transfers: tuple[Transfer, ...] = ()

    def nanoseconds(self, choice: Choice) -> int:
        """Return the time of a choice: the sum over all blocks and transfers."""
        chosen = [block.options[index] for block, index in zip(self.blocks, choice, strict=True)]
        total = total_nanoseconds(chosen)
        for transfer in self.transfers:
            total += transfer.nanoseconds.get((chosen[transfer.source].home, chosen[transfer.target].home), 0)
        return total

    def used_bytes(self, choice: Choice) -> dict[Device, int]:
        """Return the bytes that each device needs under a choice of options."""
        whole = together([block.options[index] for block, index in zip(self.blocks, choice, strict=True)])
        used: Counter[Device] = Counter()
        for sizes in (whole.demands, whole.peaks, whole.pieces, whole.visits):
            used.update(dict(sizes))
        return used

    def is_feasible(self, choice: Choice) -> bool:
        """Return whether a choice fits on every device, and every group shares a place."""
        used = self.used_bytes(choice)
        if any(size_bytes > self.capacities.get(device, 0) for device, size_bytes in used.items()):
            return False
        places: dict[int, Place] = {}
        for block, index in zip(self.blocks, choice, strict=True):
            place = block.options[index].place
            if block.group is not None and places.setdefault(block.group, place) != place:
                return False
        return True

    def with_times_of(self, other: Chain) -> Chain:
        """Return this chain with the times of another chain that has the same options, or some of them."""
        timed: dict[tuple[int, int], tuple[Option, ...]] = {}  # equal blocks share their options
        blocks = []
        for block, its in zip(self.blocks, other.blocks, strict=True):
            key = (id(block.options), id(its.options))
            if key not in timed:
                times = {(option.place, option.offloads_cache): option for option in its.options}
                pairs = ((option, times.get((option.place, option.offloads_cache))) for option in block.options)
                timed[key] = tuple(
                    replace(option, nanoseconds=same.nanoseconds, ahead=same.ahead)
                    for option, same in pairs
                    if same is not None
                )
            blocks.append(replace(block, options=timed[key]))
        return replace(self, blocks=tuple(blocks), transfers=other.transfers)

    @cached_property
    def hops(self) -> dict[int, TransferTimes]:
        """The times of the transfer from the previous block, by block, if both have several options."""
        free = [len(block.options) > 1 for block in self.blocks]
        hops: dict[int, TransferTimes] = {}
        for transfer in self.transfers:
            target, times = transfer.target, transfer.nanoseconds
            if target == transfer.source + 1 and free[transfer.source] and free[target]:
                others = hops.get(target, {})
                hops[target] = {pair: times[pair] + others.get(pair, 0) for pair in times} if others else times
        return hops

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The devices on which any block can run, in the order of the capacities."""
        homes = {option.home for block in self.blocks for option in block.options}
        return tuple(device for device in self.capacities if device in homes)
