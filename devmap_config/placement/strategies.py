"""Runs the strategies: each gives every tensor that is not pinned a device, or reports why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.assignment import Assignment
from devmap_config.execution.running import longest_context, running_of
from devmap_config.execution.units import fold
from devmap_config.placement.problem import Placement, bytes_by_device
from devmap_config.placement.transformers_planner import OVERFLOW, TransformersStrategy, plan_like_transformers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.execution.running import Running
    from devmap_config.graph.model import TensorName
    from devmap_config.placement.optimal import Optimal
    from devmap_config.placement.problem import Aim, Problem

TRANSFORMERS_STRATEGIES: tuple[TransformersStrategy, ...] = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The bytes that a device, or all devices together (`device` is `None`), would need beyond what they have."""

    device: Device | None
    needed_bytes: int
    capacity_bytes: int

    @property
    def missing_bytes(self) -> int:
        """The number of bytes that are missing."""
        return self.needed_bytes - self.capacity_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """The budgets, in bytes by device, for transformers' planner.

    Attributes:
        is_mended: the planner's map was changed afterwards.
        rounds: the number of budgets that were tried, if none leaves room for what running needs beside the weights.
    """

    max_memory: Mapping[Device, int]
    is_mended: bool = False
    rounds: int | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A placement: the device of every tensor, and the modules that run on another device than the one that stores
    them.

    Attributes:
        offloaded_caches: the modules whose cache is offloaded, if the plan decides that.
        bound_nanoseconds: a lower bound of the time that the strategy minimises, if one was proved.
        fastest: the fastest placement that was found, if this one was preferred by another wish than time.
        budgets: the budgets of transformers' planner.
    """

    placement: Placement
    compute: Placement = field(default_factory=dict)
    offloaded_caches: tuple[str, ...] | None = None
    bound_nanoseconds: int | None = None
    fastest: Placed | None = None
    budgets: Budgets | None = None


@dataclass(frozen=True)
class Infeasible:
    """The result of a strategy that found no placement: the shortages, and the tensors that did not fit.

    Without a shortage, rules forbid all other devices for those tensors.
    """

    shortages: tuple[Shortage, ...]
    unplaced: tuple[TensorName, ...] = ()


UNREPAIRED_STRATEGIES = ("manual", "single")
"""Strategies that decide nothing, so that repairs cannot change them."""


def place(problem: Problem, strategy: str) -> Placed | Infeasible:
    """Place every tensor of a problem by a strategy.

    Args:
        problem: the tensors, capacities and constraints, and the objective if the strategy has one.
        strategy: `single` (on its device, else the first accelerator, else `cpu`), `manual` (everything is pinned), or
            the name of another.

    Returns:
        The placement, or why there is none.
    """
    if shortages := _shortages(problem, problem.pinned_bytes):
        return Infeasible(shortages)
    computes = bool(problem.accelerators) or CPU in problem.capacities  # a machine of only a disk is refused later
    if problem.aim is not None and computes:
        return _optimal(problem, strategy, problem.aim)
    if strategy in UNREPAIRED_STRATEGIES or not computes:
        device = problem.single_device or first_device(problem)
        placed = _with_pins(problem, dict.fromkeys(problem.graph.tensors, device))
    elif problem.graph.measurement is None:
        placed = _like_transformers(problem, strategy, problem.capacities)
    else:
        placed = _with_room_to_run(problem, strategy)
    if isinstance(placed, Placed) and (shortages := _shortages(problem, _used_bytes(problem, placed.placement))):
        return Infeasible(shortages)
    return placed


def _with_pins(problem: Problem, devices: Placement, budgets: Budgets | None = None) -> Placed | Infeasible:
    """Return the placement of these devices, with pins taking precedence."""
    placement = {name: problem.pinned.get(name) or devices[name] for name in problem.graph.tensors}
    if misplaced := tuple(name for name, device in placement.items() if device in problem.forbidden.get(name, ())):
        return Infeasible((), misplaced)
    return Placed(placement=placement, budgets=budgets)


def _like_transformers(problem: Problem, strategy: str, max_memory: Mapping[Device, int]) -> Placed | Infeasible:
    """Return transformers' plan for these budgets, without regard to what is needed besides weights."""
    planned = plan_like_transformers(replace(problem, capacities=max_memory), _as_transformers(strategy))
    if OVERFLOW not in max_memory:
        unplaced = tuple(name for name, device in planned.devices.items() if device == OVERFLOW)
        if unplaced:
            return _overflow(problem, planned.devices, unplaced)
    return _with_pins(problem, planned.devices, Budgets(max_memory=max_memory, is_mended=planned.is_mended))


MOST_ROUNDS = 24
"""The most times that budgets are lowered by the bytes that do not fit."""

MOST_HALVINGS = 8
"""The number of bisection steps for a common factor of all budgets, if lowering single budgets fails."""


def _with_room_to_run(problem: Problem, strategy: str) -> Placed | Infeasible:
    """Return transformers' plan for budgets that leave room for the measured workload.

    If there is none, return the plan for the full capacities, with the number of budgets that were tried.
    """
    first = placed = _like_transformers(problem, strategy, problem.capacities)
    budgets, rounds = dict(problem.capacities), 1
    while isinstance(placed, Placed) and rounds <= MOST_ROUNDS:
        over = _overfull(problem, placed.placement)
        if not over:
            return placed
        # Budgets only ever fall, below the bytes that an overfull device held.
        for device, (weights_bytes, running_bytes) in over.items():
            left_bytes = min(problem.capacities[device] - running_bytes, weights_bytes - 1)
            budgets[device] = max(min(budgets[device], left_bytes), 0)
        placed, rounds = _like_transformers(problem, strategy, dict(budgets)), rounds + 1
    if isinstance(first, Infeasible):
        return first
    low, high, best = 0, 2**MOST_HALVINGS, None
    while high - low > 1:
        share, rounds = (low + high) // 2, rounds + 1
        budgets = {device: size * share // 2**MOST_HALVINGS for device, size in problem.capacities.items()}
        placed = _like_transformers(problem, strategy, budgets)
        if isinstance(placed, Placed) and _overfull(problem, placed.placement):
            high = share  # even a smaller share is too much
            continue
        low, best = share, placed if isinstance(placed, Placed) else best
    return best or replace(first, budgets=Budgets(max_memory=problem.capacities, rounds=rounds))


def _overfull(problem: Problem, placement: Placement) -> dict[Device, tuple[int, int]]:
    """Return the bytes of weights and of running, for each device that has no room for both."""
    running, weights = _running_and_weights(problem, placement)
    costs = {} if running is None else running.costs()
    needed = {
        device: (weights.get(device, 0), costs[device].total_bytes if device in costs else 0)
        for device in problem.capacities
    }
    return {device: both for device, both in needed.items() if sum(both) > problem.capacities[device]}


def _optimal(problem: Problem, strategy: str, aim: Aim) -> Placed | Infeasible:
    from devmap_config.placement import optimal  # imports numpy

    if problem.accelerators:
        holds_cache = {CPU} if problem.graph.measurement and problem.graph.measurement.visiting_bytes else set()
        offered = {
            device: capacity
            for device, capacity in problem.capacities.items()
            if problem.takes_weights(device) or device in holds_cache
        }
        problem = replace(problem, capacities=offered)
    if strategy == "fastest":
        placed = optimal.place_fastest(problem, aim, optimal.ContextWish(_context_of_sequential(problem)))
    elif strategy == "longest-context":
        placed = optimal.place_longest_context(problem, aim)
    else:
        placed = optimal.place_fewest_devices(problem, aim)
    if placed is not None:
        if strategy != "fastest":
            return _placed(placed)
        fastest = None if placed.fastest is None else _placed(placed.fastest)
        return replace(_placed(placed), bound_nanoseconds=placed.bound_nanoseconds, fastest=fastest)
    room = sum(problem.capacities.values())
    return Infeasible((Shortage(device=None, needed_bytes=sum(least_bytes(problem).values()), capacity_bytes=room),))


def least_bytes(problem: Problem) -> dict[str, int]:
    """Return the least bytes of the weights, the cache and the activations, under any placement.

    For activations, that is the peak of one module or, on a machine of one device, of the whole model.
    """
    graph, measurement = problem.graph, problem.graph.measurement
    if measurement is None:
        return {"weights": graph.size_bytes}
    activation_bytes = max((cost.own_peak_bytes for cost in measurement.modules), default=0)
    if len(problem.capacities) == 1:
        [device] = problem.capacities
        running, _ = _running_and_weights(problem, dict.fromkeys(graph.tensors, device))
        cost = None if running is None else running.costs().get(device)
        activation_bytes = activation_bytes if cost is None else cost.activation_bytes
    return {"weights": graph.size_bytes, "cache": measurement.cache_bytes, "activations": activation_bytes}


def _placed(optimal_placement: Optimal) -> Placed:
    return Placed(
        placement=optimal_placement.placement,
        compute=optimal_placement.compute,
        offloaded_caches=optimal_placement.offloaded_caches,
    )


def _context_of_sequential(problem: Problem) -> int | None:
    """Return the longest context, in tokens, of the plan of `sequential`; `None` if there is none."""
    placed = _like_transformers(problem, "sequential", problem.capacities)
    if isinstance(placed, Infeasible) or _shortages(problem, _used_bytes(problem, placed.placement)):
        return None
    running, weights = _running_and_weights(problem, placed.placement)
    if running is None:
        return None
    return longest_context(
        running, {device: size - weights.get(device, 0) for device, size in problem.capacities.items()}
    )


def _running_and_weights(problem: Problem, placement: Placement) -> tuple[Running | None, dict[Device, int]]:
    """Return the costs of running under a placement, and the bytes of weights on each device."""
    executor, main_device = problem.executor, problem.executor.main_device(placement.values())
    homes = {name: (device, problem.computed.get(name)) for name, device in placement.items()}
    assignments = [
        Assignment(unit.name, unit.tensors, executor.location(device, main_device, compute))
        for unit, (device, compute) in fold(problem.graph, homes)
    ]
    weights = bytes_by_device(problem, placement, main_device=main_device)
    return running_of(problem.graph, assignments, executor), weights


def first_device(problem: Problem) -> Device:
    """Return the device on which transformers loads a model without a map: the first accelerator, else the CPU."""
    return next(iter(problem.capacities))


def _as_transformers(strategy: str) -> TransformersStrategy:
    return next(known for known in TRANSFORMERS_STRATEGIES if known == strategy)


def _overflow(problem: Problem, placement: Placement, unplaced: tuple[TensorName, ...]) -> Infeasible:
    total = Shortage(
        device=None,
        needed_bytes=problem.graph.weights_bytes(unplaced),
        capacity_bytes=0,
    )
    held = {name: device for name, device in placement.items() if device != OVERFLOW} | dict(problem.pinned)
    return Infeasible((total, *_shortages(problem, _used_bytes(problem, held))), unplaced)


def _used_bytes(problem: Problem, placement: Placement) -> dict[Device, int]:
    return bytes_by_device(problem, placement, main_device=problem.executor.main_device(placement.values()))


def _shortages(problem: Problem, used: Mapping[Device, int]) -> tuple[Shortage, ...]:
    return tuple(
        Shortage(device=device, needed_bytes=used.get(device, 0), capacity_bytes=capacity)
        for device, capacity in problem.capacities.items()
        if used.get(device, 0) > capacity
    )
