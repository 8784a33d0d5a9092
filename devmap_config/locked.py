"""Holds a profile to its lock: by deriving the locked plan again, and by placing anew what the lock promises."""

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
    """Hold a profile to its lock: the plan is the lock's, or the drift says why not and the plan is a new one.

    Args:
        path: the profile.
        lock: its lock; without one, the plan is a new one.
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
    """Place anew what a lock holds, and return what of its plan or bound that does not prove; `None` if it does.

    A plan that is as good as the new one, and nearer to the lock, is its plan: `--keep` makes such locks.
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
            break  # else the dry run may have mended it, which takes longer to see
    return Drift("unproven-lock", unproven) if unproven else None
