"""Whether a lock still is what its profile asks for, and if not, why: what changed, or what its plan breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from devmap_config.plan.changes import changed_inputs
from devmap_config.plan.lock import LockError, plan_of
from devmap_config.plan.plan import device_uses
from devmap_config.plan.review import broken_promises

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.executor import Executor
    from devmap_config.plan.lock import Inputs, Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.rules.resolution import Resolution


@dataclass(frozen=True)
class Drift:
    """Why a lock does not hold any more: `stale-lock` for inputs that changed, `broken-lock` for a plan that does not.

    `reasons` are phrases; there is at least one.
    """

    code: Literal["stale-lock", "broken-lock"]
    reasons: tuple[str, ...]

    @property
    def message(self) -> str:
        """What is wrong, as the predicate of the lock's name."""
        return f"is stale: {'; '.join(self.reasons)}" if self.code == "stale-lock" else f"is wrong: {self.reasons[0]}"


def remedy(code: str, profile: Path) -> str:
    """What to do about a lock that is missing, cannot be read or does not hold."""
    return "upgrade devmap-config" if code == "newer-lock" else f"run `devmap compile {profile}` and commit the lock"


def held(
    lock: Lock,
    inputs: Inputs,
    variables: Mapping[str, str],
    graph: ModelGraph,
    inventory: Inventory,
    resolution: Resolution,
    executors: tuple[Executor, ...],
) -> Plan | Drift:
    """The plan of a lock, where nothing that it was made from has changed and it holds; else why not.

    `executors` are what may run it: the first is what runs a lock that does not say. Nothing is placed for this: the
    plan is read, and verified as one that was just made would be.
    """
    if changed := changed_inputs(lock, inputs, variables):
        return Drift("stale-lock", changed)
    try:
        plan = plan_of(lock, graph, executors[0])
        if plan.executor not in executors:
            offloads = str(plan.executor.offload_buffers).lower()
            return Drift("broken-lock", (f"`offload_buffers` is {offloads}, which its profile rules out",))
        broken = broken_promises(plan, graph, inventory.capacities, resolution) or _misstated(plan, graph, inventory)
    except (LockError, KeyError, TypeError, AttributeError) as error:
        return Drift("broken-lock", (str(error),))
    return Drift("broken-lock", tuple(broken)) if broken else plan


def _misstated(plan: Plan, graph: ModelGraph, inventory: Inventory) -> list[str]:
    """What the plan says of its devices that does not follow from where it puts things."""
    main_device = plan.executor.main_device(each.stored_on for each in plan.assignments)
    if plan.main_device != main_device:
        return [f"its main device is {main_device}, and it says {plan.main_device}"]
    uses = device_uses(graph, plan.assignments, inventory.capacities, plan.executor)
    stated = {use.id: use for use in plan.devices}
    return [f"what it says {use.id} holds is not what it puts there" for use in uses if stated.get(use.id) != use]
