"""Receipts of runs on real machines, which come with the package: what it was once seen to do on a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.devices import Device
from devmap_config.files import ANYWHERE, PACKAGED, read_json

if TYPE_CHECKING:
    from devmap_config.plan.plan import Plan

FOLDER = Path(__file__).with_name("receipts")

NEVER_RUN = (
    "devmap-config has never been run on real cards: what is said of this one rests on simulation and on what the"
    " libraries document"
)


def has_receipt_of_accelerator() -> bool:
    """Whether a receipt tells of a run on an accelerator: `receipts/*.json` beside this file, with its `devices`."""
    receipts = [read_json(file, PACKAGED, ANYWHERE) for file in sorted(FOLDER.glob("*.json"))]
    return any(Device.from_text(name).is_accelerator for receipt in receipts for name in receipt["devices"])


def runs_untried(plan: Plan) -> bool:
    """Whether a plan uses accelerators, and no receipt tells of a run on one."""
    uses_accelerators = any(each.location.runs_on.is_accelerator for each in plan.assignments)
    return uses_accelerators and not has_receipt_of_accelerator()
