"""Finds the two plans that `devmap diff` compares: of locks, of profiles, or of locks in git."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.cli.command import CommandError, Mistakes
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.diagnostics.diagnostic import Diagnostic
from devmap_config.files import LOCK, exists
from devmap_config.plan.diff import bases_in_lock, difference, made_of
from devmap_config.plan.lock import LockError, lock_at, lock_path, profile_of, read_lock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.compiler import Compiled
    from devmap_config.diagnostics.codes import ErrorCode, WarningCode
    from devmap_config.plan.diff import Bases, Difference
    from devmap_config.plan.lock import Lock
    from devmap_config.plan.values import Scalar
    from devmap_config.profile.permissions import Permissions


NOTHING = {"diff": None}


@dataclass(frozen=True)
class Side:
    """A plan as plain data, with the name that the user gave.

    `made_of` holds its model and cards, `bases` the basis of its times, `notes` further findings.
    """

    name: str
    plan: Mapping[str, Any]
    made_of: Mapping[str, Scalar]
    bases: Bases
    notes: tuple[Diagnostic, ...] = ()


def sides_of(before: str, after: str, permissions: Permissions) -> list[Side]:
    """Return the plans of both arguments.

    Raises:
        DevmapError: if one is not available.
    """
    sides: list[Side] = []
    mistakes = Mistakes()
    for text, other in ((before, after), (after, before)):
        with mistakes.collected():
            sides.append(_side(text, other, permissions))
    mistakes.raise_any()
    return sides


def difference_of(sides: Sequence[Side]) -> Difference:
    """Return the difference from the first side to the second."""
    before, after = sides
    return difference(before.plan, after.plan, (before.made_of, after.made_of), (before.bases, after.bases))


def _side(text: str, other: str, permissions: Permissions) -> Side:
    path = Path(text)
    if exists(path):
        if path.suffix == ".json":
            return locked_side(text, _lock_in(path, permissions))
        return _side_of_profile(profile_of(path), permissions)
    revision, colon, inside = text.partition(":")
    if colon and inside:
        return locked_side(text, _lock_at_revision(revision, Path(inside), text))
    if exists(Path(other)) and not text.endswith((".yaml", ".yml", ".json")):
        return locked_side(text, _lock_at_revision(text, Path(other), text))
    raise _refused(
        "missing-file",
        f"`{text}` does not exist",
        "name a profile, a lock, or a git revision beside one; for two revisions, `REVISION:PROFILE` twice",
    )


def compiled_side(name: str, compiled: Compiled, notes: tuple[Diagnostic, ...] = ()) -> Side:
    """Return the side of a profile that was compiled, or checked against its lock."""
    subjects = made_of(compiled.inputs.values, compiled.inventory.accelerators_to_json())
    bases = {phase: basis.rates for phase, basis in compiled.time_bases.items()}
    return Side(name, compiled.plan.to_json(), subjects, bases, notes)


def locked_side(name: str, lock: Lock) -> Side:
    """Return the side of a lock, with only the information in the lock."""
    return Side(name, lock.plan, made_of(lock.values, lock.hardware), bases_in_lock(lock.plan, lock.values))


def _lock_in(path: Path, permissions: Permissions) -> Lock:
    try:
        return lock_at(path, allow_outside=permissions.allow_outside)
    except LockError as error:
        raise _refused(error.code, f"`{path}` {error}", None) from None


def _side_of_profile(profile: Path, permissions: Permissions) -> Side:
    """Return the locked plan of a profile, or its new plan if no lock holds."""
    from devmap_config.compiler import Rejected
    from devmap_config.locked import compile_locked

    path = lock_path(profile)
    lock, problem = None, None
    code: WarningCode = "missing-lock"
    try:
        lock = lock_at(path, allow_outside=permissions.allow_outside)
    except LockError as error:
        code, problem = error.code, str(error)
    compilation, drift = compile_locked(profile, lock, permissions=permissions)
    if isinstance(compilation, Rejected):
        raise CommandError(compilation.diagnostics, compilation.texts, data=NOTHING)
    if drift is not None:
        code, problem = "broken-lock" if drift.code == "broken-lock" else "stale-lock", drift.message
    notes: tuple[Diagnostic, ...] = ()
    if problem is not None:
        notes = (Diagnostic.warning(code, f"`{path}` {problem}", help="compared is what the profile asks for now"),)
    return compiled_side(str(profile), compilation, notes)


def _lock_at_revision(revision: str, file: Path, text: str) -> Lock:
    """Return a lock, or the lock of a profile, at a git revision."""
    path = file if file.suffix == ".json" else lock_path(file)
    commit = _git(path.parent, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise _refused(
            "missing-file", f"`{text}` is neither a file nor a git revision", "name a profile, a lock, or a revision"
        )
    blob = f"{commit.strip()}:./{path.name}"
    size_bytes = int(_git(path.parent, "cat-file", "-s", blob) or 0)
    if size_bytes > LOCK.max_bytes:
        raise _refused("too-large", f"`{path}` at `{revision}` is larger than {LOCK.max_bytes:,} bytes", None)
    content = _git(path.parent, "cat-file", "blob", blob)
    if content is None:
        raise _refused(
            "missing-lock",
            f"`{path}` is not in git at `{revision}`",
            f"name a later revision or, if it had another name, `{revision}:PATH`",
        )
    try:
        return read_lock(content)
    except LockError as error:
        raise _refused(error.code, f"`{path}` at `{revision}` {error}", None) from None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or `None` if it fails, is not installed, or refuses."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603  no shell, and `--` before arguments
    except (OSError, ValueError):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def _refused(code: ErrorCode, message: str, help: str | None) -> CommandError:
    return CommandError([Diagnostic.error(code, message, help=help)], exit_code=ExitCode.USAGE, data=NOTHING)
