"""`devmap probe`: this machine as a `hardware:` block, or what it lacks to carry a lock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.cli.options import format_option, quiet_option

if TYPE_CHECKING:
    from devmap_config.hardware.machine import SeenMachine


@click.command("probe")
@click.option("--disk", "disk_folder", type=click.Path(path_type=Path), help="A folder on the disk that is meant.")
@format_option("table", "json")
@quiet_option
def probe(disk_folder: Path | None, output_format: str, quiet: bool) -> int:
    """Print this machine as a `hardware:` block for profiles, in YAML."""
    from devmap_config.cli.reporting import report
    from devmap_config.hardware.block import block_text, hardware_block
    from devmap_config.hardware.probe import probe_machine

    seen: SeenMachine = probe_machine(os.environ, disk_folder or Path())
    block = hardware_block(seen)
    data = {"hardware": block, "seen": seen.to_json()}
    report(seen.notes, {}, output_format, quiet=quiet, data=data)
    if output_format == "table":
        click.echo(block_text(seen, block), nl=False)
    return 0
