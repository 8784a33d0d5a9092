"""`devmap simulate`: runs a plan's prefill and decode steps on simulated accelerators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE
from devmap_config.cli.reporting import echo, echo_lines

if TYPE_CHECKING:
    from pathlib import Path

    from devmap_config.compiler import Compiled
    from devmap_config.simulate.simulation import Simulation

MOST_DECODED = 1_000
"""The most tokens that are decoded: each is a forward of the whole model, and more show nothing new, but take
minutes.
"""


@profile_command("simulate", "table", "json", "trace")
@click.option(
    "--tokens",
    type=click.IntRange(1, MOST_DECODED),
    default=2,
    show_default=True,
    help="The number of tokens to decode after the prefill.",
)
@click.option("-o", "--output", type=FILE, metavar="FILE.json", help="Write the trace to this file. [default: stdout]")
def simulate(profile: Path, options: ProfileOptions, tokens: int, output: Path | None) -> ExitCode:
    """Run the plan of PROFILE on simulated accelerators, and show what each device holds and each link carries.

    With `--format trace`, print a predicted timeline of a prefill and of the tokens after it, for Perfetto.
    """
    from devmap_config.cli.locking import lock_warnings, write
    from devmap_config.cli.progress import stages_shown
    from devmap_config.cli.reporting import print_lines
    from devmap_config.cli.simulation_view import simulation_lines
    from devmap_config.compiler import Rejected
    from devmap_config.simulate.memory import can_simulate, simulation_of

    _require_trace(output, options)
    compilation = options.run_pipeline(profile, simulates=True)
    # A plan that does not run is shown up to its failure.
    if isinstance(compilation, Rejected):
        told, reached, tried = None, compilation.reached, compilation.refused
    else:
        told, reached, tried = compilation.to_json(), compilation, compilation.plan
    if tried is not None:
        tried.require_transformers()
    simulation = None
    if tried is not None and reached is not None and can_simulate():
        may_run_code = options.permissions.trust_remote_code
        with stages_shown(quiet=options.quiet):
            simulation = simulation_of(tried, reached.model, decoded_tokens=tokens, trust_remote_code=may_run_code)
    if options.output_format == "trace" and not isinstance(compilation, Rejected):
        trace = _trace(compilation, simulation, tokens)
        if output is None:
            echo_lines(trace)
        else:
            write(output, f"{trace}\n")
            if not options.quiet:
                echo(f"wrote {output}", err=True)
    data = {"plan": told, "simulation": simulation.to_json() if simulation else None}
    warnings = lock_warnings(profile, compilation, options)
    options.report((*compilation.diagnostics, *warnings), compilation.texts, data)
    if simulation is not None and reached is not None and tried is not None and options.shows_tables:
        print_lines(partial(simulation_lines, reached.model, tried, simulation))
    runs = simulation is None or simulation.mismatch is None
    return ExitCode.DONE if told is not None and runs else ExitCode.WRONG


def _require_trace(output: Path | None, options: ProfileOptions) -> None:
    """Refuse `--output` for anything other than a trace, or onto a file that is not one.

    Raises:
        click.UsageError: with the reason.
    """
    from devmap_config.cli.new_profile import require_new
    from devmap_config.plan.lock import LOCK_SUFFIX

    if output is None:
        return
    if options.output_format != "trace":
        raise click.UsageError("`-o` is where a trace is written: add `--format trace`")
    if output.suffix != ".json" or output.name.endswith(LOCK_SUFFIX):
        raise click.UsageError(f"`-o {output}`: name a file that ends in `.json`, and is no lock")
    require_new(output, force=True)


def _trace(compiled: Compiled, simulation: Simulation | None, tokens: int) -> str:
    """Return the trace of a plan.

    Raises:
        CommandError: if no times are known.
    """
    from devmap_config.cli.predictions import how_to_give, missing_in_words
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.simulate.trace import trace_of, trace_text

    plan, graph, inventory = compiled.plan, compiled.graph, compiled.inventory
    profile = compiled.loaded.profile
    if graph.measurement is None:
        message = "a trace shows when blocks run, and without a workload no times are predicted"
        help = "name what is to run: `workload: {context_length: 4096}`"
        missing = Diagnostic.error("missing-workload", message, profile.model.source.span, help=help)
    elif not graph.measurement.measured:
        message = "a trace shows when blocks run, and of a model that could not be measured no times are predicted"
        missing = Diagnostic.error("missing-figure", message, profile.model.source.span)
    elif plan.prediction.prefill_nanoseconds is None and plan.prediction.decode_nanoseconds_per_token is None:
        message = f"a trace shows when blocks run, and {missing_in_words(compiled.missing_figures)}"
        help = how_to_give(compiled.missing_figures, profile.hardware)
        missing = Diagnostic.error("missing-figure", message, profile.hardware.devices.key_span, help=help)
    else:
        name, unquantized = compiled.model.class_name, compiled.model.counts_quantized_weights
        return trace_text(
            trace_of(plan, graph, inventory, simulation, tokens=tokens, name=name, ran_unquantized=unquantized)
        )
    raise CommandError((*compiled.diagnostics, missing), compiled.texts)
