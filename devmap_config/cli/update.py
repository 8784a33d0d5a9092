"""`devmap update`: updates the commit of a model's revision in the lock."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.options import dry_run_option
from devmap_config.cli.reporting import echo, print_lines
from devmap_config.files import is_file

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.profile.schema import Model

DIGITS_SHOWN = 12


@profile_command("update", "table", "json")
@dry_run_option
def update(profile: Path, options: ProfileOptions, dry_run: bool) -> None:
    """Ask the hub for the present commit of PROFILE's model revision, compile with it, and show what moves.

    Nothing else moves a revision: `compile` and `check` stay at the commit that the lock holds.
    """
    from devmap_config.cli.diff import table_lines
    from devmap_config.cli.locking import lock_to_replace, write_results
    from devmap_config.cli.sides import compiled_side, difference_of, locked_side
    from devmap_config.compiler import Rejected
    from devmap_config.graph.vendoring import vendored_path
    from devmap_config.plan.lock import lock_path

    target = lock_path(profile)
    earlier = lock_to_replace(target, writes=not dry_run, allow_outside=options.permissions.allow_outside)
    compilation = options.run_pipeline(
        profile, lock=earlier, must_ask=True, checks_checkpoint=True, simulates=True, use_vendored=False
    )
    before = earlier.inputs.get("commit") if earlier else None
    reached = compilation.reached if isinstance(compilation, Rejected) else compilation
    after = reached.model.source.commit if reached else None
    difference = plan = None
    if not isinstance(compilation, Rejected):
        plan = compilation.to_json()
        if earlier:
            difference = difference_of((locked_side("before", earlier), compiled_side("now", compilation)))
    data = {
        "plan": plan,
        "commit": {"before": before, "after": after},
        "diff": difference.to_json() if difference else None,
    }
    if isinstance(compilation, Rejected):
        raise CommandError(compilation.diagnostics, compilation.texts, data=data)
    written = [] if dry_run else write_results(compilation, target, with_graph=is_file(vendored_path(profile)))
    options.report(compilation.diagnostics, compilation.texts, data)
    if options.shows_tables:
        echo(_summary(compilation.loaded.profile.model, before, after))
        if difference and not difference.is_none:
            print_lines(partial(table_lines, difference, "before", "now"))
        if written:
            echo(f"wrote {' and '.join(map(str, written))}", err=True)


def _summary(model: Model, before: str | None, after: str | None) -> str:
    """Return the change of the model's revision in one line."""
    if after is None:
        return "the model is a local one: it has no revision to update, and is compiled as it is now"
    revision = model.revision or "main"
    name = f"{model.source.value} at `{revision}`"
    if revision == after:
        return f"{name} is a commit, which never moves: change `model.revision` in the profile"
    if before is None:
        return f"{name} is {after[:DIGITS_SHOWN]}"
    if before == after:
        return f"{name} still is {after[:DIGITS_SHOWN]}"
    return f"{name}: {before[:DIGITS_SHOWN]} → {after[:DIGITS_SHOWN]}"
