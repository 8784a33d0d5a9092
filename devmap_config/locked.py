"""Checks a profile against its lock: derives the locked plan again, or places everything anew and compares."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmap_config.compiler import Compiled, Rejected, Request, hold_to_lock, run_pipeline
from devmap_config.plan.drift import Drift, disproofs

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.compiler import Compilation
    from devmap_config.plan.lock import Lock


def compile_locked(path: Path, lock: Lock | None, **options: Any) -> tuple[Compilation, Drift | None]:
    """Compile a profile with the plan of its lock; if that plan does not hold, with a new one, and return why as drift.

    Args:
        path: the profile.
        lock: its lock; with `None`, a new plan is made.
        options: further options of `Request.for_profile`.
    """
    request = Request.for_profile(path, lock=lock, **options)
    compilation, drift = hold_to_lock(request, lock)
    if isinstance(compilation, Compiled) or lock is None or not lock.variables:
        return compilation, drift
    without = run_pipeline(replace(request, lock=replace(lock, variables={})))
    if isinstance(without, Rejected):
        return compilation, drift
    values = ", ".join(f"{name}={value}" for name, value in lock.variables.items())
    reason = next(finding.message for finding in compilation.diagnostics if finding.is_error)
    return without, Drift("broken-lock", (f"its `--set` values ({values}) do not fit: {reason}",))


def prove(request: Request, lock: Lock) -> Drift | None:
    """Place everything anew, and return what differs from the lock's plan or bound; `None` if nothing does.

    Among plans that are equally good, the one nearest to the lock counts as its plan, as `--keep` makes such locks.
    """
    unproven: tuple[str, ...] = ()
    for simulates in (False, True):
        compilation = run_pipeline(replace(request, keeps_plan=True, simulates=simulates))
        if isinstance(compilation, Rejected):
            return Drift("unproven-lock", ("placing anew gives no plan",))
        plan = compilation.plan
        unproven = disproofs(lock, plan)
        locked = (lock.plan["device_map"], lock.plan["compute"], lock.plan.get("offloaded_caches"))
        caches = None if plan.offloaded_caches is None else list(plan.offloaded_caches)
        if (plan.placement, plan.compute, caches) == locked:
            break  # otherwise a dry run may have repaired the locked plan, which takes longer to check
    return Drift("unproven-lock", unproven) if unproven else None
