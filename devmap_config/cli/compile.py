"""`devmap compile`: a profile to a plan, and the plan to a lock."""

from __future__ import annotations

from pathlib import Path
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
    from devmap_config.compiler import Compiled


@click.command("compile", context_settings={"help_option_names": ["-h", "--help"]})
@profile_argument
@format_option("table", "json", "device-map", "sarif", "github")
@set_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write the lock; beside the profile else."
)
@click.option("--keep", is_flag=True, help="Of plans that are as good, take the nearest to the existing lock.")
@click.option("--vendor", is_flag=True, help="Keep the model's graph beside the profile: no hub, no torch next time.")
@click.option("--simulate/--no-simulate", "simulates", default=True, help="Whether to try if the plan runs; it does.")
@click.option("--dry-run", is_flag=True, help="Write nothing.")
@quiet_option
@outside_option
@remote_code_option
@unmeasured_option
def compile_command(
    profile: Path,
    output_format: str,
    variables: dict[str, str],
    output: Path | None,
    keep: bool,
    vendor: bool,
    simulates: bool,
    dry_run: bool,
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> int:
    """Compile PROFILE: validate it, place its model, print the plan and write its lock."""
    from devmap_config.cli.locking import existing_lock, require_replaceable, write_results
    from devmap_config.cli.reporting import print_json, report, report_on_terminal
    from devmap_config.compiler import Rejected, Request, run_pipeline
    from devmap_config.plan.lock import lock_path
    from devmap_config.plan.plan import NotADeviceMapError

    target = output or lock_path(profile)
    earlier, problem = existing_lock(target)
    if problem is not None and not dry_run:
        require_replaceable(target, problem)
    compilation = run_pipeline(
        Request.for_profile(
            profile,
            lock=earlier,
            variables=variables,
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
            allow_unmeasured=allow_unmeasured,
            use_vendored=not vendor,
            keeps_plan=keep and earlier is not None,
            checks_checkpoint=True,
            simulates=simulates,
        )
    )
    plan, texts = None if isinstance(compilation, Rejected) else compilation.plan, compilation.texts
    if output_format == "device-map":
        report_on_terminal([each for each in compilation.diagnostics if not quiet or each.severity == "error"], texts)
        try:
            device_map = None if plan is None else plan.device_map
        except NotADeviceMapError as error:
            report_on_terminal(list(error.diagnostics), texts)
            return 1
        if plan is not None:
            if plan.streams_buffers:
                click.echo("this plan offloads buffers too: pass `offload_buffers=True` with the map", err=True)
            print_json(device_map)
    else:
        data = {"plan": plan.to_json() if plan else None}
        report(compilation.diagnostics, texts, output_format, quiet=quiet, data=data)
        if not isinstance(compilation, Rejected) and output_format == "table" and not quiet:
            print_plan(compilation)
    if isinstance(compilation, Rejected):
        return 1
    if not dry_run:
        used = compilation.loaded.overrides
        written = write_results(compilation, target, with_graph=vendor)
        if output_format == "table" and not quiet:
            again = ", ".join(f"{name}={used[name]}" for name in used if name not in variables)
            kept = f", with {again} as before" if again else ""
            click.echo(f"wrote {' and '.join(map(str, written))}{kept}", err=True)
    return 0


def print_plan(compiled: Compiled) -> None:
    """Print the plan as a table."""
    from rich.console import Console

    from devmap_config.cli.plan_table import plan_lines

    console = Console(highlight=False)
    for line in plan_lines(compiled, console.width):
        console.print(line)
