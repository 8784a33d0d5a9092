"""The permissions that a user grants a profile, which may come from a stranger."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """The permissions of a profile; each is denied unless the command line grants it.

    Attributes:
        allow_outside: paths may lead out of the repository.
        trust_remote_code: code that comes with the model may run.
        allow_unmeasured: formulas may stand in if a library that changed, or a mistake of ours, keeps the model from
            being measured or the plan from being dry-run.
    """

    allow_outside: bool = False
    trust_remote_code: bool = False
    allow_unmeasured: bool = False


NO_PERMISSIONS = Permissions()
