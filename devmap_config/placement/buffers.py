"""Whether the buffers of streamed modules are to be streamed with them: accelerate's `offload_buffers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import STORAGE_DEVICES
from devmap_config.placement.executor import LEFT, OFFLOADED
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.executor import Executor
    from devmap_config.placement.prepared import Prepared


def executors_for(prepared: Prepared) -> tuple[Executor, ...]:
    """Return what may run a plan of this profile, the first that fits is to be taken: buffers stay unless they must go.

    They go of a quantizer that is not known here: whether it holds weights in parameters or in buffers, these are then
    streamed as the plan counts them.
    """
    asked, model = prepared.loaded.profile.placement.offload.buffers.value, prepared.model
    if model.quantization is not None and model.quantization.method.offloads_buffers:
        return (OFFLOADED,)
    if asked is not None:
        return (OFFLOADED if asked else LEFT,)
    if not model.is_counted:
        return (OFFLOADED,)
    return (LEFT, OFFLOADED) if can_be_offloaded(model.graph, prepared.capacities) else (LEFT,)


def can_be_offloaded(graph: ModelGraph, capacities: Mapping[Device, int]) -> bool:
    """Whether there are buffers that a checkpoint holds, and a device from which they could be streamed."""
    is_held = any(tensor.is_held_in_buffer and tensor.persistent for tensor in graph.tensors.values())
    return is_held and any(device in STORAGE_DEVICES for device in capacities)


def are_to_be_compared(prepared: Prepared) -> bool:
    """Return whether the plan that streams buffers may be the better though the other fits: they hold weights."""
    is_optimal = prepared.strategy in OPTIMAL_STRATEGIES
    return is_optimal and any(tensor.in_buffer for tensor in prepared.graph.tensors.values())
