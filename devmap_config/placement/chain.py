"""The problem that the solver solves: blocks that run one after another, and the ways in which each can be placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from devmap_config.devices import Device

Mode = (
    tuple[Literal["resident"]]
    | tuple[Literal["computed"]]
    | tuple[Literal["streamed"], "Device"]
    | tuple[Literal["part"], str]
)
"""How a block is stored: where it runs, streamed from a device, or all but a part, which is computed on the CPU."""

Place = tuple["Device", Mode]

Bytes = tuple[tuple["Device", int], ...]
"""Bytes by device."""

Choice = tuple[int, ...]
"""For each block, which of its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way of placing a block.

    It runs on `home` and takes `nanoseconds` there. Of `demands` a device holds all that its blocks ask for; of `peaks`
    the largest, since blocks run one after another, and of `pieces` (weights that are copied in) the largest as well.
    `mode` says how it is stored; it means nothing to the solver.
    """

    home: Device
    nanoseconds: int
    demands: Bytes = ()
    peaks: Bytes = ()
    pieces: Bytes = ()
    mode: Mode = ("resident",)

    @property
    def place(self) -> Place:
        """Where and how: what blocks of one group share."""
        return (self.home, self.mode)


@dataclass(frozen=True, slots=True)
class Block:
    """What is placed as a whole. Blocks of one `group` share a place."""

    name: str
    options: tuple[Option, ...]
    group: int | None = None


Hops = Mapping[tuple["Device", "Device"], int]
"""What it costs to get from one device to another, in nanoseconds; a pair that is not there costs nothing."""


@dataclass(frozen=True, slots=True)
class Gift:
    """What one block gives another that does not come next, by positions: an encoder's output, a table of positions."""

    maker: int
    reader: int
    hops: Hops


@dataclass(frozen=True)
class Chain:
    """Blocks in the order in which they run.

    `entering` holds, for each block, what it costs to get to it from the block before; `gifts` what else passes between
    two blocks.
    """

    blocks: tuple[Block, ...]
    capacities: Mapping[Device, int]
    entering: tuple[Hops, ...]
    gifts: tuple[Gift, ...] = ()

    def nanoseconds(self, choice: Choice) -> int:
        """What a choice takes."""
        chosen = [block.options[index] for block, index in zip(self.blocks, choice, strict=True)]
        total = sum(option.nanoseconds for option in chosen)
        for position in range(1, len(chosen)):
            pair = (chosen[position - 1].home, chosen[position].home)
            total += self.entering[position].get(pair, 0)
        for gift in self.gifts:
            total += gift.hops.get((chosen[gift.maker].home, chosen[gift.reader].home), 0)
        return total

    def used_bytes(self, choice: Choice) -> dict[Device, int]:
        """What each device needs under a choice."""
        demands: dict[Device, int] = {}
        peaks: dict[Device, int] = {}
        pieces: dict[Device, int] = {}
        for block, index in zip(self.blocks, choice, strict=True):
            option = block.options[index]
            for device, size_bytes in option.demands:
                demands[device] = demands.get(device, 0) + size_bytes
            for device, size_bytes in option.peaks:
                peaks[device] = max(peaks.get(device, 0), size_bytes)
            for device, size_bytes in option.pieces:
                pieces[device] = max(pieces.get(device, 0), size_bytes)
        devices = dict.fromkeys([*demands, *peaks, *pieces])
        return {device: demands.get(device, 0) + peaks.get(device, 0) + pieces.get(device, 0) for device in devices}

    def is_feasible(self, choice: Choice) -> bool:
        """Whether every device holds what it needs, and every group shares a place."""
        used = self.used_bytes(choice)
        if any(size_bytes > self.capacities.get(device, 0) for device, size_bytes in used.items()):
            return False
        places: dict[int, Place] = {}
        for block, index in zip(self.blocks, choice, strict=True):
            place = block.options[index].place
            if block.group is not None and places.setdefault(block.group, place) != place:
                return False
        return True

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Where any block could run, in the order of the capacities."""
        homes = {option.home for block in self.blocks for option in block.options}
        return tuple(device for device in self.capacities if device in homes)
