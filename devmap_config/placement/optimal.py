"""Our own strategies: `fastest`, `longest-context` and `fewest-devices`, each with a proved bound of the time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.running import LONGEST_CONTEXT
from devmap_config.placement.solver import UNREACHABLE, solve
from devmap_config.placement.statement import Statement
from devmap_config.placement.wishes import preferred

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.hardware.inventory import Inventory, InventoryDevice
    from devmap_config.placement.chain import Choice
    from devmap_config.placement.problem import Aim, Placement, Problem
    from devmap_config.placement.solver import Fastest

MOST_FIRST_CARDS = 16
"""The most kinds of cards that are tried as the first one in use, each with a program of its own."""

NEARLY_AS_FAST = 100
"""Among placements within this part, a hundredth, of the bound, wishes decide."""


@dataclass(frozen=True, kw_only=True)
class Optimal:
    """A placement, the modules that run on another device than the executor would choose, and the time of the
    objective.

    No placement is faster than the bound. `fastest` is the fastest that was found, if wishes chose another.
    `offloaded_caches` are the modules whose cache is offloaded, if the plan decides that.
    """

    placement: Placement
    compute: Placement
    nanoseconds: int
    bound_nanoseconds: int
    offloaded_caches: tuple[str, ...] | None = None
    fastest: Optimal | None = None


@dataclass(frozen=True, slots=True)
class ContextWish:
    """The wish for a context of at least this many tokens, if known, among placements that are nearly as fast."""

    least_context: int | None = None


def place_fastest(problem: Problem, aim: Aim, wished: ContextWish | None = None) -> Optimal | None:
    """Return the fastest placement, or `None` if none that fits was found.

    Args:
        problem: the problem to solve.
        aim: the objective; without any phase, all placements that fit are equally good.
        wished: the wish for a context; with `None`, no wishes are considered.

    Raises:
        MissingFigureError: if a rate of the machine is unknown.
    """
    best: tuple[Statement, Fastest] | None = None
    main_devices = _main_devices(problem, aim.inventory)
    are_tried = len(main_devices) <= MOST_FIRST_CARDS
    bound = UNREACHABLE if are_tried else Statement(problem, aim, main_devices[0]).least_nanoseconds
    for main_device in main_devices[:MOST_FIRST_CARDS]:
        stated = Statement(problem, aim, main_device)
        outcome = solve(stated.chain, UNREACHABLE if best is None else best[1].nanoseconds)
        # Even if nothing was found with this card as the first, its lower bound counts.
        bound = min(bound, outcome.bound_nanoseconds)
        if outcome.fastest is not None:
            best = (stated, outcome.fastest)
    if best is None:
        return None
    stated, fastest = best
    choice = fastest.choice
    if wished is not None:
        most = max(fastest.nanoseconds, bound + bound // NEARLY_AS_FAST)
        choice = preferred(stated.chain, most, stated.contexts(wished.least_context)) or choice
    placed = _optimal(stated, fastest.choice, bound)
    return placed if choice == fastest.choice else replace(_optimal(stated, choice, bound), fastest=placed)


def _optimal(stated: Statement, choice: Choice, bound_nanoseconds: int) -> Optimal:
    locations, executor = stated.locations(choice), stated.problem.executor
    main_device = executor.main_device(location.stored_on for location in locations.values())
    return Optimal(
        placement={name: location.stored_on for name, location in locations.items()},
        compute={
            name: location.runs_on
            for name, location in locations.items()
            if main_device.is_accelerator and location != executor.location(location.stored_on, main_device)
        },
        nanoseconds=stated.chain.nanoseconds(choice),
        bound_nanoseconds=bound_nanoseconds,
        offloaded_caches=stated.offloaded_caches(choice),
    )


def place_longest_context(problem: Problem, aim: Aim) -> Optimal | None:
    """Return the fastest placement with the longest context, or `None` if even the workload's context does not fit.

    Raises:
        MissingFigureError: if a rate of the machine is unknown.
    """
    measurement = problem.graph.measurement
    if measurement is None or place_fastest(problem, aim) is None:
        return None

    def placed_at(context_length: int) -> Optimal | None:
        graph = replace(problem.graph, measurement=measurement.at(context_length))
        return place_fastest(replace(problem, graph=graph), aim)

    fits, most = measurement.workload.context_length, measurement.positions.most
    if most is not None and (placed := placed_at(max(most, fits))) is not None:
        return placed
    best, too_long, longest = placed_at(fits), 2 * fits, most or LONGEST_CONTEXT
    while too_long < longest and (placed := placed_at(too_long)) is not None:
        best, fits, too_long = placed, too_long, 2 * too_long
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if (placed := placed_at(middle)) is not None:
            best, fits = placed, middle
        else:
            too_long = middle
    return best


def place_fewest_devices(problem: Problem, aim: Aim) -> Optimal | None:
    """Return the fastest placement on the fewest accelerators that hold the whole model; if they cannot, on all
    devices.

    If no time is to be compared, wishes decide: few hops, a long context.

    Raises:
        MissingFigureError: if a rate of the machine is unknown.
    """
    wished = None if aim.phases else ContextWish()
    devices = {device.id: device for device in aim.inventory.devices}
    pinned = set(problem.pinned.values())
    required = [device for device in problem.capacities if device in pinned]
    alike: dict[object, list[Device]] = {}
    for accelerator in problem.accelerators:
        if accelerator not in pinned:
            alike.setdefault(_kind(devices[accelerator]), []).append(accelerator)
    kinds = list(alike.values())
    sets = sorted(product(*(range(len(kind) + 1) for kind in kinds)), key=lambda counts: (sum(counts), counts))
    least_bytes = problem.graph.size_bytes
    best: Optimal | None = None
    fewest: int | None = None
    for counts in sets:
        if fewest is not None and sum(counts) > fewest:
            break
        chosen = {*required, *(device for kind, count in zip(kinds, counts, strict=True) for device in kind[:count])}
        capacities = {device: size for device, size in problem.capacities.items() if device in chosen}
        if sum(capacities.values()) < least_bytes or not any(device.is_accelerator for device in capacities):
            continue
        placed = place_fastest(replace(problem, capacities=capacities), aim, wished)
        if placed is not None:
            fewest = sum(counts)
            best = placed if best is None or placed.nanoseconds < best.nanoseconds else best
    return best or place_fastest(problem, aim, wished)


def _main_devices(problem: Problem, inventory: Inventory) -> list[Device]:
    """Return the devices that may be the first used accelerator: no earlier one holds a pin, and of equal cards the
    first.
    """
    if not problem.accelerators:
        return [CPU]
    pinned = {device for device in problem.pinned.values() if device.is_accelerator}
    devices = {device.id: device for device in inventory.devices}
    main_devices: list[Device] = []
    kinds: list[object] = []
    for accelerator in problem.accelerators:
        kind = _kind(devices[accelerator])
        if pinned or kind not in kinds:
            kinds.append(kind)
            main_devices.append(accelerator)
        if accelerator in pinned:
            break
    return main_devices


def _kind(device: InventoryDevice) -> object:
    return (device.capacity_bytes, device.rates)
