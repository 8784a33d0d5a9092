"""`--keep`: the plan of an existing lock, where it still holds and is as good as the new one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.plan.lock import LockError, plan_of
from devmap_config.plan.plan import Plan, device_uses
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import broken_promises
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.plan.lock import Lock
    from devmap_config.rules.resolution import Resolution

AS_GOOD = 200
"""As good is what takes at most this part, a two-hundredth, longer; the bound is proven to about as much."""


def kept(plan: Plan, lock: Lock, graph: ModelGraph, inventory: Inventory, resolution: Resolution) -> Plan:
    """The locked plan with what it holds and takes now, or the new one.

    It is kept where it was made by the same strategy of ours, breaks no rule, fits, and is as good: in the time of a
    token, or where that is not known in the context that it leaves room for.
    """
    if plan.strategy not in OPTIMAL_STRATEGIES or lock.plan.get("strategy") != plan.strategy:
        return plan
    try:
        earlier = plan_of(lock, graph, plan.executor)
    except (LockError, KeyError, TypeError):
        return plan
    assignments = earlier.assignments
    same = replace(
        earlier, devices=device_uses(graph, assignments, inventory.capacities, plan.executor), measured=plan.measured
    )
    if broken_promises(same, graph, inventory.capacities, resolution):
        return plan
    bound = plan.prediction.bound_decode_nanoseconds_per_token
    same = replace(same, prediction=predict(same, graph, inventory, bound_decode_nanoseconds=bound))
    return same if _is_as_good(same, plan) else plan


def _is_as_good(earlier: Plan, new: Plan) -> bool:
    if new.strategy == "longest-context":
        contexts = (earlier.prediction.longest_context or 0, new.prediction.longest_context or 0)
        return contexts[0] * (AS_GOOD + 1) >= contexts[1] * AS_GOOD
    if new.strategy == "fewest-devices" and _used(earlier) > _used(new):
        return False
    for figure in ("decode_nanoseconds_per_token", "prefill_nanoseconds"):
        before, after = getattr(earlier.prediction, figure), getattr(new.prediction, figure)
        if before is not None and after is not None and before * AS_GOOD > after * (AS_GOOD + 1):
            return False
    return True


def _used(plan: Plan) -> int:
    return len({each.executes_on for each in plan.assignments})
