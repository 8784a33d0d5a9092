"""`Location` and `Assignment`: what a plan is made of."""

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
"""Where what computes on the CPU is."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit (module path or tensor name; `""` is the whole model), and where it is stored and runs."""

    unit: str
    tensors: tuple[TensorName, ...]
    location: Location
