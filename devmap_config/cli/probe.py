"""`devmap probe`: prints this machine as a `hardware:` block, or what it lacks to run a lock."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.amounts import format_bytes
from devmap_config.cli.command import CommandError, command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE, quiet_option
from devmap_config.devices import DISK
from devmap_config.files import is_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.lock import Lock
    from devmap_config.plan.readiness import Demand
    from devmap_config.probe.block import Route
    from devmap_config.probe.machine import SeenMachine
    from devmap_config.probe.rates import Rate


END_OTHERS = "end what else runs here, and measure again"


@command("probe", "table", "json")
@click.option("--disk", "disk_folder", type=FILE, help="A folder on the disk to describe.")
@click.option(
    "--against",
    "lock_file",
    type=FILE,
    metavar="LOCK",
    help="Check instead that this machine can carry LOCK's plan now; exit with 4 if not.",
)
@click.option(
    "--host", metavar="NAME", help="The host of LOCK that this machine is. [default: the one with its address]"
)
@click.option("--measure", is_flag=True, help="Measure memory, disk, links and matrix products; takes half a minute.")
@quiet_option
def probe(
    disk_folder: Path | None,
    lock_file: Path | None,
    host: str | None,
    measure: bool,
    output_format: str,
    quiet: bool,
) -> ExitCode:
    """Print this machine as a `hardware:` block for profiles, in YAML."""
    from devmap_config.cli.reporting import echo_lines, report
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.probe.block import block_text, hardware_block
    from devmap_config.probe.probe import probe_machine
    from devmap_config.probe.rates import TooNoisyError

    if lock_file is not None:
        if measure:
            raise click.UsageError(
                "`--against` compares memory, and nothing that is measured: leave out one of the two"
            )
        return _against(lock_file, host, disk_folder or Path(), output_format, quiet)
    if host is not None:
        raise click.UsageError("`--host` names a host of a lock: give that with `--against`")
    seen = probe_machine(os.environ, disk_folder or Path())
    try:
        measured, notes = _measured(seen, disk_folder or Path(), quiet) if measure else ({}, ())
    except TooNoisyError as error:
        busy = Diagnostic.error("too-noisy", f"this machine was not measured: {error}", help=END_OTHERS)
        report([busy], {}, output_format, quiet=quiet)
        return ExitCode.TOO_NOISY
    block = hardware_block(seen, measured)
    data = {
        "hardware": block,
        "seen": seen.to_json(),
        "measured": {".".join(route): asdict(rate) for route, rate in measured.items()},
    }
    report([*seen.notes, *notes], {}, output_format, quiet=quiet, data=data)
    if output_format == "table":
        echo_lines(block_text(seen, block, measured))
    return ExitCode.DONE


def _measured(seen: SeenMachine, disk_folder: Path, quiet: bool) -> tuple[Mapping[Route, Rate], tuple[Diagnostic, ...]]:
    from rich.progress import BarColumn

    from devmap_config.cli.console import progress_line
    from devmap_config.cli.progress import DESCRIPTION
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.probe.measuring import MeasurementStep, measured, steps
    from devmap_config.probe.torch_rates import Devices

    devices = Devices()
    planned = tuple(steps(seen, disk_folder, devices))
    devices.share_time(len(planned))
    progress = progress_line(BarColumn(), DESCRIPTION)
    # An invisible progress line is not started, as it would print an empty line before rich 15.
    with nullcontext() if quiet or not progress.console.is_terminal else progress:
        task = progress.add_task("", total=len(planned))

        def begun(step: MeasurementStep) -> None:
            progress.update(task, completed=planned.index(step), description=step.words, refresh=True)

        rates, failures = measured(planned, begun)
    notes = tuple(
        Diagnostic.warning(
            "not-measured",
            f"{words} could not be measured: {reason}",
            help="write what is known of it into the block by hand, or leave it to the catalogue",
        )
        for words, reason in failures.items()
    )
    return rates, notes


def _of_this_host(lock: Lock, named: str | None, file: Path) -> tuple[Lock, str | None]:
    """Return the part of a lock for this machine's host, and that host's name.

    Raises:
        click.UsageError: if this machine is none of its hosts, or the host cannot be determined.
    """
    from devmap_config.plan.readiness import hosts_of, of_host
    from devmap_config.probe.host import own_addresses

    hosts = hosts_of(lock)
    if not hosts:
        if named is not None:
            raise click.UsageError(f"`{file}` is for one machine, which has no name: leave `--host` out")
        return lock, None
    listed = ", ".join(f"`{name}`" for name in hosts)
    if named is None:
        own = own_addresses()
        here = [name for name, address in hosts.items() if address in own]
        if len(here) != 1:
            raise click.UsageError(f"which host of `{file}` is this machine? Say `--host` and one of {listed}")
        named = here[0]
    elif named not in hosts:
        raise click.UsageError(f"`{file}` has no host `{named}`: its hosts are {listed}")
    return of_host(lock, named), named


def _against(file: Path, host: str | None, disk_folder: Path, output_format: str, quiet: bool) -> ExitCode:
    from devmap_config.cli.reporting import echo, report
    from devmap_config.plan.lock import lock_path
    from devmap_config.plan.readiness import demands, differences
    from devmap_config.probe.probe import probe_machine
    from devmap_config.profile.document import whole_file

    file = lock_path(file) if file.suffix in (".yaml", ".yml") else file
    lock, here = _of_this_host(_read(file), host, file)
    seen = probe_machine(os.environ, disk_folder)
    findings = differences(lock, seen, whole_file(str(file)))
    is_fit = not any(finding.is_error for finding in findings)
    needs = demands(lock, seen)
    data = {"fits": is_fit, "host": here, "needs": [demand.to_json() for demand in needs], "seen": seen.to_json()}
    report([*seen.notes, *findings], {}, output_format, quiet=quiet, data=data)
    if output_format == "table" and not quiet:
        for demand in needs:
            echo(_sentence(demand))
        what = file if here is None else f"what `{here}` has of {file}"
        echo(f"this machine {'can' if is_fit else 'cannot'} carry {what}")
    return ExitCode.DONE if is_fit else ExitCode.UNLIKE_LOCK


def _sentence(demand: Demand) -> str:
    needed_bytes = demand.needed_bytes + demand.context_bytes
    named = f"{demand.device} ({demand.name})" if demand.name else demand.device
    memory, free = demand.memory_bytes, demand.free_bytes
    if not demand.is_there:
        return f"{named}: {format_bytes(needed_bytes)} needed, and it is not there"
    memory_in_words = f"{format_bytes(memory)} there" if memory is not None else "its memory is unknown"
    now = f", {format_bytes(free)} free now" if free is not None and demand.device != DISK else ""
    return f"{named}: {format_bytes(needed_bytes)} needed, {memory_in_words}{now}"


def _read(file: Path) -> Lock:
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.lock import LockError, lock_at
    from devmap_config.profile.document import whole_file

    try:
        return lock_at(file)
    except LockError as error:
        problem = error
    data = {"fits": None, "host": None, "needs": None, "seen": None}
    if not is_file(file):
        message = f"`{file}` {problem}"
        missing = Diagnostic.error("missing-file", message, help="name a lock, as `devmap compile` writes it")
        raise CommandError([missing], exit_code=ExitCode.USAGE, data=data)
    message, advice = f"`{file}` cannot be used: {problem}", "run `devmap compile` on its profile"
    unreadable = Diagnostic.error(problem.code, message, whole_file(str(file)), help=advice)
    raise CommandError([unreadable], exit_code=ExitCode.STALE, data=data)
