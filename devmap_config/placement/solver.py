"""Finds the fastest choice for a chain of blocks, and proves how close it is to the optimum.

The program over counts of blocks (`program`) gives a bound and counts, which are laid out along the chain (`layout`).
If hops keep the result above the bound, a second program cuts the chain into one run for each device. In a small
problem, each block is a class of its own, and every hop is counted exactly, so that the result is optimal.
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
"""The most choices for which the program is stated block by block, and solved to the optimum."""

WORTH_CUTTING = 500
"""A choice that exceeds the bound by more than this part, a five-hundredth, is compared with one in runs."""

CUT_NODES = 50
"""The most nodes of the tree that are searched for a choice in runs."""

BOUND_TOLERANCE = 1e-6
"""The part that is subtracted from a bound, because HiGHS proves it in floating point."""

LEAST_TOLERANCE = 1e-3
"""The least number of nanoseconds that is subtracted from a bound."""

UNREACHABLE = 2**62


@dataclass(frozen=True, slots=True)
class Fastest:
    """A choice and its time."""

    choice: Choice
    nanoseconds: int


@dataclass(frozen=True, slots=True)
class ChainSolution:
    """The fastest choice that was found, if any, and a lower bound for all choices."""

    fastest: Fastest | None
    bound_nanoseconds: int


def solve(chain: Chain, at_most: int = UNREACHABLE) -> ChainSolution:
    """Return the fastest choice that takes at most `at_most`; for slower ones, no bound is proved.

    The order of options does not matter.
    """
    is_exact = prod(len(block.options) for block in chain.blocks) <= FEW_CHOICES
    choices, bound = _solved(chain, at_most, is_exact=is_exact)
    timed = [Fastest(choice, chain.nanoseconds(choice)) for choice in choices]
    fastest = min(timed, key=lambda choice: choice.nanoseconds, default=None)
    if fastest is None or fastest.nanoseconds >= at_most:
        return ChainSolution(None, min(bound, at_most))
    return ChainSolution(fastest, bound)


def _solved(chain: Chain, at_most: int, *, is_exact: bool) -> tuple[list[Choice], int]:
    """Return feasible choices, including the best, and the bound."""
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
    """Return choices with one run of blocks for each device that a choice uses, in a few orders of the devices."""
    order, choices = order_in(program, choice), []
    for devices in dict.fromkeys(
        (order, order[::-1], tuple(device for device in program.chain.devices if device in order))
    ):
        runs = in_runs(program, devices)
        values = runs.milp.minimize(program.objective, nodes=CUT_NODES).values
        if values is not None:
            choices.append(laid_out(program, values, runs))
    return choices


def _within(chain: Chain, choice: Choice, at_most: int, *, is_exact: bool) -> list[Choice]:
    """Return feasible choices if the program's exceeds a device's memory by a floating-point error."""
    room = dict(chain.capacities)
    for device, used_bytes in chain.used_bytes(choice).items():
        over = used_bytes - chain.capacities.get(device, 0)
        if over > 0:
            room[device] = room.get(device, 0) - 2 * over
    return _solved(replace(chain, capacities=room), at_most, is_exact=is_exact)[0]


def _whole(bound: float) -> int:
    """Return a bound as whole nanoseconds, rounded down by more than floating-point errors."""
    if bound >= UNREACHABLE:
        return UNREACHABLE
    return ceil(bound - max(bound * BOUND_TOLERANCE, LEAST_TOLERANCE))
