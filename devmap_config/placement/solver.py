"""Finds the fastest choice for a chain of blocks, and proves how near to the best possible it is.

The program of numbers of blocks (`program`) gives a bound and numbers, which are laid out along the chain (`layout`).
Where hops keep that above the bound, a second program cuts the chain into a run for each device. Few blocks are a
program of their own each, in which every hop is counted: its answer is the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

from devmap_config.placement.chain import Gift
from devmap_config.placement.layout import improved, in_runs, laid_out, laid_out_in_runs, order_in
from devmap_config.placement.program import BOUND_TOLERANCE, INFINITY, NANOSECONDS_PER_UNIT, RELATIVE_GAP, program_of

if TYPE_CHECKING:
    from devmap_config.placement.chain import Chain, Choice, Option
    from devmap_config.placement.program import Program

FEW_CHOICES = 200_000
"""With so many choices at most the program is stated block by block, and solved to the optimum."""

WORTH_CUTTING = 500
"""A choice that is above the bound by more than this part, a five-hundredth, is compared with one in runs."""

LEAST_TOLERANCE = 1e-3
"""Nanoseconds that are taken off a bound at least."""

UNREACHABLE = 2**62


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice, what it takes, and what no choice can be below."""

    choice: Choice
    nanoseconds: int
    bound_nanoseconds: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fastest choice that was found, if any, and what no choice can be below."""

    solution: Solution | None
    bound_nanoseconds: int


def solve(chain: Chain) -> Solution | None:
    """The fastest feasible choice that was found and a proven bound, or `None` where there is none."""
    return solve_below(chain, UNREACHABLE).solution


def solve_below(chain: Chain, at_most: int) -> Outcome:
    """The fastest choice, of which it matters only whether it is below `at_most`: above that, there is no bound.

    The order of options does not matter.
    """
    ordered = _ordered(chain)
    if prod(len(block.options) for block in chain.blocks) <= FEW_CHOICES:
        found, bound = _solved(_with_hops_as_gifts(ordered), at_most, relative_gap=0)
    else:
        found, bound = _solved(ordered, at_most, relative_gap=RELATIVE_GAP)
    best = min((_timed(ordered, choice) for choice in found), default=None)
    if best is None or best[0] >= at_most:
        return Outcome(None, min(bound, at_most))
    nanoseconds, choice = best
    return Outcome(Solution(_as_in(chain, ordered, choice), nanoseconds, bound), bound)


def _solved(chain: Chain, at_most: int, *, relative_gap: float) -> tuple[list[Choice], int]:
    """Feasible choices, the best among them, and the bound."""
    program = program_of(chain)
    if at_most < UNREACHABLE:
        program.rows.row(program.costs, -INFINITY, at_most / NANOSECONDS_PER_UNIT)
    solved = program.rows.minimized(program.costs, relative_gap=relative_gap)
    bound = _whole(solved.bound)
    if solved.values is None:
        return [], bound
    choices = [improved(chain, laid_out(program, solved.values))]
    if (chain.nanoseconds(choices[0]) - bound) * WORTH_CUTTING > bound and relative_gap != 0:
        choices += _cut(program, choices[0])
    feasible = [choice for choice in choices if chain.is_feasible(choice)]
    return feasible or _within(chain, choices[0], at_most, relative_gap), bound


def _cut(program: Program, choice: Choice) -> list[Choice]:
    """Choices with one run of blocks for each device that a choice uses, in a few orders of these."""
    chain, order = program.chain, order_in(program, choice)
    found = []
    for each in dict.fromkeys((order, order[::-1], tuple(device for device in chain.devices if device in order))):
        rows, costs, ends = in_runs(program, each)
        values = rows.minimized(costs).values
        if values is not None:
            found.append(improved(chain, laid_out_in_runs(program, values, each, ends)))
    return found


def _within(chain: Chain, choice: Choice, at_most: int, relative_gap: float) -> list[Choice]:
    """Feasible choices where the program's was over a device's memory by what floating point does not see."""
    room = dict(chain.capacities)
    for device, used_bytes in chain.used_bytes(choice).items():
        over = used_bytes - chain.capacities.get(device, 0)
        if over > 0:
            room[device] = room.get(device, 0) - 2 * over
    if min(room.values()) < 0:
        return []
    choices, _ = _solved(replace(chain, capacities=room), at_most, relative_gap=relative_gap)
    return choices


def _timed(chain: Chain, choice: Choice) -> tuple[int, Choice]:
    return chain.nanoseconds(choice), choice


def _whole(bound: float) -> int:
    """The least whole number of nanoseconds that is not below a bound, for all that floating point may have added."""
    nanoseconds = bound * NANOSECONDS_PER_UNIT
    if nanoseconds >= UNREACHABLE:
        return UNREACHABLE
    return max(ceil(nanoseconds - max(nanoseconds * BOUND_TOLERANCE, LEAST_TOLERANCE)), 0)


def _with_hops_as_gifts(chain: Chain) -> Chain:
    """The same, where what a block is given by the one before is told as what it is given by others."""
    hops = [Gift(position - 1, position, costs) for position, costs in enumerate(chain.entering) if position and costs]
    return replace(chain, entering=tuple({} for _ in chain.blocks), gifts=(*chain.gifts, *hops))


def _ordered(chain: Chain) -> Chain:
    """The chain with the options of every block in an order that depends on nothing but what they are."""
    places = {device: place for place, device in enumerate(chain.capacities)}
    known: dict[tuple[Option, ...], tuple[Option, ...]] = {}

    def order(option: Option) -> tuple[object, ...]:
        sizes = (option.demands, option.peaks, option.pieces)
        return (places.get(option.home, len(places)), option.home, option.nanoseconds, option.mode, *map(sorted, sizes))

    for block in chain.blocks:
        if block.options not in known:
            known[block.options] = tuple(sorted(block.options, key=order))
    return replace(chain, blocks=tuple(replace(block, options=known[block.options]) for block in chain.blocks))


def _as_in(chain: Chain, settled: Chain, choice: Choice) -> Choice:
    """The same choice by the options of the chain that was settled, whatever they take."""

    def what(option: Option) -> tuple[object, ...]:
        return (option.place, option.demands, option.peaks, option.pieces)

    found = []
    for block, narrowed, index in zip(chain.blocks, settled.blocks, choice, strict=True):
        wanted = what(narrowed.options[index])
        found.append(next(place for place, option in enumerate(block.options) if what(option) == wanted))
    return tuple(found)
