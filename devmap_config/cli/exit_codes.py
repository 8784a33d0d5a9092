"""The exit codes of the commands."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The outcome of a command; scripts rely on these numbers."""

    DONE = 0
    WRONG = 1
    """The profile is wrong or cannot be satisfied, even if its lock is also stale."""
    USAGE = 2
    """The command line is wrong, a file does not exist, a file or stdout cannot be written, or memory ran out."""
    STALE = 3
    """The lock is missing, stale or unreadable, or the plans differ."""
    UNLIKE_LOCK = 4
    """The machine or the loaded model differs from the lock."""
    TOO_NOISY = 5
    """The machine was too busy for meaningful measurements."""
    BUG = 70
    """A mistake of devmap-config."""
    INTERRUPTED = 130
