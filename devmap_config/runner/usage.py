"""The resources that a run was observed to use, device memory above all, beside those that the plan predicts."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.libraries.torch import held_bytes
from devmap_config.runner.inspection import tensor_home

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """The most that was held of a device's memory since the process began: by torch there; of the CPU, by the process.

    `planned_bytes` are the most that the plan counts on: of the weights and all else, or while loading.
    """

    device: Device
    peak_bytes: int
    planned_bytes: int


@dataclass(frozen=True, kw_only=True)
class LoadCost:
    """The cost of loading a model: `process_bytes` were held before, `peak_bytes` at most until the end."""

    seconds: float
    process_bytes: int
    peak_bytes: Mapping[Device, int]


def peaks(plan: Plan) -> dict[Device, int]:
    """Return the most that was held of each device of a plan, as far as it is measured."""
    found = {use.id: peak_bytes_of(use.id) for use in plan.devices}
    return {device: peak for device, peak in found.items() if peak is not None}


def reset_peaks(plan: Plan) -> None:
    """Have torch begin anew to note the most that is held of a plan's accelerators; of the CPU nothing can be reset."""
    import torch

    for use in plan.devices:
        reset = getattr(getattr(torch, use.id.kind, None), "reset_peak_memory_stats", None)
        if use.id.index is not None and reset is not None:
            reset(use.id.index)


def process_bytes() -> int:
    """Return what this process holds of the CPU's memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@dataclass(kw_only=True)
class ProcessUse:
    """The most that this process was seen to hold of its own, and of pages of files, in bytes; 0 where nobody says.

    `library_file_bytes` are what it held at last of the libraries' files, which are shared objects.
    """

    anonymous_bytes: int = 0
    all_file_bytes: int = 0
    library_file_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """The bytes held of files other than the libraries'."""
        return max(self.all_file_bytes - self.library_file_bytes, 0)

    def look(self) -> None:
        """Look at what it holds now."""
        import psutil

        memory = psutil.Process().memory_info()
        file_bytes = getattr(memory, "shared", None)  # Linux alone tells
        if file_bytes is not None:
            self.anonymous_bytes = max(self.anonymous_bytes, memory.rss - file_bytes)
            self.all_file_bytes = max(self.all_file_bytes, file_bytes)

    def look_at_libraries(self) -> None:
        """Look at what it holds now of the libraries' files, which takes some milliseconds."""
        import psutil

        if self.all_file_bytes:
            mapped = psutil.Process().memory_maps()
            self.library_file_bytes = sum(each.rss - each.anonymous for each in mapped if ".so" in Path(each.path).name)


LOOKS_EVERY_SECONDS = 0.01


@contextmanager
def process_watched() -> Iterator[ProcessUse]:
    """Look at what this process holds, again and again, while a context lasts."""
    use, is_over = ProcessUse(), threading.Event()

    def watch() -> None:
        while not is_over.wait(LOOKS_EVERY_SECONDS):
            use.look()

    thread = threading.Thread(target=watch, name="devmap-memory", daemon=True)
    use.look()
    thread.start()
    try:
        yield use
    finally:
        is_over.set()
        thread.join()
        use.look()
        use.look_at_libraries()


def weights_by_device(model: PreTrainedModel, plan: Plan, graph: ModelGraph) -> dict[Device, int]:
    """Return the bytes of the tensors of a loaded model, by where they are; those that share a storage count once."""
    held: dict[Device, int] = {}
    seen = set()
    for name in plan.locations:
        home = tensor_home(model, name)
        if home is not None and (found := (home, graph.storage_of[name])) not in seen:
            seen.add(found)
            held[home] = held.get(home, 0) + held_bytes(model.get_parameter_or_buffer(name))
    return held


def memory_use(plan: Plan) -> tuple[MemoryUse, ...]:
    """Return what was measured, in the order of the plan's devices; what cannot be measured here is left out."""
    planned = {use.id: max(use.capacity_bytes - use.free_bytes, use.loading_bytes) for use in plan.devices}
    return tuple(
        MemoryUse(device=device, peak_bytes=peak_bytes, planned_bytes=planned[device])
        for device, peak_bytes in peaks(plan).items()
        if planned[device]
    )


def peak_bytes_of(device: Device) -> int | None:
    """Return the most that was held of a device's memory since the process began; `None` if it is not measured."""
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
