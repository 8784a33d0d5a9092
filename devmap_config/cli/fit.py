"""`devmap fit`: on which machines a profile's model runs, how long its context may be there, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from devmap_config.compiler import Compiled, Request
    from devmap_config.plan.plan import Plan
    from devmap_config.profile.schema import Hardware

STRATEGY = "fastest"
"""What is asked where the profile's own strategy does not look for the best."""

WITHOUT_FIGURES = "fewest-devices"
"""What is asked where the machine does not say how fast it is: whether the model fits does not depend on that."""


@dataclass(frozen=True)
class Row:
    """What was found on one machine; `reason` says why it does not fit."""

    machine: str
    compiled: Compiled | None
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        found = None if self.compiled is None else self.compiled.plan.to_json()
        return {
            "machine": self.machine,
            "fits": found is not None,
            "reason": self.reason,
            "strategy": None if found is None else found["strategy"],
            "prediction": None if found is None else found["prediction"],
            "devices": None if found is None else found["devices"],
        }


@profile_command("fit", "table", "json")
@click.option(
    "--on",
    "machines",
    required=True,
    multiple=True,
    metavar="MACHINE,…",
    help="Machines: `2xrtx-4090`, `h100-sxm+cpu:256GiB`, or a YAML file with a `hardware:` block.",
)
def fit(profile: Path, options: ProfileOptions, machines: tuple[str, ...]) -> ExitCode:
    """Say of every MACHINE whether PROFILE's model and workload fit there, with what context, and how fast.

    The profile's hardware and `max_memory` are left aside, its pins are not. Its strategy is asked if it is one of
    fastest, longest-context and fewest-devices; else fastest. Of a machine that does not say how fast it is, the
    times are not known, and fewest-devices is asked in place of fastest.
    """
    from devmap_config.cli.reporting import print_lines

    names = [name.strip() for text in machines for name in text.split(",")]
    rows = [_row(name, options.request(profile, hardware=_hardware(name), strategy=STRATEGY)) for name in names]
    options.report([], {}, {"machines": [row.to_json() for row in rows]})
    if options.shows_tables:
        print_lines(partial(_table, rows))
    return ExitCode.DONE if any(row.compiled is not None for row in rows) else ExitCode.WRONG


def _row(machine: str, request: Request) -> Row:
    from devmap_config.compiler import Compiled, run_pipeline

    compilation = run_pipeline(request)
    if any(each.code == "missing-figure" for each in compilation.diagnostics):
        compilation = run_pipeline(replace(request, strategy=WITHOUT_FIGURES))
    if isinstance(compilation, Compiled):
        return Row(machine, compilation, None)
    if compilation.reached is None:  # no machine helps where the model cannot be had
        raise CommandError(compilation.diagnostics, compilation.texts, data={"machines": None})
    return Row(machine, None, next(each.message for each in compilation.diagnostics if each.is_error))


def _hardware(name: str) -> Hardware:
    """The machine that a name or a file describes."""
    from pydantic import ValidationError

    from devmap_config.hardware.machines import UnknownMachineError, named_machine
    from devmap_config.profile.quantities import QuantityError
    from devmap_config.profile.schema import Hardware

    if name.endswith((".yaml", ".yml")):
        return _hardware_of_file(Path(name))
    try:
        devices = {
            str(device): {"accelerator" if what[:1].isalpha() or "-" in what else "memory": what}
            for device, what in named_machine(name.replace("+", ",")).devices.items()
        }
        return Hardware.model_validate({"devices": devices})
    except (UnknownMachineError, QuantityError) as error:
        raise click.UsageError(f"{name}: {error}") from None
    except ValidationError as error:
        raise click.UsageError(f"{name}: {error.errors()[0]['msg']}") from None


def _hardware_of_file(path: Path) -> Hardware:
    from devmap_config.diagnostics.diagnostic import ProfileError, Sink
    from devmap_config.profile.loading import load_hardware

    sink = Sink()
    hardware = load_hardware(path, sink)
    if hardware is None or sink.has_errors:
        raise ProfileError(tuple(sink), sink.texts)
    return hardware


def _table(rows: list[Row], width: int) -> Iterator[Table]:
    from rich.table import Column

    from devmap_config.cli.tables import new_table

    machine = Column("machine", overflow="fold", min_width=14)
    table = new_table(machine, figures=("a token", "a prefill", "context up to"), rest="", width=width)
    for row in rows:
        if row.compiled is None:
            table.add_row(row.machine, "–", "–", "–", row.reason, style="dim")
        else:
            table.add_row(row.machine, *_figures(row.compiled), ", ".join(_remarks(row.compiled.plan)))
    yield table


def _figures(compiled: Compiled) -> tuple[str, str, str]:
    prediction = compiled.plan.prediction
    token, prefill = prediction.decode_nanoseconds_per_token, prediction.prefill_nanoseconds
    context = prediction.longest_context
    return (
        format_duration(token) if token is not None else "?" if compiled.graph.decodes else "–",
        format_duration(prefill) if prefill is not None else "?",
        f"{context:,}" if context is not None else "?",
    )


def _remarks(plan: Plan) -> Iterator[str]:
    if plan.prediction.prefill_nanoseconds is None and plan.strategy == WITHOUT_FIGURES:
        yield "its speed is not known"
    used = sum(use.weights_bytes > 0 for use in plan.devices)
    if used < len(plan.devices):
        yield f"{used} of {len(plan.devices)} devices used"
    if plan.prediction.streamed_bytes_per_token:
        yield f"{format_bytes(plan.prediction.streamed_bytes_per_token)} copied in at every forward"
    if plan.compute:
        yield "partly computed on the CPU"
