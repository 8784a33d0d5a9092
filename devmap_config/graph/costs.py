"""What running a model costs, module by module, for one workload: measured from the model's own code, torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is run: sequences at once, tokens in the cache when it is full, tokens prefilled at once.

    `all_logits` says whether every position gets logits or, as `generate` does, the last of each sequence only.
    `cache` is transformers' cache implementation.
    """

    batch_size: int
    context_length: int
    prompt_length: int
    all_logits: bool = False
    cache: str = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCost:
    """What one module costs. All figures are of the whole batch.

    `cache_bytes` are what the cache's tensors that it made show after a prefill of the context, `cache_bytes_per_token`
    what a further token adds, and `retained_bytes` what their storages keep alive beyond what they show (a sliding
    window is a view of all that was prefilled). `prefill_peak_bytes` and `decode_peak_bytes` are the largest sum of
    live activations while it runs, with what lives around it, cache left out; `own_peak_bytes` only while none of its
    children runs. Operations and bytes touched are its own, without its children's.
    """

    path: str
    cache_bytes: int = 0
    cache_bytes_per_token: int = 0
    retained_bytes: int = 0
    prefill_peak_bytes: int = 0
    decode_peak_bytes: int = 0
    own_peak_bytes: int = 0
    prefill_operations: int = 0
    decode_operations: int = 0
    prefill_touched_bytes: int = 0
    decode_touched_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The larger of its two peaks."""
        return max(self.prefill_peak_bytes, self.decode_peak_bytes)


@dataclass(frozen=True)
class Measurement:
    """A model's costs under a workload, in the order in which its modules first run.

    `measured` is false where the model's code cannot be run without data, for this `reason`, and formulas stand in.
    """

    workload: Workload
    modules: tuple[ModuleCost, ...]
    measured: bool = True
    reason: str | None = None

    @cached_property
    def by_path(self) -> Mapping[str, ModuleCost]:
        """Costs by module path."""
        return {cost.path: cost for cost in self.modules}

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of the whole cache after a prefill of the context."""
        return sum(cost.cache_bytes for cost in self.modules)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` gives it back, equal."""
        return {
            "workload": asdict(self.workload),
            "measured": self.measured,
            "reason": self.reason,
            "columns": [field.name for field in fields(ModuleCost)],
            "modules": [list(asdict(cost).values()) for cost in self.modules],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """What `to_json` wrote.

        Raises:
            KeyError, TypeError: where the value is not one.
        """
        return cls(
            workload=Workload(**value["workload"]),
            modules=tuple(ModuleCost(**dict(zip(value["columns"], row, strict=True))) for row in value["modules"]),
            measured=value["measured"],
            reason=value["reason"],
        )
