"""Selects the executors that may run a plan: ours, which copies ahead, or accelerate's hooks, with or without
`offload_buffers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK, PINNING_KIND, STORAGE_DEVICES
from devmap_config.execution.executor import AHEAD, LEFT, OFFLOADED, PREFILLING
from devmap_config.execution.prefills import prefilled_from
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.execution.executor import Executor
    from devmap_config.graph.model import ModelGraph
    from devmap_config.prepared import Prepared


def executors_for(prepared: Prepared) -> tuple[Executor, ...]:
    """Return the executors that may run a plan of this profile, in order of preference.

    Executors that copy ahead come first: from the disk if only the CPU computes, and from the CPU to CUDA cards.
    Buffers are offloaded only if nothing fits otherwise. With an unknown quantizer they always are: whether it holds
    weights in parameters or in buffers, these are then streamed as the plan counts them.
    """
    offloads_buffers, model = prepared.loaded.profile.placement.offload.buffers.value, prepared.model
    if model.quantization is not None and model.quantization.method.offloads_buffers:
        return (OFFLOADED,)
    if offloads_buffers is not None:
        return (OFFLOADED if offloads_buffers else LEFT,)
    if not model.is_counted:
        return (OFFLOADED,)
    ahead: tuple[Executor, ...] = ()
    if model.quantization is None and _can_be_brought_ahead(prepared.capacities):
        ahead = (AHEAD,)
    if ahead and CPU in prepared.capacities and (modules := prefilled_from(model.graph, prepared.inventory)):
        ahead = (replace(AHEAD, name=PREFILLING, prefilled_from=modules), *ahead)
    return (*ahead, LEFT, OFFLOADED) if can_be_offloaded(model.graph, prepared.capacities) else (*ahead, LEFT)


def _can_be_brought_ahead(capacities: Mapping[Device, int]) -> bool:
    """Return whether our executor can copy weights ahead: from the disk if only the CPU computes, or from the CPU to
    CUDA cards.
    """
    kinds = {device.kind for device in capacities if device.is_accelerator}
    return (CPU in capacities and kinds == {PINNING_KIND}) or (DISK in capacities and not kinds)


def can_be_offloaded(graph: ModelGraph, capacities: Mapping[Device, int]) -> bool:
    """Return whether the checkpoint holds buffers, and the machine has a device to offload them to."""
    is_held = any(tensor.is_held_in_buffer and tensor.persistent for tensor in graph.tensors.values())
    return is_held and any(device in STORAGE_DEVICES for device in capacities)


def are_to_be_compared(prepared: Prepared) -> bool:
    """Return whether the plan of a later executor may be better even if an earlier one fits, as it needs less memory
    to run.
    """
    if prepared.strategy not in OPTIMAL_STRATEGIES:
        return False
    holds_weights_in_buffers = any(tensor.in_buffer for tensor in prepared.graph.tensors.values())
    return holds_weights_in_buffers or executors_for(prepared)[0].works_ahead
