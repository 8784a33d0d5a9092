"""Reads cards with NVIDIA's management library, without a context on any of them, and without torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.probe.machine import SeenAccelerator
from devmap_config.probe.recognition import recognised

if TYPE_CHECKING:
    from collections.abc import Iterator


def read_cards() -> tuple[SeenAccelerator, ...]:
    """Return every card in the order of the PCI bus, whatever `CUDA_VISIBLE_DEVICES` says; MIG slices replace their
    card.

    The result is empty if the package or the driver is missing, or a card does not answer.
    """
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        handles.sort(key=lambda handle: _place(pynvml, handle))
        parts = [part for handle in handles for part in _parts(pynvml, handle)]
        return tuple(_seen(pynvml, Device("cuda", index), *part) for index, part in enumerate(parts))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _place(nvml: Any, handle: Any) -> tuple[int, int, int]:
    place = nvml.nvmlDeviceGetPciInfo(handle)
    return int(place.domain), int(place.bus), int(place.device)


def _parts(nvml: Any, handle: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the devices of a card, and whether each is a slice: the card itself, or its MIG slices."""
    if not _is_partitioned(nvml, handle):
        yield handle, False
        return
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index), True
        except nvml.NVMLError:  # no slice was created there
            continue


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # most cards do not support MIG
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _seen(nvml: Any, device: Device, handle: Any, is_slice: bool) -> SeenAccelerator:
    """Return a card, or a slice of one, which has its own memory and a share of the card's speed."""
    memory_bytes, free_bytes, held_bytes = _memory(nvml, handle)
    name = _text(nvml.nvmlDeviceGetName(handle))
    return SeenAccelerator(
        id=device,
        name=name,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        held_bytes=held_bytes,
        has_context=_runs_here(nvml, handle),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        accelerator=recognised(name, memory_bytes, "cuda"),  # a slice has another name and less memory
        is_slice=is_slice,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None, int | None]:
    """Return the total and free memory, and that held by processes, which only the newer call separates from the
    driver's.
    """
    version = getattr(nvml, "nvmlMemory_v2", None)
    for arguments in [(handle, version), (handle,)] if version is not None else [(handle,)]:
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(*arguments)
        except nvml.NVMLError:  # an older driver; or a card that shares the host's memory
            continue
        return int(memory.total), int(memory.free), int(memory.used)
    return None, None, None


def _runs_here(nvml: Any, handle: Any) -> bool:
    try:
        return any(process.pid == os.getpid() for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return False


def _text(value: str | bytes) -> str:
    """Return a text as `str`; older releases of the package return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
