"""What a user allows a profile that need not be theirs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """What is refused unless the command line says otherwise.

    `allow_outside` lets paths lead out of the repository, `trust_remote_code` lets a model's own code run. With
    `allow_unmeasured` formulas stand in where a library that changed, or a mistake of ours, kept the model from being
    measured or the plan from being tried.
    """

    allow_outside: bool = False
    trust_remote_code: bool = False
    allow_unmeasured: bool = False


NO_PERMISSIONS = Permissions()
