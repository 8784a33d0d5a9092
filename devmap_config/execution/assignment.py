"""`Location` and `Assignment`: the parts that a plan consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.graph.model import TensorName


@dataclass(frozen=True, slots=True)
class Location:
    """The device that stores weights, and the device that runs their module."""

    stored_on: Device
    runs_on: Device

    @property
    def is_one_device(self) -> bool:
        """True if the module runs where its weights are stored."""
        return self.stored_on == self.runs_on


ON_CPU = Location(CPU, CPU)
"""The location of modules that the CPU stores and runs."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit (module path or tensor name; `""` is the whole model), and the devices that store and run it."""

    unit: str
    tensors: tuple[TensorName, ...]
    location: Location
