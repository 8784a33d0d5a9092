"""`devmap report`: writes plans as a self-contained page, and the picture of a plan as SVG."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from devmap_config.cli.command import CommandError, Mistakes, ProfileOptions, profile_command
from devmap_config.cli.options import FILE
from devmap_config.cli.reporting import echo

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.compiler import Compiled

PROFILES = click.argument("profiles", metavar="PROFILE…", type=FILE, nargs=-1, required=True)


@profile_command("report", "table", "json", argument=PROFILES)
@click.option("-o", "--output", type=FILE, metavar="FILE.html", help="Write the page to this file.")
@click.option("--svg", type=FILE, metavar="FILE.svg", help="Write the picture of the first PROFILE alone to this file.")
@click.option("--against", metavar="A", help="Also show the differences from A: a profile, a lock or a git revision.")
@click.option(
    "--receipt",
    "receipts",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Also show what a run took, from a receipt of `devmap run`.",
)
def report(
    profiles: tuple[Path, ...],
    options: ProfileOptions,
    output: Path | None,
    svg: Path | None,
    against: str | None,
    receipts: tuple[Path, ...],
) -> None:
    """Make a page about the plans of PROFILE: the place of everything, the use of devices and links, and the reasons.

    The page needs no network. It shows the differences between two profiles, or between one and the side given by
    `--against`. The plan of a profile is its lock's or, if that does not hold, the one that the profile compiles to
    now.
    """
    from devmap_config.cli.locking import write
    from devmap_config.cli.profiles import profiles_named
    from devmap_config.cli.receipts import cases_in
    from devmap_config.cli.reporting import own_version
    from devmap_config.plan.lock import profile_of
    from devmap_config.report.page import page_of, svg_of

    _require_suffix(output, ".html", "-o")
    _require_suffix(svg, ".svg", "--svg")
    if output is None and svg is None and options.output_format != "json":
        raise click.UsageError("name a file for the page (`-o plan.html`) or for the picture (`--svg plan.svg`)")
    named = profiles_named(profiles)
    if not named:
        raise click.UsageError(f"there is no profile in {' or '.join(f'`{profile}`' for profile in profiles)}")
    mistakes = Mistakes()
    cases: list[dict[str, Any]] = []
    for path in receipts:
        with mistakes.collected():
            cases += map(asdict, cases_in(path))
    sides = _sides(named, against)
    reports: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for path in named:
        with mistakes.collected():
            told, its_texts = _report_data(profile_of(path), options)
            reports.append(told)
            texts |= its_texts
    diff: dict[str, Any] | None = None
    if sides is not None:
        with mistakes.collected():
            diff = _difference(*sides, options)
    mistakes.raise_any()
    written = []
    if output is not None:
        page = page_of(reports, diff=diff, sides=sides or ("", ""), cases=cases, version=own_version())
        write(output, page)
        written.append(output)
    if svg is not None:
        write(svg, svg_of(reports[0]))
        written.append(svg)
    data = {"plan": reports[0]["plan"], "reports": reports, "diff": diff, "cases": cases}
    options.report((), texts, {**data, "written": [str(path) for path in written]})
    if written and options.shows_tables:
        echo(f"wrote {' and '.join(map(str, written))}", err=True)


def _require_suffix(path: Path | None, suffix: str, option: str) -> None:
    """Refuse to overwrite a file that may be a profile.

    Raises:
        click.UsageError: if the path has another suffix, or is not a file.
    """
    from devmap_config.cli.new_profile import require_new

    if path is not None and path.suffix != suffix:
        raise click.UsageError(f"`{option} {path}`: name a file that ends in `{suffix}`")
    require_new(path, force=True)


def _sides(profiles: tuple[Path, ...], against: str | None) -> tuple[str, str] | None:
    """Return the two sides of a comparison: a profile and `against`, or two profiles."""
    if against is not None:
        return against, str(profiles[0])
    return (str(profiles[0]), str(profiles[1])) if len(profiles) == 2 else None


def _difference(before: str, after: str, options: ProfileOptions) -> dict[str, Any]:
    """Return the difference between two plans, in the form of `devmap diff --format json`."""
    from devmap_config.cli.sides import difference_of, sides_of

    return difference_of(sides_of(before, after, options.permissions)).to_json()


def _report_data(profile: Path, options: ProfileOptions) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the combined output of commands on a profile with `--format json`, and the texts of its files.

    Raises:
        CommandError: if the profile is wrong or cannot be satisfied.
    """
    from devmap_config.cli.explain import story, waits
    from devmap_config.cli.progress import stages_shown
    from devmap_config.diagnostics.structured import diagnostics_to_json
    from devmap_config.plan.pipelines import sent_bytes
    from devmap_config.plan.runs import runs_of
    from devmap_config.simulate.memory import can_simulate, simulation_of

    compiled, lock = _compiled(profile, options)
    plan, graph = compiled.plan, compiled.graph
    simulation = None
    if plan.pipeline is None and can_simulate():
        may_run_code = options.permissions.trust_remote_code
        with stages_shown(quiet=options.quiet):
            ran = simulation_of(plan, compiled.model, decoded_tokens=2, trust_remote_code=may_run_code)
        simulation = {key: value for key, value in ran.to_json().items() if key != "calls"}
    data = {
        "profile": str(profile),
        "lock": lock,
        "plan": compiled.to_json(),
        "hardware": compiled.inventory.accelerators_to_json(),
        "workload": None if graph.measurement is None else graph.measurement.workload.to_json(),
        "explanation": list(story(compiled)),
        "runs": [{**run.to_json(), **_reasons(compiled, run.first)} for run in runs_of(plan, graph)],
        "waits": waits(compiled),
        "simulation": simulation,
        "sent_bytes": None if plan.pipeline is None else sent_bytes(compiled),
        "diagnostics": diagnostics_to_json(compiled.diagnostics),
    }
    return data, dict(compiled.texts)


def _reasons(compiled: Compiled, module: str) -> dict[str, Any]:
    """Return why a module is on its device, and the costs of other places, in the form of `devmap explain`."""
    from pydantic_core import to_jsonable_python

    from devmap_config.cli.explain import alternatives_of, why
    from devmap_config.plan.explanation import placed_with

    others: list[dict[str, Any]] = []
    if compiled.plan.pipeline is None:  # parts of a pipeline cannot move while everything else stays
        others = to_jsonable_python(alternatives_of(compiled, module), fallback=str)
    block = placed_with(compiled.plan, compiled.graph, module)
    return {"why": list(why(compiled, module)), "block": block, "alternatives": others}


def _compiled(profile: Path, options: ProfileOptions) -> tuple[Compiled, str | None]:
    """Return the plan of a profile's lock or, if that does not hold, the new plan and the reason."""
    from devmap_config.cli.progress import stages_shown
    from devmap_config.compiler import Rejected
    from devmap_config.locked import compile_locked
    from devmap_config.plan.lock import LockError, lock_at, lock_path

    path, lock, problem = lock_path(profile), None, None
    try:
        lock = lock_at(path, allow_outside=options.permissions.allow_outside)
    except LockError as error:
        problem = str(error)
    with stages_shown(quiet=options.quiet):
        compilation, drift = compile_locked(profile, lock, simulates=True, **options.of_request)
    if isinstance(compilation, Rejected):
        raise CommandError(compilation.diagnostics, compilation.texts)
    problem = problem if drift is None else drift.message
    reason = None if problem is None else f"This is what the profile asks for now: {path.name} {problem}."
    return compilation, reason
