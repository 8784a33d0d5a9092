"""Checks profiles against their locks, several in parallel."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.cli.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from devmap_config.cli.command import ProfileOptions
    from devmap_config.compiler import Compiled
    from devmap_config.diagnostics.codes import Code, ErrorCode
    from devmap_config.diagnostics.diagnostic import Diagnostic

State = Literal["fresh", "stale", "missing", "damaged", "wrong", "absent"]
"""The state of a lock: it holds; it no longer holds; there is none; it cannot be read. Or of a profile: it is wrong;
it does not exist.
"""

LOCK_STATES: Mapping[Code, State] = {
    "stale-lock": "stale",
    "broken-lock": "stale",
    "unproven-lock": "stale",
    "missing-lock": "missing",
    "unreadable-lock": "damaged",
    "newer-lock": "damaged",
}

WORTH_A_PROCESS = 3
"""The number of profiles that justifies another process, whose start takes about as long as checking that many."""

MAX_PROCESSES = 8
"""The most processes, each of which may have to import torch for a graph that is not cached."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of checking one profile, as data that passes between processes."""

    profile: Path
    state: State
    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]
    plan: Mapping[str, Any] | None = None


def check_all(profiles: Sequence[Path], options: ProfileOptions, *, proves: bool = False) -> list[Checked]:
    """Check all profiles, in as many processes as worthwhile, and return the results in the order of the profiles.

    Processes rather than threads, because Python code takes the time.
    """
    results = []
    with progress(len(profiles), quiet=options.quiet, spins=False) as begin:
        begin(str(profiles[0]))
        for checked in _each_checked(profiles, partial(check_one, options=options, proves=proves)):
            begin(str(checked.profile))
            results.append(checked)
    return results


def _each_checked(profiles: Sequence[Path], check: Callable[[Path], Checked]) -> Iterator[Checked]:
    from devmap_config.probe.host import usable_threads

    workers = min(usable_threads(), MAX_PROCESSES, len(profiles) // WORTH_A_PROCESS)
    done = 0
    if workers > 1:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import BrokenProcessPool
        from importlib import import_module

        import_module("devmap_config.locked")  # only once, before forking
        # Forking is safe, because no other thread runs and no accelerator is in use yet.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        # Without semaphores, or with too little memory for more processes, this process checks the rest.
        with (
            suppress(OSError, ImportError, BrokenProcessPool),
            ProcessPoolExecutor(workers, mp_context=context) as pool,
        ):
            for checked in pool.map(check, profiles):
                yield checked
                done += 1
    yield from map(check, profiles[done:])


def check_one(profile: Path, options: ProfileOptions, *, proves: bool = False) -> Checked:
    """Check one profile against its lock; with `proves`, also place it anew."""
    from devmap_config.compiler import Rejected
    from devmap_config.diagnostics.diagnostic import Diagnostic, ProfileError
    from devmap_config.locked import compile_locked, prove
    from devmap_config.plan.drift import remedy
    from devmap_config.plan.lock import LockError, lock_at, lock_path, profile_of
    from devmap_config.profile.document import whole_file

    try:
        profile = profile_of(profile)
    except ProfileError as error:
        return Checked(profile=profile, state="absent", diagnostics=error.diagnostics, texts={})
    path = lock_path(profile)
    lock = None
    problem: tuple[ErrorCode, str] | None = None
    try:
        lock = lock_at(path, allow_outside=options.permissions.allow_outside)
    except LockError as error:
        problem = (error.code, str(error))
    compilation, drift = compile_locked(profile, lock, **options.of_request)
    if isinstance(compilation, Rejected):
        return Checked(profile=profile, state="wrong", diagnostics=compilation.diagnostics, texts=compilation.texts)
    if proves and lock is not None and drift is None:
        drift = prove(options.request(profile, lock=lock), lock)
    if drift is not None:
        problem = (drift.code, drift.message)
    if problem is None:
        return _checked(profile, compilation, "fresh")
    code, message = problem
    finding = Diagnostic.error(code, f"`{path}` {message}", whole_file(str(profile)), help=remedy(code, profile))
    return _checked(profile, compilation, LOCK_STATES[code], finding)


def _checked(profile: Path, compiled: Compiled, state: State, *findings: Diagnostic) -> Checked:
    return Checked(
        profile=profile,
        state=state,
        diagnostics=(*compiled.diagnostics, *findings),
        texts=compiled.texts,
        plan=compiled.to_json(),
    )
