"""Compares plans of one profile: selects the best, and says what it has that the fastest does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.plan.plan import FASTEST, OWN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devmap_config.placement.problem import Aim
    from devmap_config.plan.plan import Plan


def best_of(plans: Sequence[Plan], aim: Aim | None) -> Plan:
    """Return the best of the plans, the first of equal ones, with the lowest of their bounds."""
    best = min(plans, key=lambda plan: _rank(plan, aim))
    bounds = [plan.prediction.bound_decode_nanoseconds_per_token for plan in plans]
    least = min((bound for bound in bounds if bound is not None), default=None)
    best = replace(best, prediction=replace(best.prediction, bound_decode_nanoseconds_per_token=least))
    fastest = min((plan.fastest or plan for plan in plans), key=lambda plan: objective_nanoseconds(plan, aim))
    return beside_fastest(best, fastest, aim) if best.fastest else best


def objective_nanoseconds(plan: Plan, aim: Aim | None) -> int:
    """Return the value of the objective for a plan: the time of a token, a prefill or a request, if it is known."""
    phases = () if aim is None else aim.phases
    return sum(times * (getattr(plan.prediction, OWN[phase]) or 0) for phase, times in phases)


def beside_fastest(plan: Plan, fastest: Plan, aim: Aim | None) -> Plan:
    """Return the plan with the fastest one attached, and with that one's times where the plan takes longer."""
    figures: dict[str, int | None] = dict.fromkeys(FASTEST.values())
    if aim is not None and objective_nanoseconds(plan, aim) > objective_nanoseconds(fastest, aim):
        figures |= {FASTEST[phase]: getattr(fastest.prediction, OWN[phase]) for phase, _ in aim.phases}
    return replace(plan, fastest=fastest, prediction=replace(plan.prediction, **figures))


def deciding_wish(plan: Plan) -> str | None:
    """Return the first wish by which a plan is better than the fastest one; `None` if there is no such wish."""
    from devmap_config.placement.wishes import WISHES  # imports numpy

    if plan.fastest is None:
        return None
    figures = ((wish, wish.figure(plan), wish.figure(plan.fastest)) for wish in WISHES)
    return next((wish.told(after, before) for wish, after, before in figures if after < before), None)


def _rank(plan: Plan, aim: Aim | None) -> tuple[int, ...]:
    total = objective_nanoseconds(plan, aim)
    if plan.strategy == "longest-context":
        return (-(plan.prediction.longest_context or 0), total)
    if plan.strategy == "fewest-devices":
        return (len({assignment.location.runs_on for assignment in plan.assignments}), total)
    return (total,)
