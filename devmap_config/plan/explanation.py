"""Why a module is where it is: what every other place would cost, and what keeps it from there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.graph.model import ModulePath
from devmap_config.placement.assignment import Assignment
from devmap_config.placement.problem import is_accelerator
from devmap_config.plan.plan import Plan, device_uses
from devmap_config.plan.prediction import predict

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.problem import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another place for a block, all else as it is.

    `slower_nanoseconds` is by how much a token then takes longer (less, where it is negative), `None` where that is not
    known; `missing_bytes` what is missing on `full_device` for it.
    """

    stored_on: DeviceId
    executes_on: DeviceId
    slower_nanoseconds: int | None
    missing_bytes: int
    full_device: DeviceId | None


def block_of(graph: ModelGraph, path: str) -> str:
    """The block that a module or tensor belongs to; itself where it is none's."""
    around = path
    while around and ModulePath(around) not in graph.blocks:
        around = around.rpartition(".")[0]
    return around or path


def alternatives(plan: Plan, graph: ModelGraph, inventory: Inventory, block: str) -> tuple[Alternative, ...]:
    """Every other place of a block: on each accelerator, copied in from the CPU or the disk, computed on the CPU."""
    module = graph.modules.get(ModulePath(block))
    if module is None:
        return ()
    tensors = tuple(tensor.name for tensor in module.tensors())
    inside = [each for each in plan.assignments if each.unit == block or each.unit.startswith(f"{block}.")]
    now = {(each.stored_on, each.executes_on) for each in inside}
    others = [each for each in plan.assignments if each not in inside]
    places: list[tuple[DeviceId, DeviceId]] = []
    for device in inventory.capacities:
        if is_accelerator(device):
            places.append((device, device))
        else:
            if device == plan.main_device or plan.executor.streams(device, plan.main_device):
                places.append((device, plan.main_device))
            if device == "cpu" and is_accelerator(plan.main_device):
                places.append(("cpu", "cpu"))
    found = []
    for stored_on, executes_on in places:
        if now == {(stored_on, executes_on)}:
            continue
        assignments = (*others, Assignment(block, tensors, stored_on, executes_on))
        moved = replace(
            plan,
            assignments=assignments,
            devices=device_uses(graph, assignments, inventory.capacities, plan.executor),
        )
        fullest = min(moved.devices, key=lambda use: use.free_bytes)
        figure = "decode_nanoseconds_per_token" if graph.decodes else "prefill_nanoseconds"
        times = tuple(getattr(each, figure) for each in (predict(moved, graph, inventory), plan.prediction))
        found.append(
            Alternative(
                stored_on=stored_on,
                executes_on=executes_on,
                slower_nanoseconds=None if times[0] is None or times[1] is None else times[0] - times[1],
                missing_bytes=max(-fullest.free_bytes, 0),
                full_device=fullest.id if fullest.free_bytes < 0 else None,
            )
        )
    return tuple(found)
