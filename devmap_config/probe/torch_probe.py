"""The part of the probe that uses torch: accelerators in torch's numbering, of every kind that it supports.

Importing torch takes seconds, so this is used only if nothing faster can answer. Facts about cards from NVML are
preferred, because torch can read a card's memory only by creating a context on it, which takes some of the memory.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.probe.machine import SeenAccelerator
from devmap_config.probe.recognition import recognised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KINDS = ("cuda", "xpu", "npu", "hpu")
"""torch's modules for devices with numbers; AMD's cards are `cuda`, too."""


def torch_accelerators(cards: Sequence[SeenAccelerator] = ()) -> tuple[SeenAccelerator, ...]:
    """Return the accelerators of the first kind that torch finds; `cards` are those that NVML found."""
    try:
        import torch
    except ImportError:
        return ()
    _load_plugins()
    for kind in KINDS:
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available() and (count := backend.device_count()):
            by_uuid = {card.uuid: card for card in cards}
            return tuple(_accelerator(kind, backend, index, by_uuid) for index in range(count))
    return (_apple(torch),) if torch.backends.mps.is_available() else ()


def _load_plugins() -> None:
    """Import the packages of makers that add their module to torch when imported."""
    from importlib import import_module
    from importlib.util import find_spec

    for package, module in (("torch_npu", "torch_npu"), ("habana_frameworks", "habana_frameworks.torch")):
        if find_spec(package) is not None:
            try:
                import_module(module)
            except (ImportError, RuntimeError):  # its libraries are missing, so there is no such device
                continue


def _accelerator(kind: str, backend: Any, index: int, cards: Mapping[str | None, SeenAccelerator]) -> SeenAccelerator:
    properties = _answer_of(backend, "get_device_properties", index)
    uuid = getattr(properties, "uuid", None)
    card = next((cards[name] for name in (f"GPU-{uuid}", f"MIG-{uuid}", str(uuid)) if name in cards), None)
    if card is not None:
        return replace(card, id=Device(kind, index))
    name = str(_answer_of(backend, "get_device_name", index) or getattr(properties, "name", None) or f"{kind} device")
    free_bytes, total_bytes = _answer_of(backend, "mem_get_info", index) or (None, None)
    memory_bytes = getattr(properties, "total_memory", None) or total_bytes
    held_bytes = None if free_bytes is None or memory_bytes is None else max(memory_bytes - free_bytes, 0)
    return SeenAccelerator(
        id=Device(kind, index),
        name=name,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        held_bytes=held_bytes,
        has_context=free_bytes is not None,  # reading the memory created one
        uuid=None if uuid is None else str(uuid),
        accelerator=recognised(name, memory_bytes, kind),
    )


def _apple(torch: Any) -> SeenAccelerator:
    """Return Apple's accelerator: Metal reports how much of the shared memory a process should use, but not what
    others hold.
    """
    memory_bytes = int(torch.mps.recommended_max_memory())
    name = _processor_name()
    return SeenAccelerator(
        id=Device("mps"), name=name, memory_bytes=memory_bytes, accelerator=recognised(name, memory_bytes, "mps")
    )


def _processor_name() -> str:
    if sys.platform != "darwin":
        return "Apple GPU"
    done = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "Apple GPU"


def _answer_of(backend: Any, function: str, index: int) -> Any:
    """Return the answer of a backend, or `None`, as each implements only a part of this interface."""
    try:
        return getattr(backend, function)(index)
    except (AttributeError, NotImplementedError, RuntimeError, AssertionError):
        return None
