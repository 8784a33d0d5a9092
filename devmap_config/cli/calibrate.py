"""`devmap calibrate`: fits the rates of a machine to its receipts, and prints them as a `hardware:` block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import FLOPS_UNITS, counted, format_duration, profile_duration, profile_rate
from devmap_config.cli.command import CommandError, Mistakes, command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE
from devmap_config.devices import CPU, DISK

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from devmap_config.hardware.inventory import InventoryDevice
    from devmap_config.runner.calibration import Calibration, Receipt, Residual

NESTED = ("float32", "float64")
"""The dtypes whose rates are written separately in a profile."""


@command("calibrate", "table", "json")
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="RECEIPT...")
def calibrate(files: tuple[Path, ...], output_format: str) -> None:
    """Fit this machine's rates to each RECEIPT that `devmap run --receipt` wrote here, and print them as `hardware:`.

    Keep the output in a file that a profile names in `extends` after its machine's, or paste it into one.
    """
    from devmap_config.cli.reporting import echo, report
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.runner.calibration import CalibrationError
    from devmap_config.runner.calibration import calibrate as fit

    receipts: list[Receipt] = []
    mistakes = Mistakes()
    for path in dict.fromkeys(files):
        with mistakes.collected():
            receipts.append(_read(path))
    mistakes.raise_any()
    try:
        calibration = fit(receipts)
    except CalibrationError as error:
        unfit = Diagnostic.error("unfit-receipts", str(error), help=error.help)
        raise CommandError([unfit], data={"hardware": None}) from None
    block = hardware_block(calibration)
    data = {
        "hardware": block,
        "factors": [
            {"rates": [str(name) for name in group], "factor": factor}
            for group, factor in zip(calibration.groups, calibration.factors, strict=True)
        ],
        "runs": [_residual_to_json(residual) for residual in calibration.residuals],
    }
    report((), {}, output_format, data=data)
    if output_format == "table":
        for line in (*_origin_lines(calibration), *_yaml("hardware", block), *_table(calibration.residuals)):
            echo(line)


def _read(path: Path) -> Receipt:
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.files import FileError
    from devmap_config.runner.calibration import CalibrationError, read_receipt

    try:
        return read_receipt(path)
    except CalibrationError as error:
        unfit = Diagnostic.error("unfit-receipts", str(error), help=error.help)
        raise CommandError([unfit], data={"hardware": None}) from None
    except FileError as error:
        finding = Diagnostic.error(error.code, f"`{path}` {error}", help=error.help)
        raise CommandError([finding], exit_code=ExitCode.USAGE, data={"hardware": None}) from None


def hardware_block(calibration: Calibration) -> dict[str, Any]:
    """Return the `hardware` of a profile with only the rates that were fitted."""
    inventory = calibration.inventory
    is_nested = calibration.kind["dtype"] in NESTED
    devices: dict[str, Any] = {}
    for device in inventory.devices:
        if rates := _rates(device):
            own = {name: rates.pop(name) for name in ("bandwidth", "flops", "products") if is_nested and name in rates}
            devices[str(device.id)] = rates | ({"dtypes": {calibration.kind["dtype"]: own}} if own else {})
    links = _rate("together", inventory.together_bytes_per_second)
    for (source, target), link in inventory.links.items():
        if source.is_accelerator and target.is_accelerator:
            links |= _rate("peer", min(link.bytes_per_second, inventory.links[target, source].bytes_per_second))
        elif {source, target} == {CPU, DISK}:
            links |= _rate("disk", link.bytes_per_second)
        elif CPU in (source, target):
            links |= _rate("host", link.bytes_per_second) | _rate("unpinned", link.unpinned_bytes_per_second)
    dispatch = inventory.dispatch_nanoseconds
    host = {"dispatch": f"{profile_duration(dispatch)} calibrated"} if _is_fitted(dispatch) else {}
    spread = {phase: str(spread) for phase, spread in calibration.spreads.items()}
    parts = {"devices": devices, "links": links, "host": host, "spread": spread}
    return {name: part for name, part in parts.items() if part}


def _rates(device: InventoryDevice) -> dict[str, Any]:
    attention = _rate("decode", device.decode_attention_per_second, FLOPS_UNITS)
    attention |= _rate("prefill", device.prefill_attention_per_second, FLOPS_UNITS)
    products = _per_second("decode", device.decode_products_per_second)
    products |= _per_second("prefill", device.prefill_products_per_second)
    return {
        **_rate("bandwidth", device.bandwidth_bytes_per_second),
        **_rate("flops", device.flops_per_second, FLOPS_UNITS),
        **({"attention": attention} if attention else {}),
        **_rate("experts", device.experts_bytes_per_second),
        **({"products": products} if products else {}),
    }


def _rate(name: str, rate: int | None, *units: Any) -> dict[str, str]:
    return {} if rate is None or not _is_fitted(rate) else {name: f"{profile_rate(rate, *units)} calibrated"}


def _per_second(name: str, rate: int | None) -> dict[str, str]:
    return {} if rate is None or not _is_fitted(rate) else {name: f"{rate}/s calibrated"}


def _is_fitted(rate: int) -> bool:
    from devmap_config.profile.quantities import basis_of

    return basis_of(rate) == "calibrated"


def _origin_lines(calibration: Calibration) -> Iterator[str]:
    """Yield, as comments, the receipts that the rates were fitted to, and the rates that share one factor."""
    receipts = len(dict.fromkeys(residual.run.receipt for residual in calibration.residuals))
    own = f"{counted(len(calibration.residuals), 'time')} of {counted(receipts, 'receipt')}"
    yield f"# fitted to {own}: {', '.join(calibration.kind.values())}"
    yield f"# {calibration.versions}"
    for group, factor in zip(calibration.groups, calibration.factors, strict=True):
        together = " (which these receipts do not tell apart)" if len(group) > 1 else ""
        yield f"# x {factor:.2f}: {', '.join(map(str, group))}{together}"


def _yaml(name: str, value: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a mapping as YAML: one line for each key, with the mappings within a device as flow mappings."""
    yield f"{indent}{name}:"
    for key, item in value.items():
        if not indent and key == "devices":
            yield from _yaml(key, item, "  ")
        else:
            yield f"{indent}  {key}: {_flow(item)}"


def _flow(value: Mapping[str, Any] | str) -> str:
    if isinstance(value, str):
        return value
    return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"


HEADINGS = ("measured", "before", "after", "left out")


def _table(residuals: Sequence[Residual]) -> Iterator[str]:
    """Yield, as comments, the time of each run, with its old and new predictions."""
    from devmap_config.cli.predictions import UNITS

    rows: list[tuple[tuple[str, str], tuple[str, ...]]] = [(("receipt", ""), HEADINGS)]
    for residual in residuals:
        run = residual.run
        times = (
            run.measured_nanoseconds,
            run.predicted_nanoseconds,
            residual.after_nanoseconds,
            residual.left_out_nanoseconds,
        )
        figures = tuple("" if time is None else format_duration(round(time)) for time in times)
        rows.append(((run.receipt, UNITS[run.phase]), figures))
    first, second = (max(len(row[0][place]) for row in rows) for place in (0, 1))
    yield "#"
    for (receipt, unit), figures in rows:
        columns = " ".join(f"{figure:>9}" for figure in figures)
        yield f"# {receipt:<{first}} {unit:<{second}} {columns}".rstrip()
    if all(residual.left_out_nanoseconds is None for residual in residuals):
        yield "# how far other runs will be from these rates is not known: three receipts tell it"


def _residual_to_json(residual: Residual) -> dict[str, Any]:
    return {
        "receipt": residual.run.receipt,
        "phase": residual.run.phase,
        "measured_nanoseconds": round(residual.run.measured_nanoseconds),
        "before_nanoseconds": residual.run.predicted_nanoseconds,
        "after_nanoseconds": residual.after_nanoseconds,
        "left_out_nanoseconds": residual.left_out_nanoseconds,
    }
