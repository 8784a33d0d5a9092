"""What a run was seen to take of each device's memory, beside what the plan counts on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """The most that was held of a device's memory since the process began: by torch there; of the CPU, by the process.

    `planned_bytes` are the most that the plan counts on: of the weights and all else, or while loading.
    """

    device: Device
    peak_bytes: int
    planned_bytes: int


def memory_use(plan: Plan) -> tuple[MemoryUse, ...]:
    """Return what was measured, in the order of the plan's devices; what cannot be measured here is left out."""
    found = []
    for use in plan.devices:
        planned_bytes = max(use.capacity_bytes - use.free_bytes, use.loading_bytes)
        peak_bytes = peak_bytes_of(use.id)
        if planned_bytes and peak_bytes is not None:
            found.append(MemoryUse(device=use.id, peak_bytes=peak_bytes, planned_bytes=planned_bytes))
    return tuple(found)


def peak_bytes_of(device: Device) -> int | None:
    """Return the most that was held of a device's memory since the process began; `None` where it is not measured."""
    return _process_peak_bytes() if device == CPU else _accelerator_peak_bytes(device)


def _accelerator_peak_bytes(device: Device) -> int | None:
    import torch

    peak_of = getattr(getattr(torch, device.kind, None), "max_memory_allocated", None)
    return None if device.index is None or peak_of is None else int(peak_of(device.index))


def _process_peak_bytes() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
