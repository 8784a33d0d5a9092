"""Receipts of runs on real cards, which come with the package: what it was seen to do there, and what never."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.files import ANYWHERE, PACKAGED, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.plan.plan import Plan

FOLDER = Path(__file__).with_name("receipts")
"""`benchmarks/real_cards.py` writes them; `devices` names those that a run used, as torch does, each with its model."""

RESTS_ON = "what is said of {these} rests on simulation and on what the libraries document"


def read_receipts() -> list[Any]:
    """Return the receipts, in the order of their files' names."""
    return [read_json(file, PACKAGED, ANYWHERE) for file in sorted(FOLDER.glob("*.json"))]


def never_seen(plan: Plan) -> str | None:
    """Return how a plan's accelerators go beyond all that devmap-config was run on, in a sentence; `None` if not."""
    most: Counter[str] = Counter()
    models: dict[str, str] = {}
    for receipt in read_receipts():
        most |= _counted(map(Device.from_text, receipt["devices"]))
        models |= {Device.from_text(name).kind: model for name, model in receipt["devices"].items()}
    used = _counted({each.location.runs_on for each in plan.assignments})
    for kind, count in sorted(used.items()):
        if not most[kind]:
            cards = f"{kind} devices" if most else "cards"
            return f"devmap-config has never been run on real {cards}: {RESTS_ON.format(these='this one')}"
        if most[kind] < count:
            seen = f"{most[kind]} real {kind} card{'' if most[kind] == 1 else 's'} at once ({models[kind]})"
            return f"devmap-config was run on {seen}, never on {count}: {RESTS_ON.format(these='several')}"
    return None


def _counted(devices: Iterable[Device]) -> Counter[str]:
    """Return the number of accelerators by kind."""
    return Counter(device.kind for device in devices if device.is_accelerator)
