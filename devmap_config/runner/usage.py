"""Measures the resources of a run, above all device memory, to compare them with the plan's predictions."""

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
    """The peak of a device's memory since the process began: of torch's memory on an accelerator, of the process on the
    CPU.

    `planned_bytes` is the peak that the plan predicts: while running, or while loading.
    """

    device: Device
    peak_bytes: int
    planned_bytes: int


@dataclass(frozen=True, kw_only=True)
class LoadCost:
    """The cost of loading a model: `process_bytes` is the memory before, `peak_bytes` the peak until the end."""

    seconds: float
    process_bytes: int
    peak_bytes: Mapping[Device, int]


def peaks(plan: Plan) -> dict[Device, int]:
    """Return the peak of each device of a plan, if it can be measured."""
    peaks_by_device = {use.id: peak_bytes_of(use.id) for use in plan.devices}
    return {device: peak for device, peak in peaks_by_device.items() if peak is not None}


def reset_peaks(plan: Plan) -> None:
    """Reset torch's record of the peak of a plan's accelerators; that of the CPU cannot be reset."""
    import torch

    for use in plan.devices:
        reset = getattr(getattr(torch, use.id.kind, None), "reset_peak_memory_stats", None)
        if use.id.index is not None and reset is not None:
            reset(use.id.index)


def process_bytes() -> int:
    """Return the CPU memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


@dataclass(kw_only=True)
class ProcessUse:
    """The observed peaks of this process's anonymous memory and of its pages of files, in bytes; 0 if unknown.

    `library_file_bytes` are the pages of the libraries' files, which are shared objects, at the last look.
    """

    anonymous_bytes: int = 0
    all_file_bytes: int = 0
    library_file_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """The bytes held of files other than the libraries'."""
        return max(self.all_file_bytes - self.library_file_bytes, 0)

    def look(self) -> None:
        """Update the peaks by the present memory."""
        import psutil

        memory = psutil.Process().memory_info()
        file_bytes = getattr(memory, "shared", None)  # only Linux has this figure
        if file_bytes is not None:
            self.anonymous_bytes = max(self.anonymous_bytes, memory.rss - file_bytes)
            self.all_file_bytes = max(self.all_file_bytes, file_bytes)

    def look_at_libraries(self) -> None:
        """Measure the present pages of the libraries' files, which takes some milliseconds."""
        import psutil

        if self.all_file_bytes:
            mapped = psutil.Process().memory_maps()
            self.library_file_bytes = sum(
                mapping.rss - mapping.anonymous for mapping in mapped if ".so" in Path(mapping.path).name
            )


LOOKS_EVERY_SECONDS = 0.01


@contextmanager
def process_watched() -> Iterator[ProcessUse]:
    """Watch the memory of this process periodically while a context lasts."""
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
    """Return the bytes of the tensors of a loaded model by device; tensors that share a storage count once."""
    held: dict[Device, int] = {}
    seen = set()
    for name in plan.locations:
        home = tensor_home(model, name)
        if home is not None and (key := (home, graph.storage_of[name])) not in seen:
            seen.add(key)
            held[home] = held.get(home, 0) + held_bytes(model.get_parameter_or_buffer(name))
    return held


def memory_use(plan: Plan) -> tuple[MemoryUse, ...]:
    """Return the measured memory in the order of the plan's devices, without devices that cannot be measured."""
    planned = {use.id: max(use.capacity_bytes - use.free_bytes, use.loading_bytes) for use in plan.devices}
    return tuple(
        MemoryUse(device=device, peak_bytes=peak_bytes, planned_bytes=planned[device])
        for device, peak_bytes in peaks(plan).items()
        if planned[device]
    )


def peak_bytes_of(device: Device) -> int | None:
    """Return the peak of a device's memory since the process began; `None` if it is not measured."""
    return _process_peak_bytes() if device == CPU else _accelerator_peak_bytes(device)


def _accelerator_peak_bytes(device: Device) -> int | None:
    import torch

    peak_of = getattr(getattr(torch, device.kind, None), "max_memory_allocated", None)
    return None if device.index is None or peak_of is None else int(peak_of(device.index))


def _process_peak_bytes() -> int | None:
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
