"""What NVIDIA's management library knows of the cards: without a context on any of them, and without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from devmap_config.probe.machine import SeenAccelerator
from devmap_config.probe.recognition import recognised


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card, or a MIG slice of one, as NVML sees it.

    `held_bytes` is what processes hold there now, without what the driver keeps for itself; `free_bytes` what is left
    for a new one. All three figures are `None` where the card has no memory of its own. `has_context` tells whether
    this very process is among those that hold some.
    """

    name: str
    uuid: str
    bus: tuple[int, int, int]
    memory_bytes: int | None
    free_bytes: int | None
    held_bytes: int | None
    has_context: bool = False
    is_partitioned: bool = False
    slices: tuple[Card, ...] = ()
    instance: tuple[int, int] | None = None
    """Of a slice: its GPU instance and its compute instance."""


class NvmlUnavailableError(Exception):
    """NVML cannot be asked; the text says why. `is_installed` tells whether its Python package is there."""

    def __init__(self, reason: str, *, is_installed: bool) -> None:
        self.is_installed = is_installed
        super().__init__(reason)


def read_cards() -> tuple[Card, ...]:
    """Every card of the machine, whatever `CUDA_VISIBLE_DEVICES` says, by its place on the PCI bus.

    Raises:
        NvmlUnavailableError: where the package or the driver is missing, or a card does not answer.
    """
    try:
        import pynvml
    except ImportError:
        raise NvmlUnavailableError("`nvidia-ml-py` is not installed", is_installed=False) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(str(error), is_installed=True) from None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(sorted((_card(pynvml, handle) for handle in handles), key=lambda card: card.bus))
    except pynvml.NVMLError as error:
        raise NvmlUnavailableError(str(error), is_installed=True) from None
    finally:
        pynvml.nvmlShutdown()


def seen_card(identifier: str, card: Card) -> SeenAccelerator:
    """A card, or a slice of one, that NVML described. A slice has its own memory and a share of the card's speed."""
    is_slice = card.instance is not None
    return SeenAccelerator(
        id=identifier,
        name=card.name,
        memory_bytes=card.memory_bytes,
        free_bytes=card.free_bytes,
        held_bytes=card.held_bytes,
        has_context=card.has_context,
        uuid=card.uuid,
        accelerator=None if is_slice else recognised(card.name, card.memory_bytes, identifier.partition(":")[0]),
        is_slice=is_slice,
    )


def _card(nvml: Any, handle: Any) -> Card:
    place = nvml.nvmlDeviceGetPciInfo(handle)
    bus = (int(place.domain), int(place.bus), int(place.device))
    is_partitioned = _is_partitioned(nvml, handle)
    return _described(
        nvml, handle, bus, is_partitioned=is_partitioned, slices=_slices(nvml, handle, bus) if is_partitioned else ()
    )


def _is_partitioned(nvml: Any, handle: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # most cards know no MIG
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


def _slices(nvml: Any, handle: Any, bus: tuple[int, int, int]) -> tuple[Card, ...]:
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:  # nothing was made there
            continue
        instance = (nvml.nvmlDeviceGetGpuInstanceId(part), nvml.nvmlDeviceGetComputeInstanceId(part))
        found.append(_described(nvml, part, bus, instance=instance))
    return tuple(found)


def _described(nvml: Any, handle: Any, bus: tuple[int, int, int], **more: Any) -> Card:
    memory_bytes, free_bytes, held_bytes = _memory(nvml, handle)
    return Card(
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        bus=bus,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        held_bytes=held_bytes,
        has_context=_runs_here(nvml, handle),
        **more,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None, int | None]:
    """Total, free, held by processes. The newer call tells the driver's own share apart, which the older calls used."""
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
        return any(each.pid == os.getpid() for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return False


def _text(value: str | bytes) -> str:
    """Older releases of the package give bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
