"""`devmap init`: a first profile for a model and a machine, which compiles as it is."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import CommandError, command
from devmap_config.cli.new_profile import machine_of, print_or_write, relative_source, require_new, specification
from devmap_config.cli.options import force_option, output_option, remote_code_option
from devmap_config.devices import CPU, DISK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.compiler import Compilation, Rejected
    from devmap_config.devices import Device
    from devmap_config.hardware.machines import Machine

OFFLOAD_MEMORY = {CPU: "1TiB", DISK: "4TiB"}
"""What is written down where the machine's own is not known and the model does not fit without."""


@command("init")
@click.argument("source")
@click.option(
    "--on", "machine_name", metavar="MACHINE", help="Such as `2xrtx-4090`, `2x24GiB,cpu:64GiB`; else this one."
)
@output_option
@force_option
@remote_code_option
def init(source: str, machine_name: str | None, output: Path | None, force: bool, trust_remote_code: bool) -> None:
    """Write a first profile for SOURCE (a hub id, a directory, a config.json) that compiles as it is."""
    from devmap_config.compiler import Compiled

    require_new(output, force=force)
    machine = machine_of(machine_name) if machine_name else _this_machine()
    folder = output.parent if output else Path()
    failures: list[Rejected] = []
    for text in _candidates(relative_source(source, output), machine, machine_name or "this machine"):
        compilation = _compile_text(text, folder, trust_remote_code=trust_remote_code)
        if isinstance(compilation, Compiled):
            print_or_write(text, output, f"; next: devmap-compile {output}")
            return
        if compilation.reached is None:  # no machine helps where the model cannot be had
            failures = [compilation]
            break
        failures.append(compilation)
    # The places are in a file that nobody wrote: what is wrong is the model or the machine.
    raise CommandError(replace(each, span=None) for each in failures[0].diagnostics)


def _this_machine() -> Machine:
    from devmap_config.probe.block import as_machine
    from devmap_config.probe.probe import probe_machine

    return as_machine(probe_machine(os.environ, None))


def _candidates(source: str, machine: Machine, named: str) -> Iterator[str]:
    """Profiles from the simplest to the one that offloads most; the first that compiles is taken."""
    storage = {device: what for device, what in machine.devices.items() if not device.is_accelerator}
    accelerators = {device: machine.devices[device] for device in machine.accelerators}
    for dtype in ("auto", "float16"):
        if accelerators:
            yield _profile(source, accelerators, named, "single", dtype, spare=storage)
            yield _profile(source, accelerators, named, "balanced", dtype, spare=storage)
            yield _profile(source, accelerators, named, "sequential", dtype, spare=storage)
        cpu = {CPU: storage.get(CPU, OFFLOAD_MEMORY[CPU])}
        yield _profile(source, accelerators | cpu, named, "sequential" if accelerators else "single", dtype)
        disk = {DISK: storage.get(DISK, OFFLOAD_MEMORY[DISK])}
        yield _profile(source, accelerators | cpu | disk, named, "sequential", dtype)


def _profile(
    source: str,
    devices: dict[Device, str],
    named: str,
    strategy: str,
    dtype: str,
    spare: dict[Device, str] | None = None,
) -> str:
    from devmap_config.profile.writing import yaml_text

    explained = {
        "single": "everything on one device; also: auto, balanced, balanced_low_0, sequential, manual",
        "balanced": "spread over the accelerators; also: auto, balanced_low_0, sequential, single, manual",
        "sequential": "device by device, in order; also: auto, balanced, balanced_low_0, single, manual",
    }[strategy]
    lines = [
        f"# A first profile for {source} on {named}.",
        "version: 1",
        "",
        "model:",
        f"  source: {yaml_text(source)}",
    ]
    if dtype != "auto":
        lines.append(f"  dtype: {dtype}   # what the accelerator computes in")
    lines += [
        "",
        "hardware:",
        "  # What is not listed here does not exist: nothing spills without a word.",
        "  devices:",
    ]
    for device, what in devices.items():
        assumed = "   # assumed: say what there is" if what == OFFLOAD_MEMORY.get(device) else ""
        lines.append(f"    {device}: {specification(what)}{assumed}")
    for device, what in (spare or {}).items():
        lines.append(f"    # {device}: {specification(what)}   # for what is to be offloaded")
    lines += [
        "",
        "placement:",
        f"  strategy: {strategy}   # {explained}",
        "  # pins:   # parts of the model that must be somewhere; `devmap tree` shows their names",
        "  #   - {match: lm_head, device: " + str(next(iter(devices))) + "}",
    ]
    if DISK in devices:
        lines.append("  offload: {folder: ./offload}")
    return "\n".join(lines) + "\n"


def _compile_text(text: str, folder: Path, *, trust_remote_code: bool) -> Compilation:
    """Compile a profile as if it lay in a folder already."""
    from devmap_config.compiler import Request, run_pipeline
    from devmap_config.profile.permissions import Permissions

    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".init-", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return run_pipeline(Request(path=Path(file.name), permissions=Permissions(trust_remote_code=trust_remote_code)))
