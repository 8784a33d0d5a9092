"""What a strategy is asked: the tensors, the room on each device, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.executor import Executor
    from devmap_config.placement.timing import Phase

DeviceId = str
"""A canonical device name: `cuda:0`, `mps`, `cpu`, `disk`."""

STORAGE_DEVICES = ("cpu", "disk")
"""What is not an accelerator."""

Placement = Mapping["TensorName", DeviceId]
"""The device of every tensor that has one."""


def is_accelerator(device: DeviceId) -> bool:
    """Whether modules on this device run there without being streamed."""
    return device not in STORAGE_DEVICES


@dataclass(frozen=True)
class Problem:
    """One placement to decide.

    `capacities` is in the order in which devices are filled (accelerators by index, then `cpu`, then `disk`), in
    bytes. `pinned` tensors are decided already, and `computed` says where they run where a rule does. `groups` are
    tensors that must share a device besides those that share a storage; `forbidden` are devices that a tensor must not
    be on. `quantizer_lowers_budgets` tells of a quantizer
    that takes a tenth off every budget before transformers' planner fills it, `refused` the devices that it loads
    nothing onto.
    """

    graph: ModelGraph
    capacities: Mapping[DeviceId, int]
    pinned: Placement = field(default_factory=dict)
    computed: Placement = field(default_factory=dict)
    groups: tuple[tuple[TensorName, ...], ...] = ()
    forbidden: Mapping[TensorName, tuple[DeviceId, ...]] = field(default_factory=dict)
    quantizer_lowers_budgets: bool = False
    refused: tuple[DeviceId, ...] = ()

    @property
    def accelerators(self) -> tuple[DeviceId, ...]:
        """The devices that compute without streaming, in order."""
        return tuple(device for device in self.capacities if is_accelerator(device))

    @property
    def pinned_bytes(self) -> dict[DeviceId, int]:
        """Bytes that the pins take on each device; what is tied counts once."""
        return bytes_by_device(self.graph, self.pinned)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is to take the least time: phases, each with how often it is run; on which machine, and run by what."""

    phases: tuple[tuple[Phase, int], ...]
    inventory: Inventory
    executor: Executor


def bytes_by_device(graph: ModelGraph, placement: Placement) -> dict[DeviceId, int]:
    """Bytes that a placement puts on each device; what is tied counts once a device."""
    names: dict[DeviceId, list[TensorName]] = {}
    for name, device in placement.items():
        names.setdefault(device, []).append(name)
    return {device: graph.weights_bytes(tuple(held)) for device, held in names.items()}
