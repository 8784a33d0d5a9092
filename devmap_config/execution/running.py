"""The memory that each device needs besides weights while a plan runs, from the measured costs of modules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.pieces import copied_bytes, pieces_of
from devmap_config.execution.timing import home_of
from devmap_config.graph.costs import LAYERS_UNDER_WAY, ModuleCost
from devmap_config.graph.model import ancestors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Assignment
    from devmap_config.execution.executor import Executor
    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.model import ModelGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCost:
    """Bytes that a device needs while the plan runs.

    `activation_bytes` is the largest peak of a module that runs there, plus the bytes that caches retain beyond their
    elements, and the parts of an offloaded cache that are being copied. `streaming_bytes` is the largest piece of
    weights that is copied in at once.
    """

    kv_cache_bytes: int = 0
    activation_bytes: int = 0
    streaming_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all."""
        return self.kv_cache_bytes + self.activation_bytes + self.streaming_bytes

    def plus(self, kv_cache_bytes: int, activation_bytes: int) -> RunningCost:
        """Return the cost with these bytes added."""
        return replace(
            self,
            kv_cache_bytes=self.kv_cache_bytes + kv_cache_bytes,
            activation_bytes=self.activation_bytes + activation_bytes,
        )


@dataclass(frozen=True)
class Running:
    """The modules that run on each device, equal ones counted together.

    Attributes:
        most_tokens: the longest context that the model takes, whatever the memory.
        holding: modules whose cache is on the device.
        peaking: modules whose peak is on the device.
        own: modules spread over devices, whose own operations run on the device, but not all of their children.
    """

    workload: WorkloadShape
    holding: Mapping[Device, Mapping[ModuleCost, int]]
    peaking: Mapping[Device, tuple[ModuleCost, ...]]
    own: Mapping[Device, tuple[ModuleCost, ...]]
    streaming: Mapping[Device, int]
    most_tokens: int | None = None

    def costs(self, context_length: int | None = None) -> dict[Device, RunningCost]:
        """Return the bytes that each device needs, at the workload's context length or another one."""
        workload = self.workload

        def at(cost: ModuleCost) -> ModuleCost:
            return cost if context_length is None else cost.at(workload, context_length)

        costs_by_device = {}
        for device in dict.fromkeys([*self.holding, *self.peaking, *self.own, *self.streaming]):
            held = [(at(cost), count) for cost, count in self.holding.get(device, {}).items()]
            peaks = [at(cost).peak_bytes for cost in self.peaking.get(device, ())]
            own = [at(cost).own_peak_bytes for cost in self.own.get(device, ())]
            retained_bytes = sum(cost.retained_bytes * count for cost, count in held)
            costs_by_device[device] = RunningCost(
                kv_cache_bytes=sum(cost.cache_bytes * count for cost, count in held),
                activation_bytes=max([*peaks, *own], default=0) + retained_bytes,
                streaming_bytes=self.streaming.get(device, 0),
            )
        return self._with_offloaded(costs_by_device, context_length)

    def _with_offloaded(
        self, costs: dict[Device, RunningCost], context_length: int | None
    ) -> dict[Device, RunningCost]:
        """Return the costs with the offloaded part of a cache on the CPU, plus the parts in transit on the CPU and on a
        card.
        """
        before, workload = self.workload, self.workload
        if context_length is not None:
            workload = before.at(context_length)
        held = {
            device: [(cost.at(before, workload.context_length), count) for cost, count in counts.items()]
            for device, counts in self.holding.items()
            if device.is_accelerator and any(cost.offloaded_bytes for cost in counts)
        }
        if not held:
            return costs
        offloading = [item for counts in held.values() for item in counts if item[0].offloaded_bytes]
        visiting_bytes = max((cost.visiting_bytes(workload) for cost, _ in offloading), default=0)
        for device, counts in held.items():
            offloaded_bytes = sum(cost.offloaded_bytes * count for cost, count in counts)
            let_go_bytes = sum(cost.retained_bytes * count for cost, count in counts if cost.offloaded_bytes)
            costs[device] = costs[device].plus(-offloaded_bytes, visiting_bytes - let_go_bytes)
        offloaded_bytes = sum(cost.offloaded_bytes * count for cost, count in offloading)
        pinned_bytes = sum(cost.pinned_bytes(workload) * count for cost, count in offloading)
        pinned_bytes += LAYERS_UNDER_WAY * max((cost.pinned_bytes(workload) for cost, _ in offloading), default=0)
        costs[CPU] = costs.get(CPU, RunningCost()).plus(offloaded_bytes, pinned_bytes - offloaded_bytes)
        return costs


def running_of(graph: ModelGraph, assignments: Iterable[Assignment], executor: Executor) -> Running | None:
    """Return the modules that run on each device under these assignments, or `None` without a workload."""
    measurement = graph.measurement
    if measurement is None:
        return None
    placed = tuple(assignments)
    main_device = executor.main_device(assignment.location.stored_on for assignment in placed)
    covering = {assignment.unit: assignment.location.runs_on for assignment in placed}
    parts: dict[str, list[Device]] = {}
    for assignment in placed:
        for ancestor in ancestors(assignment.unit):
            parts.setdefault(ancestor, []).append(assignment.location.runs_on)
    prefilling = {
        assignment.unit: executor.prefill_location(assignment.unit, assignment.location, main_device).runs_on
        for assignment in placed
    }
    holding: dict[Device, Counter[ModuleCost]] = {}
    peaking: dict[Device, list[ModuleCost]] = {}
    own: dict[Device, list[ModuleCost]] = {}
    for cost in measurement.modules:
        home = next((covering[path] for path in (cost.path, *ancestors(cost.path)) if path in covering), None)
        if home is not None:
            devices, figures = list(dict.fromkeys([home, prefilling.get(cost.path, home)])), peaking
        else:
            # The own operations of a module that is spread run where its first part does; the parts of a block share
            # its peak. A module without tensors within a block that is spread runs where that block does.
            around = next((path for path in ancestors(cost.path) if _is_block(graph, path) and path in parts), None)
            within = parts.get(cost.path) or [main_device if around is None else home_of(parts[around])]
            is_block = _is_block(graph, cost.path)
            devices, figures = (within, peaking) if is_block else (within[:1], own)
        if cost.cache_bytes or cost.retained_bytes:
            held = _cache_part(cost, is_offloaded=executor.offloads_cache(cost.path))
            holding.setdefault(devices[0], Counter())[held] += 1
        for device in devices:
            figures.setdefault(device, []).append(cost)
    return Running(
        workload=measurement.workload,
        holding=holding,
        peaking={device: _largest(costs) for device, costs in peaking.items()},
        own={device: _largest(costs) for device, costs in own.items()},
        streaming=_streaming_bytes(graph, placed, executor, main_device),
        most_tokens=measurement.positions.most,
    )


def _is_block(graph: ModelGraph, path: str) -> bool:
    return path in graph.modules and graph.is_no_split(graph.modules[path])  # type: ignore[index]


LONGEST_CONTEXT = 2**24
"""The longest context that is stated if neither a growing cache nor the end of positions limits it."""


def longest_context(running: Running, room: Mapping[Device, int]) -> int:
    """Return the longest context, in tokens, that every device has room for beside its weights; 0 if none fits."""

    def fits(context_length: int) -> bool:
        costs = running.costs(context_length)
        return all(cost.total_bytes <= room.get(device, 0) for device, cost in costs.items())

    low, high = 0, running.most_tokens or LONGEST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _cache_part(cost: ModuleCost, *, is_offloaded: bool) -> ModuleCost:
    """Return the part of a cost that concerns the cache."""
    return ModuleCost(
        path="",
        cache_bytes=cost.cache_bytes,
        doubled_cache_bytes=cost.doubled_cache_bytes,
        retained_bytes=cost.retained_bytes,
        offloaded_bytes=cost.offloaded_bytes if is_offloaded else 0,
        offloaded_largest_bytes=cost.offloaded_largest_bytes if is_offloaded else 0,
    )


def _largest(costs: Iterable[ModuleCost]) -> tuple[ModuleCost, ...]:
    """Return the costs that no other exceeds in every figure; at any context, one of them is the largest."""
    by_peaks = {_peaks(cost): cost for cost in costs}
    largest: list[tuple[int, ...]] = []
    for peaks in sorted(by_peaks, reverse=True):
        if not any(all(other >= own for other, own in zip(larger, peaks, strict=True)) for larger in largest):
            largest.append(peaks)
    return tuple(by_peaks[peaks] for peaks in largest)


def _peaks(cost: ModuleCost) -> tuple[int, ...]:
    prefill = (cost.prefill_peak_bytes, cost.doubled_peak_bytes)
    return (*prefill, cost.decode_peak_bytes, cost.own_peak_bytes, cost.doubled_own_peak_bytes)


def _streaming_bytes(
    graph: ModelGraph, assignments: tuple[Assignment, ...], executor: Executor, main_device: Device
) -> dict[Device, int]:
    """Return the bytes of the largest piece that is copied to each device, times the number of pieces there at once."""
    locations = {
        name: executor.prefill_location(assignment.unit, assignment.location, main_device)
        for assignment in assignments
        for name in assignment.tensors
    }
    largest: dict[Device, int] = {}
    for piece in pieces_of(graph, executor, main_device):
        for device, size_bytes in copied_bytes(graph, piece, locations, executor, main_device).items():
            largest[device] = max(largest.get(device, 0), size_bytes)
    return {device: size_bytes * executor.pieces_at_once for device, size_bytes in largest.items()}
