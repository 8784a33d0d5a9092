"""Reads the machines that the command line names: by their devices, or by a file that describes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.profile.schema import Hardware

MACHINE_HELP = "`2xrtx-4090+cpu:64GiB`, `2x24GiB`, or a YAML file with a `hardware:` block"

MACHINE_CODES: frozenset[Code] = frozenset(
    {
        "bad-compute",
        "compute-on-cpu",
        "conflicting-pins",
        "forbidden-device",
        "hosts-need-vllm",
        "memory-beyond-card",
        "mixed-accelerators",
        "no-capacity",
        "over-capacity",
        "quantizer-refuses",
        "stranded-tensor",
        "unknown-device",
        "unlisted-device",
        "unsupported-dtype",
    }
)
"""Errors that depend on the machine; any other error is the profile's, on every machine."""


def machine_of(name: str, *, allows_hosts: bool = False) -> Hardware:
    """Return the machine that a user names: devices joined by `+`, or a file whose `hardware:` describes it.

    Args:
        name: what a user names.
        allows_hosts: whether the file may describe several hosts.

    Raises:
        click.UsageError: if there is none of that name.
        ProfileError: if the file, or its content, is wrong.
    """
    from devmap_config.hardware.machines import UnknownMachineError, named_machine

    if name.endswith((".yaml", ".yml")):
        hardware = _machine_in(Path(name))
        if hardware.hosts and not allows_hosts:
            raise click.UsageError(
                f"`{name}` describes several hosts, and one machine is wanted: write a profile for several by hand,"
                f" with `extends: [{name}]` and `targets: [vllm]`"
            )
        return hardware
    if Path(name).suffix in (".json", ".toml", ".csv"):
        raise click.UsageError(
            f"`{name}` is not a machine: a file that describes one is YAML, as `devmap probe` prints it"
        )
    if "," in name:
        raise click.UsageError(
            f"`{name}` is several machines, and one is wanted: `+` joins the devices of one, as in"
            f" `{'+'.join(part.strip() for part in name.split(','))}`"
        )
    try:
        return named_machine(name)
    except UnknownMachineError as error:
        raise click.UsageError(f"`{name}` is not a machine: {error}") from None


def _machine_in(path: Path) -> Hardware:
    from devmap_config.diagnostics.diagnostic import ProfileError, Sink
    from devmap_config.hardware.declared import machine_inventory
    from devmap_config.profile.loading import load_hardware

    sink = Sink()
    hardware = load_hardware(path, sink)
    if hardware is not None:
        machine_inventory(hardware, {}, sink)
    if hardware is None or sink.has_errors:
        raise ProfileError(tuple(sink), sink.texts)
    return hardware


def is_of_machine(diagnostics: Iterable[Diagnostic]) -> bool:
    """Return whether all errors depend on this machine, and may not occur on another."""
    return all(finding.code in MACHINE_CODES for finding in diagnostics if finding.is_error)
