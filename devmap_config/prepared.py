"""A profile that is ready to be placed: with its machine, its model, and what its rules decide there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.resolution import Resolution


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the stages before placing made of a profile."""

    loaded: LoadedProfile
    inventory: Inventory
    model: LoadedModel
    resolution: Resolution

    @property
    def strategy(self) -> str:
        """The strategy that decides where everything is."""
        return self.loaded.profile.placement.strategy.value

    @property
    def proves_bound(self) -> bool:
        """Whether the strategy proves what no plan's time of a token can be below."""
        return self.strategy == "fastest" and self.loaded.profile.workload.optimize == "decode"

    @property
    def passes_over_cpu(self) -> bool:
        """Whether the CPU only holds, beside accelerators: nobody said how fast it is, so computing is not compared."""
        cpu = next((device for device in self.inventory.devices if device.id == CPU), None)
        return (
            self.strategy == "fastest"
            and bool(self.inventory.accelerators)
            and cpu is not None
            and cpu.bandwidth_bytes_per_second is None
        )

    @property
    def graph(self) -> ModelGraph:
        """The modules and tensors to place."""
        return self.model.graph

    @property
    def capacities(self) -> Mapping[Device, int]:
        """The bytes that each device has, in the order in which devices are filled."""
        return self.inventory.capacities
