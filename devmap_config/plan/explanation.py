"""Explains why a module is on its device: the costs of every other place, or why it is impossible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.execution.assignment import ON_CPU, Assignment, Location
from devmap_config.graph.model import ModulePath, is_within
from devmap_config.plan.plan import OWN, Plan, device_uses
from devmap_config.plan.prediction import figures_in_words, missing_figures, predict, rates_basis

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.devices import Device
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory, InventoryDevice
    from devmap_config.profile.quantities import Basis


COMPUTING = (
    *("flops_per_second", "decode_attention_per_second", "prefill_attention_per_second"),
    *("decode_products_per_second", "prefill_products_per_second"),
)
READING = ("bandwidth_bytes_per_second", "experts_bytes_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another place for a block, with everything else unchanged.

    `slower_nanoseconds` is the extra time of a token (negative if it is faster), `None` if unknown; `rates` is the
    weakest basis of either time; `missing` are figures of the machine without which it is unknown; `missing_bytes` are
    the bytes that `full_device` lacks.
    """

    location: Location
    slower_nanoseconds: int | None
    rates: Basis | None
    missing_bytes: int
    full_device: Device | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """The time that a phase would take if one resource of the machine were twice as fast, all else unchanged."""

    what: str
    nanoseconds: int


def savings(plan: Plan, graph: ModelGraph, inventory: Inventory, phase: Phase) -> tuple[Saving, ...]:
    """Return what a phase of a plan waits for: the resources that would save at least a hundredth of it, largest
    first.
    """
    now = getattr(plan.prediction, OWN[phase])
    together = inventory.together_bytes_per_second
    faster = {
        "the host": replace(inventory, dispatch_nanoseconds=inventory.dispatch_nanoseconds // 2),
        "the devices' memory": _with_devices(inventory, lambda device: device.id != DISK, *READING),
        "the devices' computing": _with_devices(inventory, lambda device: True, *COMPUTING),
        "the links": replace(
            _with_links(inventory, lambda pair: DISK not in pair), together_bytes_per_second=together and 2 * together
        ),
        "the disk": _with_links(inventory, lambda pair: DISK in pair),
    }
    times = ((what, getattr(predict(plan, graph, other), OWN[phase])) for what, other in faster.items())
    savings = [Saving(what=what, nanoseconds=time) for what, time in times if time is not None]
    return tuple(
        sorted((saving for saving in savings if saving.nanoseconds < 0.99 * now), key=lambda saving: saving.nanoseconds)
    )


def _with_devices(inventory: Inventory, chosen: Callable[[InventoryDevice], bool], *figures: str) -> Inventory:
    def faster(device: InventoryDevice) -> InventoryDevice:
        rates = {figure: rate for figure in figures if (rate := getattr(device, figure)) is not None}
        return replace(device, **{figure: 2 * rate for figure, rate in rates.items()}) if chosen(device) else device

    return replace(inventory, devices=tuple(map(faster, inventory.devices)))


def _with_links(inventory: Inventory, chosen: Callable[[tuple[Device, Device]], bool]) -> Inventory:
    links = {pair: link.twice_as_fast if chosen(pair) else link for pair, link in inventory.links.items()}
    return replace(inventory, links=links)


def block_of(graph: ModelGraph, path: str) -> str:
    """Return the block that a module or tensor belongs to, or itself if it belongs to none."""
    around = path
    while around and ModulePath(around) not in graph.blocks:
        around = around.rpartition(".")[0]
    return around or path


def placed_with(plan: Plan, graph: ModelGraph, path: str) -> str:
    """Return what is placed together with a module or tensor: its block or, in a block that a plan splits, its part."""
    block = block_of(graph, path)
    if len({each.location for each in plan.assignments if is_within(each.unit, block)}) <= 1:
        return block
    return next((each.unit for each in plan.assignments if is_within(path, each.unit)), path)


def alternatives(plan: Plan, graph: ModelGraph, inventory: Inventory, block: str) -> tuple[Alternative, ...]:
    """Return every other place of a block, or of a part of one.

    A place is an accelerator, the CPU or the disk from which it is copied in, or the CPU that computes it.
    """
    module = graph.modules.get(ModulePath(block))
    if module is None:
        return ()
    tensors = tuple(tensor.name for tensor in module.tensors())
    inside = [assignment for assignment in plan.assignments if is_within(assignment.unit, block)]
    now = {assignment.location for assignment in inside}
    others = [assignment for assignment in plan.assignments if assignment not in inside]
    places: list[Location] = []
    capacities = {use.id: use.capacity_bytes for use in plan.devices}  # less the needs of a draft model
    for device in capacities:
        if device.is_accelerator:
            places.append(Location(device, device))
        else:
            streamed = Location(device, plan.main_device)
            if device == plan.main_device or plan.executor.streams(streamed):
                places.append(streamed)
            if device == CPU and plan.main_device.is_accelerator:
                places.append(ON_CPU)
    alternatives = []
    for location in places:
        if now == {location}:
            continue
        assignments = (*others, Assignment(block, tensors, location))
        moved = replace(
            plan, assignments=assignments, devices=device_uses(graph, assignments, capacities, plan.executor)
        )
        alternatives.append(_compared(plan, moved, location, graph, inventory))
    return tuple(alternatives)


def modules_with_either_cache(plan: Plan, graph: ModelGraph, path: str) -> tuple[str, ...]:
    """Return the modules within a path whose cache the plan has put on the CPU or on the accelerator that runs them."""
    if plan.offloaded_caches is None or graph.measurement is None:
        return ()
    holding = (cost.path for cost in graph.measurement.modules if cost.offloaded_bytes and is_within(cost.path, path))
    return tuple(module for module in holding if _runs_on_accelerator(plan, module))


def _runs_on_accelerator(plan: Plan, module: str) -> bool:
    return any(
        assignment.location.runs_on.is_accelerator
        for assignment in plan.assignments
        if is_within(module, assignment.unit) or is_within(assignment.unit, module)
    )


def other_cache(plan: Plan, graph: ModelGraph, inventory: Inventory, block: str) -> Alternative | None:
    """Return the other place of a block's cache: the CPU if it stays on the device in this plan, or the other way
    round.

    Return `None` if the plan does not decide that, there is no other place, or the cache is in both.
    """
    if plan.offloaded_caches is None or graph.measurement is None:
        return None
    own, now = set(modules_with_either_cache(plan, graph, block)), set(plan.offloaded_caches)
    inside = [assignment.location for assignment in plan.assignments if is_within(assignment.unit, block)]
    if not own or (own & now and own - now):
        return None
    then = now ^ own
    holding = (cost.path for cost in graph.measurement.modules if cost.offloaded_bytes)
    executor = replace(plan.executor, offloaded_caches=tuple(path for path in holding if path in then))
    capacities = {use.id: use.capacity_bytes for use in plan.devices}
    moved = replace(plan, executor=executor, devices=device_uses(graph, plan.assignments, capacities, executor))
    return _compared(plan, moved, inside[0], graph, inventory)


def _compared(plan: Plan, moved: Plan, location: Location, graph: ModelGraph, inventory: Inventory) -> Alternative:
    """Compare a plan with the one that has a block or its cache at another location."""
    fullest = min(moved.devices, key=lambda use: use.free_bytes)
    phase: Phase = "decode" if graph.decodes else "prefill"
    times = tuple(getattr(prediction, OWN[phase]) for prediction in (predict(moved, graph, inventory), plan.prediction))
    is_known = None not in times
    return Alternative(
        location=location,
        slower_nanoseconds=times[0] - times[1] if is_known else None,
        rates=rates_basis(graph, inventory, phase, plan, moved) if is_known else None,
        missing_bytes=max(-fullest.free_bytes, 0),
        full_device=fullest.id if fullest.free_bytes < 0 else None,
        missing=figures_in_words(missing_figures(moved, graph, inventory).get(phase, ())),
    )
