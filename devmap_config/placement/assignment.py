"""`Assignment`: what a plan is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devmap_config.graph.model import TensorName
    from devmap_config.placement.problem import DeviceId


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit (module path or tensor name; `""` is the whole model), where it is stored and where it runs."""

    unit: str
    tensors: tuple[TensorName, ...]
    stored_on: DeviceId
    executes_on: DeviceId
