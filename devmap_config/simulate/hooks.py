"""Attaches the hooks that accelerate attaches for a plan's device_map to a model without data."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import hooks

from devmap_config.devices import CPU, DISK
from devmap_config.dispatch.cpu_compute import compute_on_cpu
from devmap_config.dispatch.prefills import prefill_on
from devmap_config.libraries.accelerate import placing_tensors_with
from devmap_config.libraries.torch import own_buffers, own_parameters
from devmap_config.libraries.transformers import skip_keys
from devmap_config.simulate.simulation import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan
    from devmap_config.simulate.devices import SimulatedDevices


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model, by all of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def hold_in_buffers(model: PreTrainedModel, graph: ModelGraph) -> None:
    """Register as buffers those weights that a quantizer holds in buffers, which accelerate treats differently from
    parameters.
    """
    for tensor in graph.tensors.values():
        if tensor.in_buffer:
            path, _, name = tensor.name.rpartition(".")
            module = model.get_submodule(path)
            held = getattr(module, name).detach()
            delattr(module, name)
            module.register_buffer(name, held)


def place_weights(model: PreTrainedModel, plan: Plan, graph: ModelGraph, devices: SimulatedDevices) -> None:
    """Label every tensor of the model with the device that the plan stores it on."""
    held = tensors_of(model)
    for assignment in plan.assignments:
        for name in assignment.tensors:
            if name in held:
                devices.put(held[name], plan.executor.residence(graph.tensors[name], assignment.location))


@contextmanager
def dispatched(
    model: PreTrainedModel, plan: Plan, graph: ModelGraph, devices: SimulatedDevices, absent: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Attach accelerate's hooks as `dispatch_model` does, with simulated copies, while the context lasts.

    If a plan has one device and nothing is streamed, `from_pretrained` attaches none, and neither does this. `absent`
    holds, by name of each streamed tensor, the tensor that replaces it while it is not copied in.
    """
    stores = {assignment.location.stored_on for assignment in plan.assignments}
    if len(stores) == 1 and DISK not in stores and not plan.compute:
        yield
        return
    main_device = devices.torch_device(plan.main_device)
    streamed = {assignment.unit: plan.executor.streams(assignment.location) for assignment in plan.assignments}
    execution_device: dict[str, torch.device] = {
        assignment.unit: devices.torch_device(assignment.location.runs_on) for assignment in plan.assignments
    }
    execution_device[""] = main_device
    # For a quantised weight, the packed data are copied rather than the matrix.
    held_bytes = {
        str(name): plan.executor.held_bytes(graph.tensors[name], assignment.location, plan.main_device)
        for assignment in plan.assignments
        for name in assignment.tensors
    }
    placing = _Placing(model, devices, absent, held_bytes, plan.main_device)
    with placing_tensors_with(placing):
        try:
            hooks.attach_align_device_hook_on_blocks(
                model,
                execution_device=execution_device,
                offload=streamed,
                offload_buffers=plan.executor.offload_buffers,
                weights_map=placing.kept,
                skip_keys=skip_keys(model),  # as transformers passes it
            )
            compute_on_cpu(model, [unit for unit in plan.computed_on_cpu if unit not in plan.prefilled])
            prefill_on(model, plan.prefilled, main_device, placing)
            yield
        finally:
            placing.is_over = True
            hooks.remove_hook_from_submodules(model)


class _Placing:
    """Replaces accelerate's `set_module_tensor_to_device`, which needs data."""

    def __init__(
        self,
        model: PreTrainedModel,
        devices: SimulatedDevices,
        absent: Mapping[str, torch.Tensor],
        held_bytes: Mapping[str, int],
        main_device: Device,
    ) -> None:
        self.main_device = main_device
        self.devices = devices
        self.absent = absent
        self.held_bytes = held_bytes
        self.kept = tensors_of(model)
        self.names = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
        self.is_over = False
        self.lock = threading.RLock()

    def __call__(
        self, module: torch.nn.Module, tensor_name: str, device: Any, value: torch.Tensor | None = None, **_options: Any
    ) -> None:
        """Put a tensor of a module on a device: release it (`meta`), copy it in, or label it as being there."""
        inner, _dot, leaf = tensor_name.rpartition(".")
        owner = module.get_submodule(inner)
        path = ".".join(filter(None, (self.names[id(module)], tensor_name)))
        if self.is_over:
            _set(owner, leaf, self.kept[path])
            return
        target = self.devices.named(device)
        if target == NOWHERE:
            _set(owner, leaf, self.absent[path])
        elif value is not None:
            source = self.devices.of(value)
            _set(owner, leaf, self.devices.moved(value, target, source=source, size_bytes=self.held_bytes[path]))
        else:
            self.devices.put(getattr(owner, leaf), target)

    def begin(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights for a module that now runs on the main device, but computes on the CPU otherwise."""
        path = self.names[id(module)]
        return {
            name: self.devices.moved(
                parameter, self.main_device, source=CPU, size_bytes=self.held_bytes[f"{path}.{name}"]
            )
            for name, parameter in module.named_parameters(recurse=False)
        }

    def end(self, module: torch.nn.Module) -> None:
        """Say that a module has run."""


def _set(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    parameters = own_parameters(module)
    if name in parameters:
        parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        own_buffers(module)[name] = tensor
