"""Numbers of blocks along the chain: which block takes which option, so that the forward hops seldom."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from devmap_config.devices import Device
from devmap_config.placement.program import INFINITY, NANOSECONDS_PER_UNIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devmap_config.placement.chain import Chain, Choice, Option
    from devmap_config.placement.program import Program, Rows, Terms

IMPROVING_PASSES = 8
"""So often at most single blocks are moved to where they are faster."""


def laid_out(program: Program, values: Sequence[int]) -> Choice:
    """Return a choice with these numbers: as long as there are any, a block runs where the one before does."""
    devices = program.chain.devices
    return _chosen(program, values, [devices] * len(program.chain.blocks))


def _chosen(program: Program, values: Sequence[int], allowed: Sequence[Sequence[Device]]) -> Choice:
    """The numbers along the chain, each free block on a device that is allowed at its position."""
    left = {
        (number, index): values[column]
        for number, columns in enumerate(program.numbers)
        for index, column in enumerate(columns)
    }
    member_at = {
        position: (number, member)
        for number, each in enumerate(program.classes)
        for member in each.members
        for position in member
    }
    choice: dict[int, int] = {}
    home: Device | None = None
    for position, block in enumerate(program.chain.blocks):
        if position not in choice:
            number, member = member_at[position]
            options = program.classes[number].options
            on_home = Counter[Device]()
            for (other, index), count in left.items():
                on_home[program.classes[other].options[index].home] += count
            index = min(
                (index for index in range(len(options)) if left[number, index] > 0),
                key=lambda index: (
                    options[index].home not in allowed[position],
                    options[index].home != home,
                    -on_home[options[index].home],
                    index,
                ),
            )
            left[number, index] -= 1
            choice |= dict(zip(member, program.classes[number].choices[index], strict=True))
        home = block.options[choice[position]].home
    return tuple(choice[position] for position in range(len(program.chain.blocks)))


def in_runs(program: Program, order: Sequence[Device]) -> tuple[Rows, Terms, list[list[int]]]:
    """State that the free blocks are cut into one run for each device in this order; a run may be empty.

    Returns:
        The program's rows with those of the cuts, what the objective counts, and for each run but the last a column
        for every place at which it may end.
    """
    rows, costs, free = program.rows.copy(), dict(program.costs), free_positions(program)
    ends = [[rows.column(1) for _ in range(len(free) + 1)] for _ in order[1:]]
    for hop, columns in zip(pairwise(order), ends, strict=True):
        rows.row(dict.fromkeys(columns, 1), 1, 1)
        for place, column in enumerate(columns[1:-1], 1):
            costs[column] = program.chain.entering[free[place]].get(hop, 0) / NANOSECONDS_PER_UNIT
    for earlier, later in pairwise(ends):
        behind = {column: place for place, column in enumerate(earlier)}
        rows.row(behind | {column: -place for place, column in enumerate(later)}, -INFINITY, 0)
    for number in filter(lambda number: _is_free(program, number), range(len(program.classes))):
        on_device = _columns_by_home(program, number)
        positions = {position for (position,) in program.classes[number].members}
        before = [sum(position in positions for position in free[:place]) for place in range(len(free) + 1)]
        for run, device in enumerate(order):
            terms: dict[int, float] = dict.fromkeys(on_device.pop(device, ()), 1)
            is_last = run == len(ends)
            if not is_last:
                terms |= {column: -before[place] for place, column in enumerate(ends[run])}
            if run > 0:
                terms |= {column: before[place] for place, column in enumerate(ends[run - 1])}
            rows.row(terms, *[len(positions) if is_last else 0] * 2)
        rows.row(dict.fromkeys((column for columns in on_device.values() for column in columns), 1), 0, 0)
    return rows, costs, ends


def _columns_by_home(program: Program, number: int) -> dict[Device, list[int]]:
    found: dict[Device, list[int]] = {}
    for column, option in zip(program.numbers[number], program.classes[number].options, strict=True):
        found.setdefault(option.home, []).append(column)
    return found


def laid_out_in_runs(
    program: Program, values: Sequence[int], order: Sequence[Device], ends: Sequence[Sequence[int]]
) -> Choice:
    """Return the choice that the cuts make."""
    free = free_positions(program)
    last = [next(place for place, column in enumerate(columns) if values[column]) for columns in ends] + [len(free)]
    allowed: list[Sequence[Device]] = [program.chain.devices] * len(program.chain.blocks)
    begin = 0
    for device, end in zip(order, last, strict=True):
        for position in free[begin:end]:
            allowed[position] = (device,)
        begin = max(begin, end)
    return _chosen(program, values, allowed)


def free_positions(program: Program) -> list[int]:
    """Positions of the blocks that have a choice by themselves."""
    numbers = (number for number in range(len(program.classes)) if _is_free(program, number))
    return sorted(position for number in numbers for (position,) in program.classes[number].members)


def _is_free(program: Program, number: int) -> bool:
    each = program.classes[number]
    return len(each.options) > 1 and len(each.members[0]) == 1


def order_in(program: Program, choice: Choice) -> tuple[Device, ...]:
    """Return the devices in the order in which the free blocks of a choice use them, by their mean position."""
    positions: dict[Device, list[int]] = {}
    for position in free_positions(program):
        home = program.chain.blocks[position].options[choice[position]].home
        positions.setdefault(home, []).append(position)
    return tuple(sorted(positions, key=lambda device: sum(positions[device]) / len(positions[device])))


def improved(chain: Chain, choice: Choice) -> Choice:
    """The choice with single blocks moved to where a neighbour runs, as long as that makes it faster."""
    best = list(choice)

    def homes_around(position: int) -> tuple[Device | None, Device | None]:
        before = chain.blocks[position - 1].options[best[position - 1]].home if position else None
        is_last = position == len(best) - 1
        after = None if is_last else chain.blocks[position + 1].options[best[position + 1]].home
        return before, after

    def local_nanoseconds(position: int, option: Option) -> int:
        before, after = homes_around(position)
        hop_in = 0 if before is None else chain.entering[position].get((before, option.home), 0)
        hop_out = 0 if after is None else chain.entering[position + 1].get((option.home, after), 0)
        return option.nanoseconds + hop_in + hop_out

    for _ in range(IMPROVING_PASSES):
        before = list(best)
        for position, block in enumerate(chain.blocks):
            if len(block.options) == 1 or block.group is not None:
                continue
            now = local_nanoseconds(position, block.options[best[position]])
            here = (*homes_around(position), block.options[best[position]].home)
            for index, option in enumerate(block.options):
                if index == best[position] or option.home not in here:
                    continue
                if (faster := local_nanoseconds(position, option)) < now:
                    changed = [*best[:position], index, *best[position + 1 :]]
                    is_faster = not chain.gifts or chain.nanoseconds(tuple(changed)) < chain.nanoseconds(tuple(best))
                    if is_faster and chain.is_feasible(tuple(changed)):
                        best, now = changed, faster
        if best == before:
            break
    return tuple(best)
