"""A profile that is ready for placing, with its machine, its model, and its rules applied to that model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.resolution import Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """The needs of a draft model, all of which is on one device.

    Its weights and its cache need memory beside the model's. The two models take turns, so only the larger of their
    activations counts.

    Attributes:
        digest: the digest of its inputs.
    """

    class_name: str
    dtype: str
    device: Device
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    decode_nanoseconds_per_token: int | None
    digest: str

    @property
    def held_bytes(self) -> int:
        """The bytes that it needs all the time."""
        return self.weights_bytes + self.kv_cache_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the draft model as a lock stores it."""
        figures = asdict(self)
        del figures["digest"]
        return {**figures, "device": str(self.device)}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A profile with its machine, model and rules, ready for placing; `draft` are the needs of its draft model."""

    loaded: LoadedProfile
    inventory: Inventory
    model: LoadedModel
    resolution: Resolution
    draft: DraftModel | None = None

    @property
    def strategy(self) -> str:
        """The strategy that decides where everything is."""
        return self.loaded.profile.placement.strategy.value

    @property
    def is_for_vllm(self) -> bool:
        """True if the plan is for vLLM."""
        return self.loaded.profile.is_for_vllm

    @property
    def proves_bound(self) -> bool:
        """True if the strategy proves a lower bound on the time per token of every plan."""
        return self.strategy == "fastest" and not self.is_for_vllm and self.loaded.profile.workload.optimize == "decode"

    @property
    def passes_over_cpu(self) -> bool:
        """True if the CPU can only store weights beside accelerators, because its rates are unknown."""
        cpu = next((device for device in self.inventory.devices if device.id == CPU), None)
        return (
            self.strategy == "fastest"
            and not self.is_for_vllm
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
        """The bytes that each device has for the model, by device in the order of filling."""
        capacities = dict(self.inventory.capacities)
        if self.draft is not None:
            capacities[self.draft.device] -= self.draft.held_bytes
        return capacities
