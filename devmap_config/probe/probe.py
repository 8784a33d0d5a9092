"""This machine: its accelerators, the CPU's memory within the limits of its container, the disk.

The half that needs no torch. What is quickest is asked first: NVML, which knows NVIDIA's cards without waking them;
torch only where NVML is missing or cannot tell how CUDA numbers the cards, and a driver is there that torch was built
for. So a laptop without an accelerator is described at once, and a server rightly.
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Diagnostic
from devmap_config.files import kernel_text
from devmap_config.probe.cgroup import limiting_groups
from devmap_config.probe.drivers import MAKERS, kinds_torch_is_built_for, kinds_with_a_driver
from devmap_config.probe.machine import SeenAccelerator, SeenDisk, SeenHost, SeenMachine
from devmap_config.probe.nvml import NvmlUnavailableError, read_cards, seen_card
from devmap_config.probe.visibility import visible_cards

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.probe.nvml import Card
    from devmap_config.probe.visibility import Visible


def probe_machine(
    environment: Mapping[str, str], disk_folder: Path | None = Path(), *, kind: str | None = None
) -> SeenMachine:
    """What this machine has, as a process with this environment sees it.

    Args:
        environment: of which the variables are read that choose and order CUDA's devices.
        disk_folder: a folder, or a file or folder yet to be made, on the file system that is meant by `disk`.
        kind: the kind of accelerator that is wanted; torch, which is needed anyway, is then asked of it where NVML
            cannot tell, whatever the signs.
    """
    accelerators, notes = _accelerators(environment, kind)
    disk = None if disk_folder is None else seen_disk(disk_folder)
    return SeenMachine(accelerators=accelerators, host=seen_host(), disk=disk, notes=notes)


def _accelerators(
    environment: Mapping[str, str], wanted: str | None
) -> tuple[tuple[SeenAccelerator, ...], tuple[Diagnostic, ...]]:
    drivers = kinds_with_a_driver()
    usable = drivers & kinds_torch_is_built_for()
    visible: Visible | None = None
    cards: tuple[Card, ...] = ()
    if wanted in (None, "cuda") and usable <= {"cuda"}:
        try:
            cards = read_cards()
            visible = visible_cards(cards, environment)
        except NvmlUnavailableError:
            visible = None
        if visible is not None and cards and _tells_all(visible):
            return _numbered(visible), ()
    if wanted is not None or usable:
        from devmap_config.probe.torch_probe import torch_accelerators

        if seen := torch_accelerators(cards):
            return seen, ()
    if visible is not None:
        return _numbered(visible), () if visible.is_certain else (_guessed_order(),)
    return (), () if usable else tuple(map(_unseen, sorted(drivers & MAKERS.keys())))


def _tells_all(visible: Visible) -> bool:
    return visible.is_certain and all(card.memory_bytes is not None for card in visible.cards)


def _numbered(visible: Visible) -> tuple[SeenAccelerator, ...]:
    return tuple(seen_card(f"cuda:{index}", card) for index, card in enumerate(visible.cards))


def _guessed_order() -> Diagnostic:
    return Diagnostic.warning(
        "guessed-order",
        "how CUDA numbers these cards cannot be told without torch: they are given as they are on the PCI bus",
        help="set `CUDA_DEVICE_ORDER=PCI_BUS_ID`, here and where the model runs; or install torch for CUDA",
    )


def _unseen(kind: str) -> Diagnostic:
    maker = MAKERS[kind]
    can_tell = (
        "`nvidia-ml-py` (the extra `probe`), or torch for CUDA"
        if kind == "cuda"
        else f"torch for {maker}'s accelerators"
    )
    return Diagnostic.warning(
        "unseen-accelerator",
        f"there is a driver of {maker}'s, and nothing installed that can ask it for its accelerators",
        help=f"install {can_tell}",
    )


def seen_host() -> SeenHost:
    """The CPU's memory: the machine's, or what its container may use where that is less."""
    import psutil

    memory = psutil.virtual_memory()
    groups = limiting_groups()
    memory_bytes = min([memory.total, *(group.limit_bytes for group in groups)])
    return SeenHost(
        memory_bytes=memory_bytes,
        available_bytes=min([memory.available, memory_bytes, *(group.available_bytes for group in groups)]),
        threads=usable_threads(),
        name=_processor_name(),
        is_limited=memory_bytes < memory.total,
    )


def usable_threads() -> int:
    """Hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_name() -> str | None:
    lines = kernel_text(Path("/proc/cpuinfo")).splitlines()
    if not lines:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def seen_disk(folder: Path) -> SeenDisk:
    """The file system that holds a folder, or will hold it once it is made."""
    resolved = folder.resolve()
    usage = shutil.disk_usage(next(each for each in (resolved, *resolved.parents) if each.exists()))
    return SeenDisk(memory_bytes=usage.total, free_bytes=usage.free)
