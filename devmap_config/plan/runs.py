"""Summarises a plan as runs: blocks that a device holds in the same way, such as layers 0 to 39, with their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from devmap_config.devices import CPU, Device
from devmap_config.plan.explanation import block_of
from devmap_config.rules.folding import fold_paths
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.pipeline.stages import Pipeline
    from devmap_config.plan.plan import Plan

Mode = Literal["resident", "streamed", "computed-on-cpu", "tensor-parallel"]
"""Weights run on the device that stores them; they are copied to another device at every forward; a CPU beside cards
stores them and computes with them; or each device of a group has a share of them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Blocks of one kind that a device holds in the same way.

    Attributes:
        patterns: the modules and tensors that it holds, folded into patterns.
        device: the device whose memory holds their weights.
        runs_on: the device that computes with them.
        mode: how their weights get to the device that runs them.
        blocks: the number of blocks.
        first: the first unit of them in the plan.
        weights_bytes: the bytes that they add to the runs before them; tied tensors count once.
    """

    patterns: tuple[str, ...]
    device: Device
    runs_on: Device
    mode: Mode
    blocks: int
    first: str
    weights_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "patterns": list(self.patterns), "device": str(self.device), "runs_on": str(self.runs_on)}


class _HeldTensors(NamedTuple):
    """The tensors of one block that a device holds in one mode, and the plan's names for them."""

    device: Device
    runs_on: Device
    mode: Mode
    block: str


class _Kind(NamedTuple):
    """The key of a run: the block's path without numbers, and the parts on the device."""

    device: Device
    runs_on: Device
    mode: Mode
    path: tuple[str, ...]
    parts: tuple[str, ...]


def runs_of(plan: Plan, graph: ModelGraph) -> tuple[Run, ...]:
    """Return the runs of a plan, in the plan's order of devices and the model's order of blocks.

    The weights of a device's runs add up to its `weights_bytes`. A stage of a pipeline is one run on each of its
    devices.
    """
    if plan.pipeline is not None:
        return tuple(_stages(plan, plan.pipeline))
    held: dict[_HeldTensors, dict[str, list[TensorName]]] = {}
    for device, runs_on, mode, unit, name in _stored(plan, graph):
        block = block_of(graph, name)
        named = unit if unit and not block.startswith(f"{unit}.") else block
        held.setdefault(_HeldTensors(device, runs_on, mode, block), {}).setdefault(named, []).append(name)
    kinds: dict[_Kind, list[_HeldTensors]] = {}
    for key, parts in held.items():
        path = tuple("" if number_in(segment) is not None else segment for segment in key.block.split("."))
        relative = tuple(part[len(key.block) :] for part in parts)
        kinds.setdefault(_Kind(key.device, key.runs_on, key.mode, path, relative), []).append(key)
    offloaded = {
        name
        for assignment in plan.assignments
        if plan.executor.is_offloaded(assignment.location, plan.main_device)
        for name in assignment.tensors
    }
    runs = []
    for use in plan.devices:
        names: list[TensorName] = []
        before_bytes = 0
        for kind, alike in kinds.items():
            if kind.device != use.id:
                continue
            names += (name for path in alike for tensors in held[path].values() for name in tensors)
            held_bytes = graph.weights_bytes(names, offloaded)
            runs.append(
                Run(
                    patterns=fold_paths(part for path in alike for part in held[path]),
                    device=use.id,
                    runs_on=kind.runs_on,
                    mode=kind.mode,
                    blocks=len(alike),
                    first=next(iter(held[alike[0]])),
                    weights_bytes=held_bytes - before_bytes,
                )
            )
            before_bytes = held_bytes
    return tuple(runs)


def _stages(plan: Plan, pipeline: Pipeline) -> Iterator[Run]:
    stage_of = {device: stage for stage in pipeline.stages for device in stage.devices}
    for use in plan.devices:
        if (stage := stage_of.get(use.id)) is None:
            continue
        units = [
            assignment.unit for assignment in plan.assignments if assignment.location.stored_on == stage.devices[0]
        ]
        patterns = fold_paths(units)
        yield Run(
            patterns=tuple(sorted(patterns, key=lambda pattern: "[" not in pattern)),  # its layers come first
            device=use.id,
            runs_on=use.id,
            mode="resident" if len(stage.devices) == 1 else "tensor-parallel",
            blocks=stage.layers,
            first=units[0],
            weights_bytes=use.weights_bytes,
        )


def _stored(plan: Plan, graph: ModelGraph) -> Iterator[tuple[Device, Device, Mode, str, TensorName]]:
    """Yield each tensor with the device that holds it, the one that runs it, the mode, and its unit."""
    location_of = {
        name: (assignment.unit, assignment.location) for assignment in plan.assignments for name in assignment.tensors
    }
    for name in graph.tensors:
        if name not in location_of:
            continue
        unit, location = location_of[name]
        device = plan.executor.residence(graph.tensors[name], location)
        mode: Mode = "resident"
        if device != location.runs_on:
            mode = "streamed"
        elif device == CPU and plan.main_device.is_accelerator:
            mode = "computed-on-cpu"
        yield device, location.runs_on, mode, unit, name
