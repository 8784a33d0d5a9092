"""What each device needs besides weights while a plan runs, from the measured costs of the modules that run there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.placement.problem import is_accelerator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.problem import DeviceId
    from devmap_config.plan.assignment import Assignment
    from devmap_config.plan.executor import Executor


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCost:
    """Bytes that a device needs while the plan runs.

    `activation_bytes` are the largest peak of a module that runs there, with what caches keep alive beyond what they
    show; `streaming_bytes` the largest piece of weights that is copied in at once.
    """

    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    streaming_bytes: int = 0


def running_costs(
    graph: ModelGraph, assignments: Iterable[Assignment], executor: Executor
) -> dict[DeviceId, RunningCost]:
    """The running cost of each device, without a workload none."""
    measurement = graph.measurement
    if measurement is None:
        return {}
    placed = tuple(assignments)
    main_device = executor.main_device(each.stored_on for each in placed)
    covering = {each.unit: each.executes_on for each in placed}
    parts: dict[str, list[DeviceId]] = {}
    for each in placed:
        for ancestor in _ancestors(each.unit):
            parts.setdefault(ancestor, []).append(each.executes_on)
    cache: dict[DeviceId, int] = {}
    retained: dict[DeviceId, int] = {}
    peaks: dict[DeviceId, int] = {}
    for cost in measurement.modules:
        home = next((covering[path] for path in (cost.path, *_ancestors(cost.path)) if path in covering), None)
        if home is not None:
            devices, peak = [home], cost.peak_bytes
        else:
            # A module that is spread: its own operations run where its first part does, a block's parts share its peak.
            within = parts.get(cost.path) or [main_device]
            is_block = cost.path in graph.modules and graph.is_no_split(graph.modules[cost.path])  # type: ignore[index]
            devices = within if is_block else within[:1]
            peak = cost.peak_bytes if is_block else cost.own_peak_bytes
        cache[devices[0]] = cache.get(devices[0], 0) + cost.cache_bytes
        retained[devices[0]] = retained.get(devices[0], 0) + cost.retained_bytes
        for device in devices:
            peaks[device] = max(peaks.get(device, 0), peak)
    streaming = _streaming_bytes(graph, placed)
    return {
        device: RunningCost(
            kv_cache_bytes=cache.get(device, 0),
            activation_bytes=peaks.get(device, 0) + retained.get(device, 0),
            streaming_bytes=streaming.get(device, 0),
        )
        for device in dict.fromkeys([*cache, *peaks, *streaming])
    }


def _ancestors(path: str) -> Iterable[str]:
    """The modules around a path, nearest first, the model itself (`""`) last."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _streaming_bytes(graph: ModelGraph, assignments: tuple[Assignment, ...]) -> dict[DeviceId, int]:
    """The largest module, with tensors of its own, that accelerate's hooks copy to where it runs: one at a time."""
    largest: dict[DeviceId, int] = {}
    for each in assignments:
        is_streamed = each.stored_on == "disk" or (each.stored_on == "cpu" and is_accelerator(each.executes_on))
        if not is_streamed:
            continue
        by_module: dict[str, int] = {}
        for name in each.tensors:
            if graph.tensors[name].kind == "parameter":
                module = name.rpartition(".")[0]
                by_module[module] = by_module.get(module, 0) + graph.tensors[name].size_bytes
        largest[each.executes_on] = max([largest.get(each.executes_on, 0), *by_module.values()])
    return largest
