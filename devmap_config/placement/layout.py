"""Lays out the counts of a solved program along the chain: assigns options to blocks so that there are few hops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from devmap_config.devices import Device
from devmap_config.execution.overlap import Clock
from devmap_config.placement.chain import STREAMED
from devmap_config.placement.program import HOPS_UNIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devmap_config.placement.chain import Block, Chain, Choice, Option
    from devmap_config.placement.milp import Milp
    from devmap_config.placement.program import Program


def laid_out(program: Program, values: Sequence[int], runs: Runs | None = None) -> Choice:
    """Return a choice with the counts of `values`, in which each block runs on the device of the one before if it can.

    Args:
        program: the program that was solved.
        values: the values of its variables.
        runs: the runs that these values cut the chain into, if the program states any.
    """
    places = {} if runs is None else runs.devices(program, values)
    left = {
        (number, index): values[variable]
        for number, variables in enumerate(program.counts)
        for index, variable in enumerate(variables)
    }
    on_home = Counter[Device]()
    for (number, index), count in left.items():
        on_home[program.classes[number].options[index].home] += count
    member_at = {
        member[0]: (number, member)
        for number, block_class in enumerate(program.classes)
        for member in block_class.members
    }
    choice: dict[int, int] = {}
    home: Device | None = None
    for position, block in enumerate(program.chain.blocks):
        if position not in choice:
            number, member = member_at[position]
            homes = [option.home for option in program.classes[number].options]
            preferred_home = places.get(position, home)
            index = min(
                (index for index in range(len(homes)) if left[number, index] > 0),
                key=lambda index: (homes[index] != preferred_home, -on_home[homes[index]], index),
            )
            left[number, index] -= 1
            on_home[homes[index]] -= 1
            choice |= dict(zip(member, program.classes[number].choices[index], strict=True))
        home = block.options[choice[position]].home
    return tuple(choice[position] for position in range(len(program.chain.blocks)))


def in_turns(chain: Chain, choice: Choice) -> Choice:
    """Return the faster of a choice and the same counts with cards taking turns at blocks that are copied ahead.

    While one card computes, the links of the others copy. So each such block, among equal ones, goes to the card that
    would finish it first.
    """
    left: dict[tuple[Option, ...], Counter[int]] = {}
    for block, index in zip(chain.blocks, choice, strict=True):
        if _is_copied_ahead(block, index):
            left.setdefault(block.options, Counter())[index] += 1
    turns, clock = list(choice), Clock()
    for position, block in enumerate(chain.blocks):
        if _is_copied_ahead(block, choice[position]):
            indices = sorted(index for index, count in left[block.options].items() if count)
            ends = {index: sum(map(clock.end_of, block.options[index].ahead)) for index in indices}
            index = turns[position] = min(indices, key=ends.__getitem__)
            left[block.options][index] -= 1
            clock.run(block.options[index].ahead)
    return min(choice, tuple(turns), key=chain.nanoseconds)


def _is_copied_ahead(block: Block, index: int) -> bool:
    """Return whether a block belongs to no group and its option is copied ahead over one of several links."""
    option = block.options[index]
    return block.group is None and bool(option.ahead) and option.mode[0] in STREAMED


@dataclass(frozen=True)
class Runs:
    """The program with its free blocks cut into one run for each device in an order; a run may be empty.

    `ends` holds, for each run except the last, a switch for every place at which the run may end.
    """

    milp: Milp
    order: tuple[Device, ...]
    ends: tuple[tuple[int, ...], ...]

    def devices(self, program: Program, values: Sequence[int]) -> dict[int, Device]:
        """Return the device of the run that each free block is in, by position."""
        free = free_positions(program)
        begin = 0
        device_at: dict[int, Device] = {}
        for device, switches in zip(self.order, [*self.ends, None], strict=True):
            end = (
                len(free)
                if switches is None
                else next(place for place, switch in enumerate(switches) if values[switch])
            )
            device_at |= dict.fromkeys(free[begin:end], device)
            begin = end
        return device_at


def in_runs(program: Program, order: tuple[Device, ...]) -> Runs:
    """State that the free blocks are cut into one run for each device in this order."""
    milp, free = program.milp.copy(), free_positions(program)
    ends = tuple(tuple(milp.switch() for _ in range(len(free) + 1)) for _ in order[1:])
    costs = {program.hops: -HOPS_UNIT}
    for pair, switches in zip(pairwise(order), ends, strict=True):
        milp.equal(dict.fromkeys(switches, 1), 1)
        for place, switch in enumerate(switches[1:-1], 1):
            costs[switch] = program.chain.hops.get(free[place], {}).get(pair, 0)
    milp.at_most(costs, 0)
    for number in filter(lambda number: _is_free(program, number), range(len(program.classes))):
        positions = {position for (position,) in program.classes[number].members}
        before = [sum(position in positions for position in free[:place]) for place in range(len(free) + 1)]
        on_device = program.by_home(number)
        for run, device in enumerate(order):
            is_last = run == len(ends)
            terms = dict.fromkeys(on_device.pop(device, ()), 1)
            terms |= {} if is_last else {switch: -before[place] for place, switch in enumerate(ends[run])}
            terms |= {} if run == 0 else {switch: before[place] for place, switch in enumerate(ends[run - 1])}
            milp.equal(terms, len(positions) if is_last else 0)
    return Runs(milp, order, ends)


def free_positions(program: Program) -> list[int]:
    """Return the positions of the blocks that belong to no group and have several options."""
    free = (block_class for number, block_class in enumerate(program.classes) if _is_free(program, number))
    return sorted(position for block_class in free for (position,) in block_class.members)


def _is_free(program: Program, number: int) -> bool:
    block_class = program.classes[number]
    return len(block_class.options) > 1 and len(block_class.members[0]) == 1


def order_in(program: Program, choice: Choice) -> tuple[Device, ...]:
    """Return the devices of the free blocks of a choice, ordered by the mean position of their blocks."""
    positions: dict[Device, list[int]] = {}
    for position in free_positions(program):
        home = program.chain.blocks[position].options[choice[position]].home
        positions.setdefault(home, []).append(position)
    return tuple(sorted(positions, key=lambda device: sum(positions[device]) / len(positions[device])))
