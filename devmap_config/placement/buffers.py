"""Whether the buffers of streamed modules are to be streamed with them: accelerate's `offload_buffers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes, format_exact_bytes
from devmap_config.placement.devices import STORAGE_DEVICES
from devmap_config.placement.executor import LEFT, OFFLOADED
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.devices import DeviceId
    from devmap_config.placement.executor import Executor
    from devmap_config.placement.prepared import Prepared
    from devmap_config.placement.strategies import Infeasible
    from devmap_config.profile.loading import LoadedProfile


def executors_for(prepared: Prepared) -> tuple[Executor, ...]:
    """Return what may run a plan of this profile, the first that fits is to be taken: buffers stay unless they must go.

    They go of a quantizer that is not known here: whether it holds weights in parameters or in buffers, these are then
    streamed as the plan counts them.
    """
    asked, model = prepared.loaded.profile.placement.offload.buffers, prepared.model
    if model.quantization is not None and model.quantization.method.offloads_buffers:
        return (OFFLOADED,)
    if asked is not None:
        return (OFFLOADED if asked else LEFT,)
    if not model.is_counted:
        return (OFFLOADED,)
    return (LEFT, OFFLOADED) if can_be_offloaded(model.graph, prepared.capacities) else (LEFT,)


def can_be_offloaded(graph: ModelGraph, capacities: Mapping[DeviceId, int]) -> bool:
    """Whether there are buffers that a checkpoint holds, and a device from which they could be streamed."""
    is_held = any(tensor.is_held_in_buffer and tensor.persistent for tensor in graph.tensors.values())
    return is_held and any(device in STORAGE_DEVICES for device in capacities)


def are_to_be_compared(prepared: Prepared) -> bool:
    """Return whether the plan that streams buffers may be the better though the other fits: they hold weights."""
    is_optimal = prepared.strategy in OPTIMAL_STRATEGIES
    return is_optimal and any(tensor.in_buffer for tensor in prepared.graph.tensors.values())


def report_left_buffers(infeasible: Infeasible | None, strategy: str | None, loaded: LoadedProfile, sink: Sink) -> None:
    """Say that the model would fit if the profile did not want buffers left where streamed modules run.

    `strategy` is one with which it would, where it would not with the profile's.
    """
    shortage = next((each for each in infeasible.shortages if each.device), None) if infeasible else None
    lack = (
        f"{shortage.device} would hold {format_bytes(shortage.needed_bytes)}"
        f" and has {format_bytes(shortage.capacity_bytes)}: {format_exact_bytes(shortage.missing_bytes)} are missing"
        if shortage
        else "it does not fit"
    )
    sink.error(
        "over-capacity",
        f"with `buffers: false` the buffers of what is streamed stay where it runs, and {lack}",
        loaded.span("placement", "offload", "buffers"),
        help="say `buffers: true`, or leave it out"
        + (f", and `strategy: {strategy}`" if strategy else "")
        + ": it was tried, and fits",
    )
