"""Derives, from a dry run that fails, the constraints that a plan must keep in order to run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.graph.model import ModulePath, TensorName
from devmap_config.placement.strategies import UNREPAIRED_STRATEGIES

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.constraints import Repairs
    from devmap_config.plan.plan import Plan
    from devmap_config.prepared import Prepared
    from devmap_config.rules.resolution import Resolution
    from devmap_config.simulate.simulation import DeviceMismatch, MismatchedTensor, SimulatedDevice, Verdict

Together = tuple[tuple["TensorName", ...], ...]
"""Groups of tensors that must share a device."""


def repaired(repairs: Repairs, verdict: Verdict, plan: Plan, prepared: Prepared) -> Repairs:
    """Return the repairs extended by this verdict; the same as before if the plan runs or nothing helps."""
    if verdict.mismatch is not None and verdict.mismatch.absent is not None:
        return replace(repairs, kept={**repairs.kept, **_to_keep(verdict.mismatch.absent, plan, prepared)})
    if verdict.mismatch is not None:
        return replace(repairs, together=_to_keep_together(verdict.mismatch, plan, prepared, repairs.together))
    if plan.strategy in UNREPAIRED_STRATEGIES:
        return repairs
    reserved = dict(repairs.reserved_bytes)
    for device, missing_bytes in overfull(verdict, plan, prepared.model):
        reserved[device.id] = reserved.get(device.id, 0) + missing_bytes
    return replace(repairs, reserved_bytes=reserved)


def _to_keep_together(mismatch: DeviceMismatch, plan: Plan, prepared: Prepared, before: Together) -> Together:
    """Return the groups to keep together to avoid this mismatch; the same as before if that cannot help.

    A mismatch within one block concerns every block of its class. One between blocks adds all groups that the
    measurement found; if another one of this kind occurs, all blocks of the same classes.
    """
    if plan.strategy in UNREPAIRED_STRATEGIES:
        return before
    graph = prepared.graph
    involved = involved_in(mismatch, plan, graph)
    if involved == [block_of(graph, mismatch.running)]:
        groups = [tensors_of(graph, path) for path in _alike(graph, involved)]
    else:
        bonds = () if graph.measurement is None else graph.measurement.bonds
        joined = [blocks for names in before if len(blocks := {block_of(graph, name) for name in names}) > 1]
        comes_again = any(blocks & set(involved) for blocks in joined)
        bond = [*involved, *_alike(graph, involved)] if comes_again else involved
        groups = [sum((tensors_of(graph, path) for path in bond), ()) for bond in (*bonds, bond)]
    together = dict.fromkeys([*before, *(names for names in groups if _can_be_together(names, prepared.resolution))])
    return tuple(together)


def involved_in(mismatch: DeviceMismatch, plan: Plan, graph: ModelGraph) -> list[str]:
    """Return the places that must share a device for an operation to run: blocks, and tensors outside of blocks."""
    places: dict[str, None] = {}
    for operand in mismatch.tensors:
        own = operand.block or operand.tensor
        if not own and not operand.blocks and operand.device == plan.main_device:
            own = _first_on(plan.main_device, plan, graph)  # an input is on the device on which the model begins
        places |= dict.fromkeys(filter(None, (own, *operand.blocks)))
    places |= dict.fromkeys(filter(None, [block_of(graph, mismatch.running)]))
    return list(places)


def _first_on(device: Device, plan: Plan, graph: ModelGraph) -> str:
    """Return the first block with tensors that runs on a device."""
    running = {
        name for assignment in plan.assignments if assignment.location.runs_on == device for name in assignment.tensors
    }
    return next((path for path in graph.blocks if running & set(tensors_of(graph, path))), "")


def _alike(graph: ModelGraph, places: list[str]) -> list[str]:
    """Return all blocks of the same classes as these."""
    modules = [graph.modules[ModulePath(place)] for place in places if place in graph.modules]
    class_names = {module.class_name for module in modules}
    return [path for path in graph.blocks if graph.modules[path].class_name in class_names]


def _to_keep(absent: MismatchedTensor, plan: Plan, prepared: Prepared) -> dict[TensorName, Device]:
    """Return tensors that must be on the device that uses them: those of the weight's module, and of its
    counterparts in other blocks.
    """
    graph, decisions = prepared.graph, prepared.resolution.decisions
    module = (absent.tensor or "").rpartition(".")[0]
    block = block_of(graph, module)
    modules = [module]
    if block and block in graph.modules:
        class_name, rest = graph.modules[ModulePath(block)].class_name, module.removeprefix(block)
        alike = (f"{path}{rest}" for path in graph.blocks if graph.modules[path].class_name == class_name)
        modules += [path for path in alike if path in graph.modules]
    tensors = [tensor.name for path in modules if path in graph.modules for tensor in graph.modules[path].own_tensors]  # type: ignore[index]
    if any(name in decisions for name in tensors if name == absent.tensor):
        return {}
    return {name: plan.main_device for name in tensors if name not in decisions}


def _can_be_together(names: tuple[TensorName, ...], resolution: Resolution) -> bool:
    devices = {resolution.decisions[name].device for name in names if name in resolution.decisions}
    return len(names) > 1 and len(devices) <= 1


def block_of(graph: ModelGraph, path: str) -> str:
    """Return the block that a module or tensor belongs to; an empty path if it belongs to none."""
    while path and ModulePath(path) not in graph.blocks:
        path = path.rpartition(".")[0]
    return path


def tensors_of(graph: ModelGraph, place: str) -> tuple[TensorName, ...]:
    """Return a block's tensors; a tensor outside of blocks stands for all tensors of the same module, which it uses
    in turn.
    """
    if ModulePath(place) in graph.modules:
        return tuple(tensor.name for tensor in graph.modules[ModulePath(place)].tensors())
    owner = graph.modules.get(ModulePath(place.rpartition(".")[0]))
    return () if owner is None else tuple(tensor.name for tensor in owner.own_tensors)


def overfull(verdict: Verdict, plan: Plan, model: LoadedModel) -> list[tuple[SimulatedDevice, int]]:
    """Return the devices that held more at once than they have, with the excess in bytes.

    There are none for a quantised model, as the dry run has dense weights, or without a workload.
    """
    if model.quantization is not None or not plan.measured:
        return []
    capacities = {use.id: use.capacity_bytes for use in plan.devices}
    missing = [(device, device.peak_bytes - capacities[device.id]) for device in verdict.devices]
    return [(device, missing_bytes) for device, missing_bytes in missing if missing_bytes > 0]
