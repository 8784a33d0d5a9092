"""Which of several plans of one profile is the best, by what its strategy is after."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devmap_config.placement.problem import Aim
    from devmap_config.plan.plan import Plan


def best_of(plans: Sequence[Plan], aim: Aim | None) -> Plan:
    """The best of the plans, of equal ones the first; no plan can be below the least of their bounds."""
    best = min(plans, key=lambda plan: _rank(plan, aim))
    bounds = [plan.prediction.bound_decode_nanoseconds_per_token for plan in plans]
    least = min((bound for bound in bounds if bound is not None), default=None)
    return replace(best, prediction=replace(best.prediction, bound_decode_nanoseconds_per_token=least))


def _rank(plan: Plan, aim: Aim | None) -> tuple[int, ...]:
    prediction = plan.prediction
    nanoseconds = {
        "prefill": prediction.prefill_nanoseconds or 0,
        "decode": prediction.decode_nanoseconds_per_token or 0,
    }
    total = sum(times * nanoseconds[phase] for phase, times in aim.phases) if aim is not None else 0
    if plan.strategy == "longest-context":
        return (-(prediction.longest_context or 0), total)
    if plan.strategy == "fewest-devices":
        return (len({each.location.runs_on for each in plan.assignments}), total)
    return (total,)
