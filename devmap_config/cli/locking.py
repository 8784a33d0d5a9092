"""Reads and writes lockfiles: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devmap_config.plan.lock import Lock


def existing_lock(path: Path) -> Lock | None:
    """The lock at a path, where there is one that can be read."""
    from devmap_config.plan.lock import LockError, read_lock

    try:
        return read_lock(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, LockError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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
