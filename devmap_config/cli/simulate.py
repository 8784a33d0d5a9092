"""`devmap simulate`: a plan's forward and decode steps on simulated accelerators."""

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


@click.command("simulate")
@profile_argument
@click.option(
    "--tokens", type=click.IntRange(min=1), default=2, show_default=True, help="How many are decoded after the prefill."
)
@format_option("table", "json")
@set_option
@quiet_option
@outside_option
@remote_code_option
@unmeasured_option
def simulate(
    profile: Path,
    tokens: int,
    output_format: str,
    variables: dict[str, str],
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> int:
    """Run the plan of PROFILE on simulated accelerators: what each device holds, and what goes from one to another."""
    from rich.console import Console

    from devmap_config.cli.reporting import report
    from devmap_config.cli.simulation_view import simulation_lines
    from devmap_config.compiler import Rejected, Request, run_pipeline
    from devmap_config.simulate.memory import can_simulate, simulation_of

    compilation = run_pipeline(
        Request.for_profile(
            profile,
            variables=variables,
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
            allow_unmeasured=allow_unmeasured,
            simulates=True,
        )
    )
    # A plan that does not run is shown as far as it came.
    if isinstance(compilation, Rejected):
        plan, reached, tried = None, compilation.reached, compilation.refused
    else:
        plan, reached, tried = compilation.plan, compilation, compilation.plan
    simulation = None
    if tried is not None and reached is not None and can_simulate():
        simulation = simulation_of(tried, reached.model, decoded_tokens=tokens, trust_remote_code=trust_remote_code)
    data = {
        "plan": plan.to_json() if plan else None,
        "simulation": simulation.to_json() if simulation else None,
    }
    report(compilation.diagnostics, compilation.texts, output_format, quiet=quiet, data=data)
    if simulation is not None and reached is not None and tried is not None and output_format == "table" and not quiet:
        console = Console(highlight=False)
        for line in simulation_lines(reached.model, tried, simulation, console.width):
            console.print(line)
    runs = simulation is None or simulation.mismatch is None
    return 0 if plan is not None and runs else 1
