"""`devmap check`: whether a lock still is what its profile asks for; writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.options import (
    PROFILE,
    format_option,
    outside_option,
    quiet_option,
    remote_code_option,
    set_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.compiler import Compilation
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.lock import Lock

EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_STALE = 3


@click.command("check")
@click.argument("profiles", type=PROFILE, nargs=-1, required=True)
@format_option("table", "json", "sarif", "github")
@set_option
@quiet_option
@outside_option
@remote_code_option
def check(
    profiles: tuple[Path, ...],
    output_format: str,
    variables: dict[str, str],
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
) -> int:
    """Check that each PROFILE has a lock, and that it still is what the profile asks for."""
    from devmap_config.cli.compile import missing_profile, report_missing
    from devmap_config.cli.reporting import report

    profiles = tuple(
        each for named in profiles for each in (sorted(named.glob("*.yaml")) if named.is_dir() else [named])
    )
    missing = [profile for profile in profiles if not profile.is_file()]
    if len(missing) == len(profiles):
        return report_missing(missing[0], output_format)
    found: list[Diagnostic] = []
    texts: dict[str, str] = {}
    plans: dict[str, object] = {}
    codes: list[int] = []
    for profile in profiles:
        if profile in missing:
            found.append(missing_profile(profile))
            codes.append(EXIT_USAGE)
            continue
        compilation, stale = _check_one(profile, variables, allow_outside, trust_remote_code)
        texts |= compilation.texts
        found += [*compilation.diagnostics, *([stale] if stale else [])]
        plans[str(profile)] = compilation.plan.to_json() if compilation.plan else None
        codes.append(EXIT_WRONG if compilation.has_errors else EXIT_STALE if stale else 0)
    data = {"plan": next(iter(plans.values()))} if len(plans) == 1 else {"plan": None, "plans": plans}
    report(found, texts, output_format, quiet=quiet, data=data)
    if not any(codes) and output_format == "table" and not quiet:
        click.echo(f"{len(profiles)} lock{'' if len(profiles) == 1 else 's'} up to date")
    return next(code for code in (EXIT_WRONG, EXIT_USAGE, EXIT_STALE, 0) if code in codes)


def _check_one(
    profile: Path, variables: dict[str, str], allow_outside: bool, trust_remote_code: bool
) -> tuple[Compilation, Diagnostic | None]:
    from devmap_config.cli.compile import commit_of
    from devmap_config.compiler import Request, run_pipeline
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.plan.lock import LockError, lock_path, read_lock
    from devmap_config.profile.document import whole_file

    path = lock_path(profile)
    lock, problem = None, None
    try:
        lock = read_lock(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = ("missing-lock", f"`{path}` does not exist")
    except (OSError, UnicodeDecodeError, LockError) as error:
        problem = ("unreadable-lock", f"`{path}` cannot be used: {error}")
    remembered = dict(lock.variables) if lock else {}
    compilation = run_pipeline(
        Request(
            path=profile,
            variables=variables,
            remembered=remembered,
            commit=commit_of(lock),
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
        )
    )
    if lock is not None and compilation.inputs is not None:
        from devmap_config.plan.lock import changed_inputs

        if changed := changed_inputs(
            lock, compilation.inputs, compilation.loaded.overrides if compilation.loaded else {}
        ):
            problem = ("stale-lock", f"`{path}` is stale: {' and '.join(changed)} changed")
        elif broken := _broken(lock, compilation):
            problem = ("unreadable-lock", f"`{path}` cannot be used: {broken}")
    if problem is None or compilation.has_errors:
        return compilation, None
    code, message = problem
    help_text = f"run `devmap compile {profile}` and commit the lock"
    place = whole_file(str(profile))
    return compilation, Diagnostic(code=code, severity="error", message=message, span=place, help=help_text)


def _broken(lock: Lock, compilation: Compilation) -> str | None:
    """What does not hold of the locked plan itself, for what the profile asks now."""
    from devmap_config.plan.lock import LockError, plan_of
    from devmap_config.plan.review import broken_promises

    model, inventory, resolution, fresh = (
        compilation.model,
        compilation.inventory,
        compilation.resolution,
        compilation.plan,
    )
    if model is None or inventory is None or resolution is None or fresh is None:
        return None
    try:
        plan = plan_of(lock, model.graph, fresh.executor)
        broken = broken_promises(plan, model.graph, inventory.capacities, resolution)
    except (LockError, KeyError, TypeError) as error:
        return str(error)
    return broken[0] if broken else None
