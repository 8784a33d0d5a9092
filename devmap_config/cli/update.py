"""`devmap update`: moves a model's revision, in the lock, to what it resolves to now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from devmap_config.cli.options import (
    format_option,
    outside_option,
    profile_argument,
    quiet_option,
    remote_code_option,
    set_option,
    unmeasured_option,
)

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.profile.schema import Model

DIGITS_SHOWN = 12


@click.command("update")
@profile_argument
@format_option("table", "json")
@set_option
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@quiet_option
@outside_option
@remote_code_option
@unmeasured_option
def update(
    profile: Path,
    output_format: str,
    variables: dict[str, str],
    dry_run: bool,
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> int:
    """Ask the hub what the revision of PROFILE's model is now, compile with that, and show what moves.

    Nothing else moves a revision: `compile` and `check` stay at the commit that the lock holds.
    """
    from devmap_config.cli.diff import table_lines
    from devmap_config.cli.locking import existing_lock, require_replaceable, write_results
    from devmap_config.cli.reporting import report
    from devmap_config.compiler import Rejected, Request, run_pipeline
    from devmap_config.graph.vendoring import vendored_path
    from devmap_config.plan.diff import difference
    from devmap_config.plan.lock import lock_path

    target = lock_path(profile)
    earlier, problem = existing_lock(target)
    if problem is not None and not dry_run:
        require_replaceable(target, problem)
    compilation = run_pipeline(
        Request.for_profile(
            profile,
            lock=earlier,
            variables=variables,
            must_ask=True,
            checks_checkpoint=True,
            simulates=True,
            use_vendored=False,
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
            allow_unmeasured=allow_unmeasured,
        )
    )
    before = earlier.inputs.get("commit") if earlier else None
    reached = compilation.reached if isinstance(compilation, Rejected) else compilation
    after = reached.model.source.commit if reached else None
    plan = None if isinstance(compilation, Rejected) else compilation.plan
    found = difference(earlier.plan, plan.to_json()) if earlier and plan else None
    data = {
        "plan": plan.to_json() if plan else None,
        "commit": {"before": before, "after": after},
        "diff": found.to_json() if found else None,
    }
    report(compilation.diagnostics, compilation.texts, output_format, quiet=quiet, data=data)
    if isinstance(compilation, Rejected):
        return 1
    written = [] if dry_run else write_results(compilation, target, with_graph=vendored_path(profile).is_file())
    if output_format == "table" and not quiet:
        click.echo(_summary(compilation.loaded.profile.model, before, after))
        for line in table_lines(found, "before", "now") if found and not found.is_none else ():
            click.echo(line)
        if written:
            click.echo(f"wrote {' and '.join(map(str, written))}", err=True)
    return 0


def _summary(model: Model, before: str | None, after: str | None) -> str:
    """What became of the revision, in one line."""
    if after is None:
        return "the model is a local one: it has no revision to update"
    revision = model.revision or "main"
    name = f"{model.source.value} at `{revision}`"
    if revision == after:
        return f"{name} is a commit, which never moves: change `model.revision` in the profile"
    if before is None:
        return f"{name} is {after[:DIGITS_SHOWN]}"
    if before == after:
        return f"{name} still is {after[:DIGITS_SHOWN]}"
    return f"{name}: {before[:DIGITS_SHOWN]} → {after[:DIGITS_SHOWN]}"
