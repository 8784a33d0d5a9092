"""The strategies by name: each gives every tensor that is not pinned a device, or says that it cannot."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from devmap_config.placement.assignment import Assignment
from devmap_config.placement.problem import Placement, bytes_by_device
from devmap_config.placement.running import longest_context, running_of
from devmap_config.placement.transformers_planner import OVERFLOW, TransformersStrategy, plan_like_transformers
from devmap_config.placement.units import fold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import TensorName
    from devmap_config.placement.problem import Aim, Problem

TRANSFORMERS_STRATEGIES: tuple[TransformersStrategy, ...] = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Bytes that a device, or all of them together (`device` is `None`), would need beyond what they have."""

    device: Device | None
    needed_bytes: int
    capacity_bytes: int

    @property
    def missing_bytes(self) -> int:
        """How much is missing."""
        return self.needed_bytes - self.capacity_bytes


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The device of every tensor, what runs elsewhere than where it is stored, and a bound where one was proven.

    `bound_nanoseconds` is what no placement can be below, of what the strategy makes fast; `fastest` is the fastest
    placement that was found, where other wishes than time chose this one.
    """

    placement: Placement
    compute: Placement = field(default_factory=dict)
    bound_nanoseconds: int | None = None
    fastest: Placed | None = None


@dataclass(frozen=True)
class Infeasible:
    """No placement holds: where how much is missing, and the tensors that found no place.

    Without a shortage, the strategy has no other device for them than one that a rule forbids.
    """

    shortages: tuple[Shortage, ...]
    unplaced: tuple[TensorName, ...] = ()


UNREPAIRED_STRATEGIES = ("manual", "single")
"""These place nothing themselves."""


def place(problem: Problem, strategy: str) -> Placed | Infeasible:
    """Return the device of every tensor of the problem, pinned ones included.

    Args:
        problem: what is to be placed, within what, and what is to be fast where it has an aim.
        strategy: `single` (on its device, else the first accelerator, else `cpu`), `manual` (all is pinned already), or
            one of the others' names.
    """
    if shortages := _shortages(problem, problem.pinned_bytes):
        return Infeasible(shortages)
    if problem.aim is not None:
        return _optimal(problem, strategy, problem.aim)
    if strategy == "single":
        device = problem.single_device or first_device(problem)
        placement: dict[TensorName, Device] = dict.fromkeys(problem.graph.tensors, device)
    elif strategy == "manual":
        placement = {}
    else:
        placement = plan_like_transformers(problem, _as_transformers(strategy))
        if OVERFLOW not in problem.capacities:
            unplaced = tuple(name for name, device in placement.items() if device == OVERFLOW)
            if unplaced:
                return _overflow(problem, placement, unplaced)
    placement = {name: problem.pinned.get(name) or placement[name] for name in problem.graph.tensors}
    if misplaced := tuple(name for name, device in placement.items() if device in problem.forbidden.get(name, ())):
        return Infeasible((), misplaced)
    if shortages := _shortages(problem, _used_bytes(problem, placement)):
        return Infeasible(shortages)
    return Placed(placement=placement)


def _optimal(problem: Problem, strategy: str, aim: Aim) -> Placed | Infeasible:
    from devmap_config.placement import optimal  # with it comes numpy

    if problem.accelerators:
        pinned = set(problem.pinned.values())
        offered = {
            device: capacity
            for device, capacity in problem.capacities.items()
            if device not in problem.refused or device in pinned
        }
        problem = replace(problem, capacities=offered)
    if strategy == "fastest":
        found = optimal.place_fastest(problem, aim, optimal.Wished(_context_of_sequential(problem)))
    elif strategy == "longest-context":
        found = optimal.place_longest_context(problem, aim)
    else:
        found = optimal.place_fewest_devices(problem, aim)
    if found is not None:
        if strategy != "fastest":
            return Placed(placement=found.placement, compute=found.compute)
        fastest = None if found.fastest is None else Placed(placement=found.fastest[0], compute=found.fastest[1])
        return Placed(
            placement=found.placement, compute=found.compute, bound_nanoseconds=found.bound_nanoseconds, fastest=fastest
        )
    measurement = problem.graph.measurement
    cache_bytes = 0 if measurement is None else measurement.cache_bytes
    room = sum(problem.capacities.values())
    return Infeasible(
        (Shortage(device=None, needed_bytes=problem.graph.size_bytes + cache_bytes, capacity_bytes=room),)
    )


def _context_of_sequential(problem: Problem) -> int | None:
    """The longest context, in tokens, of transformers' plan that fills one device after another; `None` without one."""
    placed = place(replace(problem, aim=None), "sequential")
    if isinstance(placed, Infeasible):
        return None
    executor, placement = problem.executor, placed.placement
    main_device = executor.main_device(placement.values())
    assignments = [
        Assignment(unit.name, unit.tensors, executor.location(device, main_device))
        for unit, device in fold(problem.graph, placement)
    ]
    running = running_of(problem.graph, assignments, executor)
    if running is None:
        return None
    weights_bytes = bytes_by_device(problem, placement, main_device=main_device)
    return longest_context(
        running, {device: size - weights_bytes.get(device, 0) for device, size in problem.capacities.items()}
    )


def first_device(problem: Problem) -> Device:
    """Where transformers loads a model without any map: the first accelerator, else the CPU."""
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
