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
"""The device of every tensor that has one."""


@dataclass(frozen=True)
class Problem:
    """One placement to decide.

    `capacities` is in the order in which devices are filled (accelerators by index, then `cpu`, then `disk`), in
    bytes. `pinned` tensors are decided already, and `computed` says where they run where a rule does. `groups` are
    tensors that must share a device besides those that share a storage; `forbidden` are devices that a tensor must not
    be on. `quantizer_lowers_budgets` tells of a quantizer that takes a tenth off every budget before transformers'
    planner fills it, `refused` the devices that it loads nothing onto. `executor` is what runs it. `single_device` is
    the one that `single` is told to use, `aim` what our own strategies are to make fast.
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
        """The devices that compute without streaming, in order."""
        return tuple(device for device in self.capacities if device.is_accelerator)

    def takes_weights(self, device: Device) -> bool:
        """Return whether weights may be stored on a device: the quantizer accepts it, or a rule names it all
        the same.
        """
        return device not in self.refused or device in self.pinned.values()

    @property
    def pinned_bytes(self) -> dict[Device, int]:
        """Bytes that the pins take on each device at least; what is tied counts once.

        Where streamed modules run, and so leave buffers, is known once the first accelerator is in use.
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
    """Return the bytes that a placement takes on each device; what is tied counts once a device.

    Without a main device, on which streamed modules run, all of them count where they are stored.
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
