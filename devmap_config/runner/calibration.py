"""Calibrates a machine by receipts: fits the rates by which their runs are predicted as they were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.execution.overlap import total_nanoseconds
from devmap_config.execution.segments import MachineRates, MissingFigureError, Segment
from devmap_config.files import ANYWHERE, PACKAGED, FileError, read_json
from devmap_config.hardware.inventory import RATE_NAMES, Inventory, whole
from devmap_config.plan.plan import OWN
from devmap_config.profile.quantities import Spread
from devmap_config.runner.fitting import fitted
from devmap_config.runner.receipts import RECEIPT_VERSION
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from devmap_config.execution.segments import Phase
    from devmap_config.hardware.scaling import RateName

FEWEST_RECEIPTS = 3
"""The fewest receipts that allow leaving one out and still measuring the spread of the others."""

NAMED = 12
"""The most receipts of another machine or dtype that an error names."""

SECONDS: Mapping[Phase, str] = {"decode": "decode_seconds_per_token", "prefill": "prefill_seconds"}


class CalibrationError(Exception):
    """Receipts cannot be fitted; the text says why, `help` what to do."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseRun:
    """One phase of a case: its segments with their counts, its predicted time, and its measured time."""

    receipt: str
    phase: Phase
    segments: tuple[tuple[Segment, int], ...]
    predicted_nanoseconds: int
    measured_nanoseconds: float

    def nanoseconds(self, inventory: Inventory) -> int:
        """Return the predicted time of the phase on a machine."""
        rates = MachineRates(inventory, self.phase)
        return total_nanoseconds(rates.time(segment).times(count) for segment, count in self.segments)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The parts of a receipt that are fitted.

    Attributes:
        name: the path of its file.
        kind: the properties that receipts must share to be fitted together, if they have them.
        versions: the versions of the libraries that ran it.
        inventory: the machine, with the rates of the prediction.
        runs: its phases.
    """

    name: str
    kind: Mapping[str, str]
    versions: str
    inventory: Inventory
    runs: tuple[PhaseRun, ...]


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The times of a run as predicted by the fitted rates, and by rates that were fitted only to the other receipts."""

    run: PhaseRun
    after_nanoseconds: int
    left_out_nanoseconds: int | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The fitted rates of a machine; each of `groups` shares one factor, because the receipts cannot separate its
    rates.
    """

    kind: Mapping[str, str]
    versions: str
    inventory: Inventory
    groups: tuple[tuple[RateName, ...], ...]
    factors: tuple[float, ...]
    residuals: tuple[Residual, ...]

    @property
    def spreads(self) -> dict[str, Spread]:
        """By phase, the spread of runs relative to the prediction by rates that were fitted to the others, if it is
        known.
        """
        spreads: dict[str, Spread] = {}
        for phase in OWN:
            shares = [
                100 * residual.run.measured_nanoseconds / residual.left_out_nanoseconds
                for residual in self.residuals
                if residual.run.phase == phase and residual.left_out_nanoseconds
            ]
            if len(shares) >= FEWEST_RECEIPTS:
                spreads[phase] = Spread(max(math.floor(min(shares)), 1), math.ceil(max(shares)))
        return spreads


def read_receipt(path: Path) -> Receipt:
    """Return the parts of a receipt that are fitted.

    Raises:
        FileError: if it cannot be read, or is not a receipt.
        CalibrationError: if it lacks what a fit needs.
    """
    value = read_json(path, PACKAGED, ANYWHERE)
    try:
        _require_usable(path, value)
        machine = f"{value['machine']['processor']}, {value['machine']['threads']} threads"
        inventory = Inventory.from_json(value["inventory"])
        runs = tuple(run for case in value["cases"] for run in _runs(path, case))
        receipt = Receipt(
            name=str(path),
            kind={"machine": machine, "dtype": str(value["dtype"]), **value["devices"]},
            versions=", ".join(f"{name} {version}" for name, version in value["versions"].items() if version),
            inventory=inventory,
            runs=runs,
        )
        for run in runs:
            _require_time(run.measured_nanoseconds)
            _require_time(run.nanoseconds(inventory))
    except (ArithmeticError, AttributeError, LookupError, MissingFigureError, TypeError, ValueError) as error:
        raise FileError("is not a receipt", "syntax", "name a file that `devmap run --receipt` wrote") from error
    if not runs:
        message = f"`{path}` has no time that was predicted and measured"
        help = "compile with the machine's rates (`devmap probe --measure`), and write it without `--no-generate`"
        raise CalibrationError(message, help)
    return receipt


def _require_time(nanoseconds: float) -> None:
    if not 0 < nanoseconds < math.inf:
        raise ValueError(f"{nanoseconds} is no time")


def _require_usable(path: Path, value: Mapping[str, Any]) -> None:
    version, cases = value.get("receipt_version", 1), value["cases"]
    if version > RECEIPT_VERSION:
        raise CalibrationError(f"`{path}` was written by a newer devmap-config", "upgrade devmap-config")
    if version < RECEIPT_VERSION and cases:
        message = f"`{path}` does not say what a forward does: an earlier devmap-config wrote it"
        raise CalibrationError(message, "write it again, by `devmap run --receipt`")
    if any(case["compiled"] for case in cases):
        message = f"`{path}` is of compiled code, for which nothing is predicted"
        raise CalibrationError(message, "write it without `--compile`")


def _runs(path: Path, case: Mapping[str, Any]) -> Iterator[PhaseRun]:
    generation = case["generation"] or {}
    for phase, seconds in SECONDS.items():
        if phase in case["forward"] and generation.get(seconds):
            yield PhaseRun(
                receipt=str(path),
                phase=phase,
                segments=tuple((Segment.from_json(entry), whole(entry["count"])) for entry in case["forward"][phase]),
                predicted_nanoseconds=whole(case["predicted"]["prediction"][OWN[phase]]),
                measured_nanoseconds=1e9 * generation[seconds],
            )


def calibrate(receipts: Sequence[Receipt]) -> Calibration:
    """Fit the rates of a machine to its receipts and, if there are enough, to all except one in turn.

    Raises:
        CalibrationError: if they are not of one machine and dtype, or no time depends on any rate.
    """
    kind = _kind(receipts)
    machine = _machine_of(receipts)
    fit = _fit(machine, receipts)
    left_out: dict[PhaseRun, int] = {}
    if len(receipts) >= FEWEST_RECEIPTS:
        for receipt in receipts:
            without = _fit(machine, [other for other in receipts if other is not receipt])[0]
            left_out |= {run: run.nanoseconds(without) for run in receipt.runs}
    return Calibration(
        kind=kind,
        versions=" and ".join(dict.fromkeys(receipt.versions for receipt in receipts)),
        inventory=fit[0],
        groups=tuple(fit[1]),
        factors=tuple(fit[1].values()),
        residuals=tuple(
            Residual(run=run, after_nanoseconds=run.nanoseconds(fit[0]), left_out_nanoseconds=left_out.get(run))
            for receipt in receipts
            for run in receipt.runs
        ),
    )


def _kind(receipts: Sequence[Receipt]) -> dict[str, str]:
    """Return the machine and the dtype that receipts share."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for receipt in receipts:
        for what, which in receipt.kind.items():
            kinds.setdefault(what, {}).setdefault(which, []).append(receipt.name)
    for what, by_kind in kinds.items():
        most, *others = sorted(by_kind.items(), key=lambda item: -len(item[1]))
        if others:
            counts = " and ".join(f"{len(names)} of {which}" for which, names in (most, *others))
            left_out = [f"`{name}`" for _, names in others for name in names]
            help = f"rates are fitted to one machine, and to models of one dtype: leave out {first_of(left_out, NAMED)}"
            raise CalibrationError(f"these receipts are not of the same {what}: {counts}", help)
    return {what: next(iter(by_kind)) for what, by_kind in kinds.items()}


def _machine_of(receipts: Sequence[Receipt]) -> Inventory:
    """Return the machine with all rates of any receipt's prediction, each from the last receipt that has it."""
    first, *others = (receipt.inventory for receipt in receipts)
    devices, links = {device.id: device for device in first.devices}, dict(first.links)
    for inventory in others:
        for device in inventory.devices:
            before = devices.get(device.id, device)
            known = {name: getattr(before, name) for name in RATE_NAMES if getattr(device, name) is None}
            devices[device.id] = replace(device, **known)
        links |= inventory.links
    together = (receipt.inventory.together_bytes_per_second for receipt in reversed(receipts))
    return replace(
        receipts[-1].inventory,
        devices=tuple(devices.values()),
        links=links,
        together_bytes_per_second=next(filter(None, together), None),
    )


def _fit(machine: Inventory, receipts: Sequence[Receipt]) -> tuple[Inventory, dict[tuple[RateName, ...], float]]:
    runs = [run for receipt in receipts for run in receipt.runs]
    found = fitted(machine, [run.nanoseconds for run in runs], [run.measured_nanoseconds for run in runs])
    if not found[1]:
        raise CalibrationError("no time of these receipts depends on a rate", "name receipts of larger models")
    return found
