"""`devmap compile`: compiles a profile to a plan, and writes the plan to a lock."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.options import FILE, dry_run_option

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.compiler import Compiled


@profile_command("compile", "table", "json", "device-map", "sarif", "github")
@click.option("-o", "--output", type=FILE, help="Write the lock to this file. [default: beside the profile]")
@click.option(
    "--keep", is_flag=True, help="Among plans that are equally good, take the one nearest to the existing lock."
)
@click.option(
    "--vendor",
    is_flag=True,
    help="Store the model's graph beside the profile: later compilations need neither the hub nor torch.",
)
@click.option(
    "--simulate/--no-simulate",
    "simulates",
    default=True,
    help="Dry-run the plan on simulated accelerators, or not. [default: simulate]",
)
@dry_run_option
def compile_command(
    profile: Path,
    options: ProfileOptions,
    output: Path | None,
    keep: bool,
    vendor: bool,
    simulates: bool,
    dry_run: bool,
) -> None:
    """Compile PROFILE: validate it, place its model, print the plan and write its lock."""
    from devmap_config.cli.companions import companion_lines
    from devmap_config.cli.locking import lock_to_replace, write_results
    from devmap_config.cli.plan_table import plan_lines
    from devmap_config.cli.reporting import echo, print_json, print_lines
    from devmap_config.plan.lock import lock_path

    target = output or lock_path(profile)
    earlier = lock_to_replace(target, writes=not dry_run, allow_outside=options.permissions.allow_outside)
    compiled = options.compile(
        profile,
        lock=earlier,
        use_vendored=not vendor,
        keeps_plan=keep and earlier is not None,
        checks_checkpoint=True,
        simulates=simulates,
    )
    plan = compiled.plan
    device_map = _device_map(compiled) if options.output_format == "device-map" else None
    # Before anything is printed: a reader that goes away, or a disk that is full, is no reason not to.
    written = [] if dry_run else write_results(compiled, target, with_graph=vendor)
    asked: dict[str, Any] = {} if plan.max_memory is None else {"max_memory": dict(plan.max_memory)}
    asked |= {} if (memory := compiled.process_memory) is None else {"process_memory": asdict(memory)}
    options.report(compiled.diagnostics, compiled.texts, {"plan": compiled.to_json(), **asked})
    if device_map is not None:
        print_json(device_map)
    elif options.shows_tables:
        print_lines(lambda width: (*plan_lines(compiled, width), *companion_lines(compiled)))
    if written and options.shows_tables:
        used = compiled.loaded.overrides
        again = ", ".join(f"{name}={used[name]}" for name in used if name not in options.variables)
        note = f", with {again} as before" if again else ""
        echo(f"wrote {' and '.join(map(str, written))}{note}", err=True)


def _device_map(compiled: Compiled) -> Mapping[str, int | str]:
    """Return the plan as a plain `device_map`.

    Raises:
        CommandError: if a `device_map` cannot express it.
    """
    from devmap_config.cli.reporting import echo
    from devmap_config.plan.plan import NotADeviceMapError

    try:
        device_map = compiled.plan.device_map
    except NotADeviceMapError as error:
        raise CommandError((*compiled.diagnostics, *error.diagnostics), compiled.texts) from None
    if compiled.plan.streams_buffers:
        echo("this plan offloads buffers too: pass `offload_buffers=True` with the map", err=True)
    return device_map
