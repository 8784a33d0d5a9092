"""Receipts of runs on real machines, which come with the package: what it was once seen to do on a card."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING

from devmap_config.placement.devices import is_accelerator

if TYPE_CHECKING:
    from devmap_config.plan.plan import Plan

NEVER_RUN = (
    "devmap-config has never been run on real cards: what is said of this one rests on simulation and on what the"
    " libraries document"
)


def has_receipt_of_accelerator() -> bool:
    """Whether a receipt tells of a run on an accelerator: `receipts/*.json` beside this file, with its `devices`."""
    folder = files("devmap_config.runner") / "receipts"
    if not folder.is_dir():
        return False
    receipts = [
        json.loads(file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.endswith(".json")
    ]
    return any(is_accelerator(device) for receipt in receipts for device in receipt["devices"])


def runs_untried(plan: Plan) -> bool:
    """Whether a plan uses accelerators, and no receipt tells of a run on one."""
    used = {device for each in plan.assignments for device in (each.stored_on, each.executes_on)}
    return any(map(is_accelerator, used)) and not has_receipt_of_accelerator()
