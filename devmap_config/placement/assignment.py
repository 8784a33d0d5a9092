"""`Location` and `Assignment`: what a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.graph.model import TensorName


@dataclass(frozen=True, slots=True)
class Location:
    """Where weights are stored, and where the module that they belong to runs."""

    stored_on: Device
    runs_on: Device


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit (module path or tensor name; `""` is the whole model), and where it is stored and runs."""

    unit: str
    tensors: tuple[TensorName, ...]
    location: Location
