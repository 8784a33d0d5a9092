"""Verifies, tensor by tensor, that a loaded model is stored and runs on the planned devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.devices import CPU, DISK, Device, nth_accelerator
from devmap_config.dispatch.mapped_weights import mapped_place
from devmap_config.dispatch.weights_on_disk import place_in_file
from devmap_config.graph.checkpoint import read_header
from devmap_config.graph.model import Tensor, TensorName
from devmap_config.libraries.accelerate import hooks_of, streamed_from
from devmap_config.libraries.torch import non_persistent_buffers, own_buffers
from devmap_config.libraries.transformers import should_convert_module
from devmap_config.quantization.storage import PACKED_DTYPES
from devmap_config.simulate.simulation import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.execution.assignment import Location
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A tensor that is not on its planned device. `found` is `missing` if the model has no such tensor."""

    tensor: str
    planned: str
    found: str


@dataclass(frozen=True, slots=True)
class Misrun:
    """A module that does not run on its planned device. `found` is a device, with a remark if the module is
    streamed.
    """

    module: str
    planned: str
    found: str


def misplaced_tensors(
    model: PreTrainedModel, plan: Plan, graph: ModelGraph, *, is_quantized: bool = False
) -> tuple[Misplaced, ...]:
    """Return every parameter and buffer on which the plan and the model disagree.

    If `is_quantized`, a weight may have other names in its module (`qweight`, `weight_packed`), with scales beside it.
    These must then be on the device of tensors of their kind in a module with this location.
    """
    planned = {
        name: plan.executor.residence(graph.tensors[name], location) for name, location in plan.locations.items()
    }
    added = [name for name in _names_of(model) if name not in planned]
    companions: dict[str, list[str]] = {}
    for name in added:
        companions.setdefault(name.rpartition(".")[0], []).append(name)
    wrong: list[Misplaced] = []
    for name, expected in planned.items():
        module = name.rpartition(".")[0]
        home = tensor_home(model, name)
        is_renamed = home is None and is_quantized and module in companions
        if home != expected and not is_renamed:
            wrong.append(Misplaced(name, str(expected), "missing" if home is None else str(home)))
    locations: dict[str, set[Location]] = {}
    for name, location in plan.locations.items() if is_quantized else ():
        locations.setdefault(name.rpartition(".")[0], set()).add(location)
    for name in added:
        home = tensor_home(model, name)
        described = _described(model, name)
        around = locations.get(name.rpartition(".")[0], ())
        expected_here = {plan.executor.residence(described, location) for location in around}
        if home not in expected_here:
            wrong.append(Misplaced(name, " or ".join(map(str, sorted(expected_here))) or "nowhere", str(home)))
    return tuple(wrong)


def _described(model: PreTrainedModel, name: str) -> Tensor:
    """Return a tensor of a loaded model in the form of a graph, with the properties that matter to accelerate."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    is_buffer = attribute in own_buffers(module)
    return Tensor(
        TensorName(name),
        shape=(),
        dtype="",
        size_bytes=0,
        planner_bytes=0,
        kind="buffer" if is_buffer else "parameter",
        persistent=attribute not in non_persistent_buffers(module),
    )


def misread_by_quantizer(plan: Plan, graph: ModelGraph) -> tuple[str, ...]:
    """Return the tensors that this version of transformers quantises or leaves unquantised, contrary to the plan."""
    homes = {name: assignment for assignment in plan.assignments for name in assignment.tensors}
    offloaded = [
        assignment.unit
        for assignment in plan.assignments
        if plan.executor.is_offloaded(assignment.location, plan.main_device)
    ]
    return tuple(
        name
        for name, tensor in graph.tensors.items()
        if tensor.offloaded_bytes is not None
        and should_convert_module(name.rpartition(".")[0], offloaded) == (homes[name].unit in offloaded)
    )


def unquantized_tensors(model: PreTrainedModel, plan: Plan, graph: ModelGraph) -> tuple[str, ...]:
    """Return the tensors that the plan counts as quantised but that are not, as some quantizers skip offloaded ones."""
    unquantized: list[str] = []
    for assignment in plan.assignments:
        is_offloaded = plan.executor.is_offloaded(assignment.location, plan.main_device)
        for name in () if is_offloaded else assignment.tensors:
            planned = graph.tensors[name]
            if planned.offloaded_bytes is None:
                continue
            held = model.get_parameter_or_buffer(name)
            if held.is_floating_point() and held.numel() == planned.element_count:
                unquantized.append(name)
    return tuple(unquantized)


def misrun_modules(model: PreTrainedModel, plan: Plan) -> tuple[Misrun, ...]:
    """Return every module with own tensors that would run on another device, or be streamed, contrary to the plan."""
    wrong: dict[str, Misrun] = {}
    for assignment in plan.assignments:
        is_streamed = plan.executor.streams(assignment.location)
        for name in assignment.tensors:
            module = name.rpartition(".")[0]
            if (place := running_place(model, name)) is None:
                continue
            device, streams = place
            if device != assignment.location.runs_on or (streams and not is_streamed):
                found_there = f"{device}, streamed" if streams else str(device)
                wrong.setdefault(module, Misrun(module, str(assignment.location.runs_on), found_there))
    return tuple(wrong.values())


def running_place(model: PreTrainedModel, name: str) -> tuple[Device, bool] | None:
    """Return the device on which a tensor's module runs, and whether its weights are streamed there; `None` without a
    module.

    accelerate's hook determines this: the module's own, or that of a module around it which placed everything within.
    Without a hook, nothing is moved, and the module runs on the tensor's device.
    """
    import torch

    home = tensor_home(model, name)
    if home is None:
        return None
    if mapped_place(model, name) is not None:
        return CPU, True
    own = path = name.rpartition(".")[0]
    while True:
        for hook in hooks_of(model.get_submodule(path)):
            device = getattr(hook, "execution_device", None)
            if device is not None and (path == own or getattr(hook, "place_submodules", False)):
                return device_of(torch.device(device)), bool(getattr(hook, "offload", False))
        if not path:
            return home, False
        path = path.rpartition(".")[0]


def tensor_home(model: PreTrainedModel, name: str) -> Device | None:
    """Return the device of a tensor of a loaded model, or the one from which accelerate streams it; `None` if it has
    none.
    """
    parent_path, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        tensor: torch.Tensor | None = getattr(parent, attribute)
    except AttributeError:
        tensor = None
    if tensor is None:
        return None
    if mapped_place(model, name) is not None:
        return DISK
    return _streamed_from(model, name) if tensor.is_meta else device_of(tensor.device)


def _streamed_from(model: PreTrainedModel, name: str) -> Device:
    """Return the device from which accelerate's hook copies a tensor that it offloaded."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        for hook in hooks_of(model.get_submodule(path)):
            if (home := streamed_from(hook, path, name)) is not None:
                return home
    return NOWHERE


def misread_tensors(model: PreTrainedModel, plan: Plan, graph: ModelGraph) -> list[str]:
    """Return the errors of tensors that are read from disk at every forward, which no loading report covers.

    Each is compared with the header of the file that it is read from, or with its record in the offload folder.
    Quantised ones cannot be, since the graph has the shape before packing.
    """
    header_of = cache(read_header)
    wrong = []
    for name in (name for assignment in plan.assignments for name in assignment.tensors):
        place = _read_from(model, name)
        if place is None or graph.tensors[name].dtype in PACKED_DTYPES:
            continue
        file = place.get("safetensors_file")
        if file is None:
            shape = tuple(place["shape"])
        elif (entry := header_of(Path(file)).get(place["weight_name"])) is not None:
            shape = entry[1]
        else:
            wrong.append(f"`{name}` is not in `{Path(file).name}`")
            continue
        if shape != graph.tensors[name].shape:
            wrong.append(f"`{name}` is {list(shape)} on disk, and {list(graph.tensors[name].shape)} in the model")
    return wrong


def _read_from(model: PreTrainedModel, name: str) -> Mapping[str, Any] | None:
    """Return accelerate's record of the file from which a tensor on disk is read."""
    if (mapped := mapped_place(model, name)) is not None:
        return {"safetensors_file": mapped.file, "weight_name": mapped.name}
    return place_in_file(model, name) if tensor_home(model, name) == DISK else None


def _names_of(model: PreTrainedModel) -> list[str]:
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return parameters + buffers


def device_of(device: torch.device) -> Device:
    """Return the device for one of torch."""
    return CPU if device.type == "cpu" else nth_accelerator(device.type, device.index or 0)
