"""Probes this machine: its accelerators, the CPU's memory within the limits of its container, the disk.

If torch is installed, and a driver for which it was built, torch lists the accelerators, since models run with torch's
numbers. Otherwise NVML does. So a laptop without an accelerator is described without importing torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Diagnostic
from devmap_config.probe.drivers import MAKERS, kinds_torch_is_built_for, kinds_with_a_driver
from devmap_config.probe.host import seen_disk, seen_host
from devmap_config.probe.machine import SeenMachine
from devmap_config.probe.nvml import read_cards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.probe.machine import SeenAccelerator


def probe_machine(
    environment: Mapping[str, str], disk_folder: Path | None = Path(), *, kind: str | None = None
) -> SeenMachine:
    """Return this machine as a process with this environment sees it.

    Args:
        environment: the environment, whose variables select and order CUDA's devices.
        disk_folder: a path, which need not exist, on the file system of `disk`.
        kind: the kind of accelerator that is needed; torch, which is then needed anyway, is used whatever the signs.
    """
    accelerators, notes = _accelerators(environment, kind)
    disk = None if disk_folder is None else seen_disk(disk_folder)
    return SeenMachine(accelerators=accelerators, host=seen_host(), disk=disk, notes=notes)


def _accelerators(
    environment: Mapping[str, str], wanted: str | None
) -> tuple[tuple[SeenAccelerator, ...], tuple[Diagnostic, ...]]:
    drivers = kinds_with_a_driver()
    usable = drivers & kinds_torch_is_built_for()
    cards = read_cards() if "cuda" in drivers else ()
    if wanted is not None or usable:
        from devmap_config.probe.torch_probe import torch_accelerators

        seen = torch_accelerators(cards)
        if seen or "CUDA_VISIBLE_DEVICES" in environment:
            return seen, ()
    if cards:
        return cards, () if _order_is_known(cards, environment) else (_guessed_order(),)
    return (), () if usable else tuple(map(_unseen, sorted(drivers & MAKERS.keys())))


def _order_is_known(cards: Sequence[SeenAccelerator], environment: Mapping[str, str]) -> bool:
    """Return whether CUDA numbers all cards by the bus; by default, it puts the fastest first, and sees only one
    slice.
    """
    are_alike = len({(card.name, card.memory_bytes) for card in cards}) == 1
    is_by_bus = are_alike or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    shows_all = "CUDA_VISIBLE_DEVICES" not in environment
    return shows_all and is_by_bus and (len(cards) == 1 or not any(card.is_slice for card in cards))


def _guessed_order() -> Diagnostic:
    return Diagnostic.warning(
        "guessed-order",
        "without torch, CUDA's numbers of these cards are not known: they are listed in the order of the PCI bus",
        help="install torch for CUDA; or set `CUDA_DEVICE_ORDER=PCI_BUS_ID` and leave out `CUDA_VISIBLE_DEVICES`, "
        "here and where the model runs",
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
        f"there is a driver of {maker}'s, and nothing is installed that can ask it for its accelerators",
        help=f"install {can_tell}",
    )
