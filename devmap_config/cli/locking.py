"""Reads lockfiles, and writes files atomically."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.reporting import echo
from devmap_config.files import is_file, is_folder, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.cli.command import ProfileOptions
    from devmap_config.compiler import Compilation, Compiled
    from devmap_config.diagnostics.codes import WarningCode
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.lock import Lock, LockError


def lock_to_replace(path: Path, *, writes: bool, allow_outside: bool) -> Lock | None:
    """Return the lock at a path that a command will write to; `None` if there is none that can be read.

    Raises:
        click.UsageError: if the existing file must not be replaced, and the command `writes`.
    """
    from devmap_config.plan.lock import LockError, lock_at

    try:
        return lock_at(path, allow_outside=allow_outside)
    except LockError as error:
        if writes and not (error.code == "missing-lock" and is_folder(path.parent)):
            _require_replaceable(path, error)
        return None


def lock_warnings(profile: Path, compilation: Compilation, options: ProfileOptions) -> tuple[Diagnostic, ...]:
    """Return a warning if the lock of a profile that was compiled anew cannot be read, or does not hold.

    A profile without a lock, or with other `--set` values than those of the lock, is expected to have another plan.
    """
    from devmap_config.compiler import Compiled
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.drift import Drift, reuse_locked_plan
    from devmap_config.plan.lock import LockError, lock_at, lock_path

    path = lock_path(profile)
    help = f"shown is the plan of the profile as it is now; `devmap compile {profile}` locks it"
    try:
        lock = lock_at(path, allow_outside=options.permissions.allow_outside)
    except LockError as error:
        if error.code == "missing-lock":
            return ()
        return (Diagnostic.warning(error.code, f"`{path}` {error}", help=help),)
    if options.variables or not isinstance(compilation, Compiled):
        return ()
    drift = reuse_locked_plan(lock, compilation, compilation.inputs)
    if not isinstance(drift, Drift):
        return ()
    code: WarningCode = "broken-lock" if drift.code == "broken-lock" else "stale-lock"
    return (Diagnostic.warning(code, f"`{path}` {drift.message}", help=help),)


def _require_replaceable(path: Path, problem: LockError) -> None:
    """Refuse to overwrite a file that is not a lock, or a newer lock; a damaged lock may be replaced.

    Raises:
        click.UsageError: with the reason.
    """
    if not is_folder(path.parent):
        raise click.UsageError(f"`{path}` cannot be written: the folder `{path.parent}` does not exist")
    if is_file(path) and path.name.endswith(".lock.json") and problem.code != "newer-lock":
        echo(f"`{path}` {problem}; it is replaced, and `--set` values that it held are lost", err=True)
        return
    advice = "upgrade devmap-config" if problem.code == "newer-lock" else "name another file"
    raise click.UsageError(f"`{path}` is not replaced: it {problem}; {advice}")


def write_results(compiled: Compiled, target: Path, *, with_graph: bool) -> list[Path]:
    """Write the lock of a compiled profile, and the graph beside the profile, and return the paths that were written.

    Raises:
        click.ClickException: if a file cannot be written.
    """
    from devmap_config.graph.cache import library_versions
    from devmap_config.graph.loading import vendor
    from devmap_config.graph.vendoring import vendored_path
    from devmap_config.plan.lock import lock_of

    loaded, accelerators = compiled.loaded, compiled.inventory.accelerators_to_json()
    lock = lock_of(compiled.plan, compiled.inputs, loaded.overrides, library_versions(), accelerators)
    texts = {target: lock.to_text()}
    if with_graph:
        dry_runs = {plan_digest: verdict.to_json() for plan_digest, verdict in compiled.verdicts.items()}
        texts[vendored_path(loaded.path)] = vendor(loaded, compiled.model, dry_runs).to_text()
    for path, text in texts.items():
        write(path, text)
    return list(texts)


def write(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees a part of it.

    Raises:
        click.ClickException: if it cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise click.ClickException(f"`{path}` cannot be written: {error.strerror}") from None
