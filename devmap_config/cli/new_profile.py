"""What writing a new profile takes, for `devmap init` and `devmap adopt` alike."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.files import exists, is_folder

if TYPE_CHECKING:
    from devmap_config.hardware.machines import Machine


def require_new(path: Path | None, *, force: bool) -> None:
    """Refuse to write over a file that exists, or into a folder that does not; `None` is stdout.

    Raises:
        click.UsageError: with the reason.
    """
    if path is None:
        return
    if not is_folder(path.parent):
        raise click.UsageError(f"the folder `{path.parent}` does not exist")
    if is_folder(path):
        raise click.UsageError(f"`{path}` is a folder")
    if exists(path) and not force:
        raise click.UsageError(f"`{path}` exists: pass `--force` to replace it")


def print_or_write(text: str, path: Path | None, next_step: str = "") -> None:
    """Write a profile, or print it where there is no file that it is to be written to."""
    from devmap_config.cli.locking import write

    if path is None:
        click.echo(text, nl=False)
    else:
        write(path, text)
        click.echo(f"wrote {path}{next_step}", err=True)


def machine_of(name: str) -> Machine:
    """Return the machine that a user names, such as `2xrtx-4090,cpu:64GiB`.

    Raises:
        click.UsageError: where there is none of that name.
    """
    from devmap_config.hardware.machines import UnknownMachineError, named_machine

    try:
        return named_machine(name)
    except UnknownMachineError as error:
        raise click.UsageError(str(error)) from None


def relative_source(source: str, output: Path | None) -> str:
    """Return a source as the profile is to name it: local paths relative to where the profile lies."""
    if not exists(Path(source)):
        return source
    relative = os.path.relpath(source, output.parent if output else ".")
    return relative if "/" in relative or relative.endswith(".json") else f"./{relative}"


def specification(described: str) -> str:
    """Return a device as a profile writes it: a catalogue name as it is, memory as a mapping."""
    from devmap_config.hardware.catalogue import load_catalogue

    return described if described in load_catalogue() else f"{{memory: {described}}}"
