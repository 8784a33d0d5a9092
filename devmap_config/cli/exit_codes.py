"""The exit codes of the commands."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The outcome of a command; scripts rely on these numbers."""

    DONE = 0
    WRONG = 1
    """The profile is wrong or cannot be satisfied, also where its lock is stale besides."""
    USAGE = 2
    """The command line is wrong, a file is not there or cannot be written, nor stdout, or memory ran out."""
    STALE = 3
    """The lock is missing, stale or unreadable, or the plans differ."""
    UNLIKE_LOCK = 4
    """The machine or the loaded model is not what the lock says."""
    TOO_NOISY = 5
    """The machine was too busy for what was measured to say anything."""
    BUG = 70
    """A mistake of devmap-config."""
    INTERRUPTED = 130
