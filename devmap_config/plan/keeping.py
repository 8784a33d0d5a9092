"""`--keep`: finds, among plans that are as good as a new one, one close to the plan of an existing lock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

from devmap_config.execution.units import fold
from devmap_config.plan.lock import LockError, locked_caches, locked_units
from devmap_config.plan.plan import Plan, assemble
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import broken_promises
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.plan.lock import Lock
    from devmap_config.prepared import Prepared

    Homes = dict[TensorName, tuple[Device, Device | None]]
    Block = tuple[TensorName, ...]

AS_GOOD = 200
"""A plan is as good as another if it takes at most this part, a two-hundredth, longer, which is about the accuracy
of the bound.
"""

MAX_TRIALS = 48
"""The most plans that are tried, each of which is verified and predicted anew."""


def prefer_locked_plan(plan: Plan, lock: Lock, prepared: Prepared) -> Plan:
    """Return the locked plan if it is as good as the new one, else the new one with as much of the locked one as can
    stay.

    Only a plan of the same strategy, one of ours, is kept. A plan is accepted if it breaks no rule, fits, and is as
    good: in the time of a token or, if that is unknown, in the context that it has room for. If not everything can
    stay, halves are tried, from either end of the model. The result is close to the locked plan, but not proved to be
    the closest.
    """
    if plan.strategy not in OPTIMAL_STRATEGIES or lock.plan.get("strategy") != plan.strategy:
        return plan
    try:
        units = locked_units(lock, prepared.graph, prepared.inventory)
        caches = locked_caches(lock, prepared.graph)
    except LockError:
        return plan
    earlier = {name: home for unit, home in units for name in unit.tensors}
    for kept_caches in dict.fromkeys((caches, plan.offloaded_caches)):
        whole = _PlanKeeping(plan, prepared, earlier, kept_caches)
        if whole.keep(tuple(earlier)):
            return whole.best
    better = []
    for order in (1, -1):
        search = _PlanKeeping(plan, prepared, earlier, plan.offloaded_caches)
        for moved in _moved_together(prepared.graph, earlier, _homes(plan))[::order]:
            search.keep_most(moved[::order])
        better.append(search)
    return min(better, key=_PlanKeeping.distance).best


def _homes(plan: Plan) -> Homes:
    """Return the store of each tensor and, if its unit runs elsewhere than usual, the device on which it runs."""
    return {
        name: (assignment.location.stored_on, plan.compute.get(assignment.unit))
        for assignment in plan.assignments
        for name in assignment.tensors
    }


def _moved_together(graph: ModelGraph, before: Homes, after: Homes) -> list[tuple[Block, ...]]:
    """Return the blocks that moved, with neighbours that moved the same way grouped."""

    def way(block: Block) -> tuple[tuple[object, ...], ...]:
        return tuple(dict.fromkeys((before[name], after[name]) for name in block))

    blocks = [tuple(tensor.name for tensor in graph.modules[path].tensors()) for path in graph.blocks]
    moved = [block for block in blocks if any(before[name] != after[name] for name in block)]
    return [tuple(together) for _, together in groupby(moved, key=way)]


@dataclass
class _PlanKeeping:
    """Moves blocks back as long as the plan stays as good as the new one; `best` is the closest plan found so far."""

    new: Plan
    prepared: Prepared
    earlier: Homes
    offloaded_caches: tuple[str, ...] | None
    trials: int = 0
    best: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.new

    def keep_most(self, blocks: Sequence[Block]) -> None:
        """Move these blocks back or, if that is impossible, halves of them."""
        if self.keep(tuple(name for block in blocks for name in block)) or len(blocks) == 1:
            return
        middle = len(blocks) // 2
        self.keep_most(blocks[:middle])
        self.keep_most(blocks[middle:])

    def keep(self, names: Sequence[TensorName]) -> bool:
        """Move tensors back if that gives an acceptable plan, and return whether it does."""
        if self.trials >= MAX_TRIALS:
            return False
        self.trials += 1
        candidate = self.plan_with({**_homes(self.best), **{name: self.earlier[name] for name in names}})
        if broken_promises(candidate, self.prepared):
            return False
        bound = self.new.prediction.bound_decode_nanoseconds_per_token
        inventory = self.prepared.inventory
        prediction = predict(candidate, self.prepared.graph, inventory, bound_decode_nanoseconds=bound)
        candidate = replace(candidate, prediction=prediction)
        if not _is_as_good(candidate, self.new):
            return False
        self.best = candidate
        return True

    def distance(self) -> tuple[int, int]:
        """Return the number of tensors of the best plan that are not at their old place, and the time of a token."""
        homes = _homes(self.best)
        moved = sum(homes[name] != self.earlier[name] for name in self.earlier)
        return moved, self.best.prediction.decode_nanoseconds_per_token or 0

    def plan_with(self, homes: Mapping[TensorName, tuple[Device, Device | None]]) -> Plan:
        """Return the plan with these homes."""
        graph = self.prepared.graph
        units = fold(graph, {name: homes[name] for name in graph.tensors})
        capacities = self.prepared.capacities
        executor = replace(self.new.executor, offloaded_caches=self.offloaded_caches)
        return assemble(graph, units, capacities, strategy=self.new.strategy, executor=executor, draft=self.new.draft)


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
    return len({assignment.location.runs_on for assignment in plan.assignments})
