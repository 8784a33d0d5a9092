"""Reads receipts: the predictions of a plan for a run beside the measurements. Those of real cards come with the
package.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.files import ANYWHERE, PACKAGED, FileError, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.plan.plan import Plan

FOLDER = Path(__file__).with_name("receipts")
"""The receipts of the package, written by `benchmarks/real_cards.py`; `devices` holds torch's names of used devices,
with their models.
"""

RECEIPT_VERSION = 2
"""Version 1 lacked the version, and the amounts of a forward."""

HELD = ("weights", "kv_cache", "activation", "overhead")
"""The keys of a plan's device that add up to the bytes held while the model runs."""


PROCESS = ("anonymous", "file", "library_file", "peak")
"""The figures of a process's memory for plans of the CPU: anonymous memory, pages of the model's files and of the
libraries' files, and the peak of all.
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a case, as predicted and as measured; `None` if there is none.

    With a `device`, it is in bytes, else in seconds. For the CPU, the measured figure is the memory of the process
    beyond that before loading the model.
    """

    name: str
    device: str | None
    predicted: float | None
    seen: float | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a receipt: its figures, or why it failed. `rates` holds the basis of predicted times, by phase."""

    receipt: str
    name: str
    figures: tuple[Figure, ...] = ()
    rates: Mapping[str, str] = field(default_factory=dict)
    failed: str | None = None

    @property
    def is_out_of_memory(self) -> bool:
        """True if it failed for lack of memory."""
        return "out of memory" in (self.failed or "")


def cases_of(path: Path) -> tuple[Case, ...]:
    """Return the cases of a receipt.

    Raises:
        FileError: if it cannot be read, or is not a receipt.
    """
    receipt = read_json(path, PACKAGED, ANYWHERE)
    try:
        return tuple(_case(path.stem, case) for case in receipt["cases"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError("is not a receipt", "syntax", "name a file that `devmap run --receipt` wrote") from error


def _case(receipt: str, case: Mapping[str, Any]) -> Case:
    if "failed" in case:
        return Case(receipt=receipt, name=str(case["case"]), failed=str(case["failed"]))
    predicted, generation = case["predicted"], case["generation"] or {}
    bases = predicted.get("basis") or {}  # early receipts have none
    figures = [figure for use in predicted["devices"] for figure in _memory(use, case["seen"].get(use["id"], {}))]
    process, seen_process = predicted.get("process_memory") or {}, case["seen"].get("cpu", {})
    figures += [
        Figure(name=name, device="cpu", predicted=process[f"{name}_bytes"], seen=seen_process.get(f"{name}_bytes"))
        for name in PROCESS
        if f"{name}_bytes" in process
    ]
    for name, planned, seen in (
        ("token", "decode_nanoseconds_per_token", "decode_seconds_per_token"),
        ("prefill", "prefill_nanoseconds", "prefill_seconds"),
    ):
        nanoseconds = predicted["prediction"][planned]
        seconds = None if nanoseconds is None else nanoseconds / 1e9
        figures.append(Figure(name=name, device=None, predicted=seconds, seen=generation.get(seen)))
    figures.append(Figure(name="load", device=None, predicted=None, seen=case["load_seconds"]))
    if not case["by"].startswith("devmap"):  # then the plan's predictions are for another executor
        figures, bases = [replace(figure, predicted=None) for figure in figures], {}
    rates = {str(phase): str(basis["rates"]) for phase, basis in bases.items()}
    return Case(receipt=receipt, name=str(case["case"]), figures=tuple(figures), rates=rates)


def _memory(use: Mapping[str, Any], seen: Mapping[str, int]) -> Iterable[Figure]:
    before_bytes = seen.get("process_bytes", 0)
    planned = {
        "running": sum(use[f"{part}_bytes"] for part in HELD),
        "loading": use["loading_bytes"],
        "weights": use["weights_bytes"],
        "cache": use["kv_cache_bytes"],
    }
    measured = {
        "running": _less(seen.get("peak_bytes"), before_bytes),
        "loading": _less(seen.get("loading_peak_bytes"), before_bytes),
        "weights": seen.get("weights_bytes"),
        "cache": seen.get("kv_cache_bytes"),
    }
    for name, planned_bytes in planned.items():
        if planned_bytes or measured[name]:
            yield Figure(name=name, device=use["id"], predicted=planned_bytes, seen=measured[name])


def _less(peak_bytes: int | None, before_bytes: int) -> int | None:
    return None if peak_bytes is None else peak_bytes - before_bytes


RESTS_ON = "what is said of {these} rests on simulation and on what the libraries document"


def read_receipts() -> list[Any]:
    """Return the receipts, in the order of their files' names."""
    return [read_json(file, PACKAGED, ANYWHERE) for file in sorted(FOLDER.glob("*.json"))]


def never_seen(plan: Plan) -> str | None:
    """Return a sentence if a plan's accelerators are beyond those that devmap-config was run on; else `None`."""
    most: Counter[str] = Counter()
    models: dict[str, str] = {}
    for receipt in read_receipts():
        most |= _counted(map(Device.from_text, receipt["devices"]))
        models |= {Device.from_text(name).kind: model for name, model in receipt["devices"].items()}
    used = _counted({assignment.location.runs_on for assignment in plan.assignments})
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
