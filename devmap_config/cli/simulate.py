"""`devmap simulate`: a plan's forward and decode steps on simulated accelerators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from pathlib import Path


MOST_DECODED = 1_000
"""Each is a forward of the whole model: more of them show nothing else, and take minutes."""


@profile_command("simulate", "table", "json")
@click.option(
    "--tokens",
    type=click.IntRange(1, MOST_DECODED),
    default=2,
    show_default=True,
    help="How many are decoded after the prefill.",
)
def simulate(profile: Path, options: ProfileOptions, tokens: int) -> ExitCode:
    """Run the plan of PROFILE on simulated accelerators: what each device holds, and what goes from one to another."""
    from devmap_config.cli.progress import stages_shown
    from devmap_config.cli.reporting import print_lines
    from devmap_config.cli.simulation_view import simulation_lines
    from devmap_config.compiler import Rejected
    from devmap_config.simulate.memory import can_simulate, simulation_of

    compilation = options.run_pipeline(profile, simulates=True)
    # A plan that does not run is shown as far as it came.
    if isinstance(compilation, Rejected):
        plan, reached, tried = None, compilation.reached, compilation.refused
    else:
        plan, reached, tried = compilation.plan, compilation, compilation.plan
    if tried is not None:
        tried.require_transformers()
    simulation = None
    if tried is not None and reached is not None and can_simulate():
        may_run_code = options.permissions.trust_remote_code
        with stages_shown(quiet=options.quiet):
            simulation = simulation_of(tried, reached.model, decoded_tokens=tokens, trust_remote_code=may_run_code)
    data = {"plan": plan.to_json() if plan else None, "simulation": simulation.to_json() if simulation else None}
    options.report(compilation.diagnostics, compilation.texts, data)
    if simulation is not None and reached is not None and tried is not None and options.shows_tables:
        print_lines(partial(simulation_lines, reached.model, tried, simulation))
    runs = simulation is None or simulation.mismatch is None
    return ExitCode.DONE if plan is not None and runs else ExitCode.WRONG
