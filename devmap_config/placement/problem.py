"""The placement problem that a strategy solves: the tensors, the capacities, and the constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, Device
from devmap_config.execution.executor import LEFT, Executor

if TYPE_CHECKING:
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.hardware.inventory import Inventory

Placement = Mapping["TensorName", Device]
"""The device of each tensor that has been placed."""


@dataclass(frozen=True)
class Problem:
    """One placement to decide.

    `capacities` are in bytes, in the order of filling (accelerators by index, then `cpu`, then `disk`). The devices of
    `pinned` tensors are decided already, and `computed` holds the devices that rules have them run on. `groups` are
    tensors that must share a device, besides those that share a storage; `forbidden` are devices that must not store a
    tensor. `quantizer_lowers_budgets` is true if the quantizer takes a tenth off every budget before transformers'
    planner fills it; `refused` are the devices that it does not load onto. `executor` runs the plan. `single_device` is
    the device for the strategy `single`, `aim` the objective of our own strategies.
    """

    graph: ModelGraph
    capacities: Mapping[Device, int]
    pinned: Placement = field(default_factory=dict)
    computed: Placement = field(default_factory=dict)
    groups: tuple[tuple[TensorName, ...], ...] = ()
    forbidden: Mapping[TensorName, tuple[Device, ...]] = field(default_factory=dict)
    quantizer_lowers_budgets: bool = False
    refused: tuple[Device, ...] = ()
    executor: Executor = LEFT
    single_device: Device | None = None
    aim: Aim | None = None

    @property
    def accelerators(self) -> tuple[Device, ...]:
        """The accelerators, in order."""
        return tuple(device for device in self.capacities if device.is_accelerator)

    def takes_weights(self, device: Device) -> bool:
        """Return whether weights may be stored on a device: the quantizer accepts it, or a rule names it."""
        return device not in self.refused or device in self.pinned.values()

    @property
    def pinned_bytes(self) -> dict[Device, int]:
        """The least bytes that the pins take on each device; tied tensors count once.

        Streamed modules leave buffers on the main device only once an accelerator is in use.
        """
        first = self.accelerators[:1]
        main_device = first[0] if first and first[0] in self.pinned.values() else None
        return bytes_by_device(self, self.pinned, main_device=main_device)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """The objective: the phases whose time is minimised, each with the number of times that it is run, and
    the machine.
    """

    phases: tuple[tuple[Phase, int], ...]
    inventory: Inventory


def bytes_by_device(problem: Problem, placement: Placement, *, main_device: Device | None = None) -> dict[Device, int]:
    """Return the bytes that a placement takes on each device; tied tensors count once on each device.

    Without a main device, which runs streamed modules, all tensors count on the device that stores them.
    """
    executor, tensors = problem.executor, problem.graph.tensors
    runs_streamed = main_device or next(iter(problem.accelerators), CPU)
    names: dict[Device, list[TensorName]] = {}
    offloaded: set[TensorName] = set()
    for name, device in placement.items():
        location = executor.location(device, runs_streamed, problem.computed.get(name))
        residence = device if main_device is None else executor.residence(tensors[name], location)
        names.setdefault(residence, []).append(name)
        if executor.is_offloaded(location, runs_streamed):
            offloaded.add(name)
    return {device: problem.graph.weights_bytes(held, offloaded) for device, held in names.items()}
