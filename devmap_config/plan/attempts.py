"""Places a problem and makes a plan of it, and repeats until the plan verifies or nothing more can be improved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.amounts import counted
from devmap_config.devices import DISK
from devmap_config.execution.units import fold, whole_model
from devmap_config.graph.model import TensorName
from devmap_config.placement.constraints import keeping
from devmap_config.placement.executors import are_to_be_compared, executors_for
from devmap_config.placement.strategies import UNREPAIRED_STRATEGIES, Infeasible, place
from devmap_config.plan.comparison import beside_fastest
from devmap_config.plan.plan import assemble
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import review
from devmap_config.plan.verify import stranded_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.placement.problem import Placement, Problem
    from devmap_config.placement.strategies import Budgets, Placed
    from devmap_config.plan.plan import Plan
    from devmap_config.prepared import Prepared

    Obstacle = Infeasible | tuple[Diagnostic, ...]
    """The reason why there is no plan: no placement was found, or the plan has errors."""


@dataclass(frozen=True)
class Candidate:
    """A plan that verifies; `kept` are tensors that were moved to the device that uses them, as nothing copies them
    there.
    """

    plan: Plan
    kept: Placement


def attempts(problem: Problem, prepared: Prepared) -> list[Candidate | Obstacle]:
    """Return an attempt for each executor, up to the first that fits unless a later one may be better.

    transformers' strategies leave no room for weights that are copied only for prompts.
    """
    compares = are_to_be_compared(prepared)
    results: list[Candidate | Obstacle] = []
    for executor in executors_for(prepared):
        if executor.prefilled_from and not compares and not problem.computed:
            continue
        results.append(_attempt(replace(problem, executor=executor), prepared))
        if isinstance(results[-1], Candidate) and not compares and not executor.prefilled_from:
            break
    placements = [attempt.plan.placement for attempt in results if isinstance(attempt, Candidate)]
    return results if compares or placements[:1] == placements[-1:] else results[1:]


def _attempt(problem: Problem, prepared: Prepared) -> Candidate | Obstacle:
    """Place the problem until no tensor is stranded and loading fits; report the first obstacle, which says most."""
    obstacle: Obstacle = ()
    moved: dict[TensorName, Device] = {}
    lowered_bytes: Mapping[Device, int] = {}
    while True:
        placed = place(problem, prepared.strategy)
        if isinstance(placed, Infeasible):
            return obstacle or placed
        plan = _assembled(placed, problem, prepared)
        if stranded := _stranded(plan, problem):
            moved |= stranded
            problem = keeping(problem, stranded)
            continue
        findings = review(plan, prepared)
        if not any(finding.is_error for finding in findings):
            return Candidate(plan, moved)
        obstacle = obstacle or _with_budget_rounds(findings, placed.budgets, prepared.strategy)
        lowered_bytes = _lowered_for_loading(plan, problem.capacities, lowered_bytes)
        capacities = {device: size - lowered_bytes.get(device, 0) for device, size in problem.capacities.items()}
        if prepared.strategy in UNREPAIRED_STRATEGIES or not lowered_bytes or min(capacities.values()) < 0:
            return obstacle
        problem = replace(problem, capacities=capacities)


def _assembled(placed: Placed, problem: Problem, prepared: Prepared) -> Plan:
    """Return a placement as a plan, with units, the bytes on each device, and a prediction."""
    graph, strategy = prepared.graph, prepared.strategy
    homes = {
        name: (device, placed.compute.get(name) or prepared.resolution.compute_of(name))
        for name, device in placed.placement.items()
    }
    units = whole_model(graph, homes) if strategy == "single" else fold(graph, homes)
    executor = replace(problem.executor, offloaded_caches=placed.offloaded_caches)
    plan = assemble(graph, units, prepared.capacities, strategy=strategy, executor=executor, draft=prepared.draft)
    bound = placed.bound_nanoseconds if prepared.proves_bound else None
    plan = replace(plan, prediction=predict(plan, graph, prepared.inventory, bound_decode_nanoseconds=bound))
    budgets = placed.budgets
    if budgets is not None and graph.measurement is not None and not budgets.is_mended and _decide_alone(problem):
        plan = replace(
            plan, max_memory={size_bytes.in_device_map: size for size_bytes, size in budgets.max_memory.items()}
        )
    if placed.fastest is None:
        return plan
    return beside_fastest(plan, _assembled(placed.fastest, problem, prepared), problem.aim)


def _decide_alone(problem: Problem) -> bool:
    """Return whether only budgets and sizes decide, as transformers has no pins, groups or other constraints."""
    has_constraints = problem.pinned or problem.groups or problem.forbidden
    return (
        not has_constraints
        and not problem.graph.adapter_tensors
        and all(tensor.offloaded_bytes is None for tensor in problem.graph.tensors.values())
    )


def _with_budget_rounds(
    findings: tuple[Diagnostic, ...], budgets: Budgets | None, strategy: str
) -> tuple[Diagnostic, ...]:
    """Return the findings, with the number of budgets that were tried if running has no room."""
    if budgets is None or budgets.rounds is None:
        return findings
    rounds = counted(budgets.rounds, "round")
    tried = f"no plan of `{strategy}` was found in {rounds} of lower budgets; with the full capacities, "
    return tuple(
        replace(finding, message=tried + finding.message) if finding.code == "over-capacity" else finding
        for finding in findings
    )


def _stranded(plan: Plan, problem: Problem) -> dict[TensorName, Device]:
    """Return the tensors that the plan strands without a rule, with the device that uses them."""
    names = [TensorName(name) for name in stranded_tensors(plan, problem.graph)]
    return {name: plan.main_device for name in names if name not in problem.pinned}


def _lowered_for_loading(
    plan: Plan, capacities: Mapping[Device, int], before: Mapping[Device, int]
) -> dict[Device, int]:
    """Return the bytes to subtract from capacities so that loading fits; empty if it does.

    The strategy must leave free what loading needs besides the weights. If a placement does not change although
    capacities were lowered `before`, each round at least doubles the amount, so that there are few rounds.
    """
    lowered_bytes: dict[Device, int] = {}
    for use in plan.devices:
        missing_bytes = use.loading_bytes - use.capacity_bytes
        if use.id in capacities and use.id != DISK and missing_bytes > 0:
            unused_bytes = max(capacities[use.id] - (use.capacity_bytes - use.free_bytes), 0)
            lowered_bytes[use.id] = max(unused_bytes + missing_bytes, 2 * before.get(use.id, 0))
    if plan.draft is not None and plan.draft_missing_bytes:
        device = plan.draft.device
        lowered_bytes[device] = max(plan.draft_missing_bytes + lowered_bytes.get(device, 0), 2 * before.get(device, 0))
    return lowered_bytes
