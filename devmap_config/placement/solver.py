"""Finds the fastest choice for a chain of blocks, and proves how near to the best possible it is.

The program of numbers of blocks (`program`) gives a bound and numbers, which are laid out along the chain (`layout`).
Where hops keep that above the bound, a second program cuts the chain into a run for each device. Few blocks are a
class of their own each, and every hop is counted: the answer is then the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING

from devmap_config.placement.layout import in_runs, in_turns, laid_out, order_in
from devmap_config.placement.milp import RELATIVE_GAP
from devmap_config.placement.program import program_of

if TYPE_CHECKING:
    from devmap_config.placement.chain import Chain, Choice
    from devmap_config.placement.program import Program

FEW_CHOICES = 200_000
"""With so many choices at most the program is stated block by block, and solved to the optimum."""

WORTH_CUTTING = 500
"""A choice that is above the bound by more than this part, a five-hundredth, is compared with one in runs."""

CUT_NODES = 50
"""So much of the tree is searched for a choice in runs."""

BOUND_TOLERANCE = 1e-6
"""So much of itself is taken off the bound that HiGHS proves in floating point."""

LEAST_TOLERANCE = 1e-3
"""Nanoseconds that are taken off a bound at least."""

UNREACHABLE = 2**62


@dataclass(frozen=True, slots=True)
class Fastest:
    """A choice and its time."""

    choice: Choice
    nanoseconds: int


@dataclass(frozen=True, slots=True)
class ChainSolution:
    """The fastest choice that was found, if any, and what no choice can be below."""

    fastest: Fastest | None
    bound_nanoseconds: int


def solve(chain: Chain, at_most: int = UNREACHABLE) -> ChainSolution:
    """Return the fastest choice, of which it matters only whether it is below `at_most`: above that, there is no bound.

    The order of options does not matter.
    """
    is_exact = prod(len(block.options) for block in chain.blocks) <= FEW_CHOICES
    choices, bound = _solved(chain, at_most, is_exact=is_exact)
    timed = [Fastest(choice, chain.nanoseconds(choice)) for choice in choices]
    fastest = min(timed, key=lambda each: each.nanoseconds, default=None)
    if fastest is None or fastest.nanoseconds >= at_most:
        return ChainSolution(None, min(bound, at_most))
    return ChainSolution(fastest, bound)


def _solved(chain: Chain, at_most: int, *, is_exact: bool) -> tuple[list[Choice], int]:
    """Feasible choices, the best among them, and the bound."""
    program = program_of(chain, is_exact=is_exact)
    if at_most < UNREACHABLE:
        program.milp.at_most(program.objective, at_most)
    solution = program.milp.minimize(program.objective, relative_gap=0 if is_exact else RELATIVE_GAP)
    bound = _whole(solution.bound)
    if solution.values is None:
        return [], bound
    choices = [laid_out(program, solution.values)]
    if (chain.nanoseconds(choices[0]) - bound) * WORTH_CUTTING > bound:
        choices += _cut(program, choices[0])
    choices = [in_turns(chain, choice) for choice in choices]
    feasible = [choice for choice in choices if chain.is_feasible(choice)]
    return feasible or _within(chain, choices[0], at_most, is_exact=is_exact), bound


def _cut(program: Program, choice: Choice) -> list[Choice]:
    """Choices with one run of blocks for each device that a choice uses, in a few orders of these."""
    order, found = order_in(program, choice), []
    for each in dict.fromkeys((order, order[::-1], tuple(each for each in program.chain.devices if each in order))):
        runs = in_runs(program, each)
        values = runs.milp.minimize(program.objective, nodes=CUT_NODES).values
        if values is not None:
            found.append(laid_out(program, values, runs))
    return found


def _within(chain: Chain, choice: Choice, at_most: int, *, is_exact: bool) -> list[Choice]:
    """Feasible choices where the program's was over a device's memory by what floating point does not see."""
    room = dict(chain.capacities)
    for device, used_bytes in chain.used_bytes(choice).items():
        over = used_bytes - chain.capacities.get(device, 0)
        if over > 0:
            room[device] = room.get(device, 0) - 2 * over
    return _solved(replace(chain, capacities=room), at_most, is_exact=is_exact)[0]


def _whole(bound: float) -> int:
    """Return a bound as an integer of nanoseconds that is surely not above it, whatever floating point added."""
    if bound >= UNREACHABLE:
        return UNREACHABLE
    return ceil(bound - max(bound * BOUND_TOLERANCE, LEAST_TOLERANCE))
