"""Reads lockfiles, and writes files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from devmap_config.plan.lock import Lock


def existing_lock(path: Path) -> tuple[Lock | None, str | None]:
    """The lock at a path, or why there is none that can be read; neither where there is nothing."""
    from devmap_config.plan.lock import LockError, read_lock

    try:
        return read_lock(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return None, None if path.parent.is_dir() else f"the folder `{path.parent}` does not exist"
    except IsADirectoryError:
        return None, "it is a folder"
    except (OSError, UnicodeDecodeError, LockError) as error:
        return None, str(error)


def require_replaceable(path: Path, problem: str) -> None:
    """Refuse to write a lock over what is none, or over a newer one; a damaged lock may be replaced.

    Raises:
        click.UsageError: with the reason.
    """
    if path.is_file() and path.name.endswith(".lock.json") and "upgrade" not in problem:
        click.echo(f"`{path}` is replaced: {problem}; `--set` values that it held are lost", err=True)
        return
    raise click.UsageError(f"`{path}` cannot be written: {problem}")


def require_new(path: Path, *, force: bool) -> None:
    """Refuse to write over a file that exists, or into a folder that does not.

    Raises:
        click.UsageError: with the reason.
    """
    if not path.parent.is_dir():
        raise click.UsageError(f"the folder `{path.parent}` does not exist")
    if path.is_dir():
        raise click.UsageError(f"`{path}` is a folder")
    if path.exists() and not force:
        raise click.UsageError(f"`{path}` exists: pass `--force` to replace it")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it.

    Raises:
        click.UsageError: where the folder cannot be written to.
    """
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise click.UsageError(f"`{path}` cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # what `open` would have given it
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
