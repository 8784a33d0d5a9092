"""`devmap bench`: measures a plan beside plain transformers on the same machine, in one run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import counted, format_bytes, format_duration, format_durations
from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.running import failures_told, randomly_weighted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from rich.table import Table

    from devmap_config.runner.benchmark import Benchmark, Measured, Phase
    from devmap_config.runner.runner import Deployment


@profile_command("bench", "table", "json")
@click.option("--rounds", type=click.IntRange(min=2), default=4, show_default=True, help="The number of rounds.")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    help="The number of tokens to generate in each round, as far as the plan has room. [default: 24]",
)
@click.option("--random-weights", is_flag=True, help="Use random weights in place of a checkpoint.")
def bench(
    profile: Path, options: ProfileOptions, rounds: int, new_tokens: int | None, random_weights: bool
) -> ExitCode:
    """Measure loading, prefill and decoding of PROFILE's plan, beside plain transformers.

    The model is loaded by its lock, and by `device_map="auto"` with as much room for weights on each device; without
    accelerators by `device_map="cpu"` too. The loaders take turns, each in a process of its own. A ratio is a loader's
    time divided by the plan's; if two measurements of the same loader differ by more than 10 %, it is `too noisy`.
    """
    from devmap_config.cli.progress import progress, stages_shown
    from devmap_config.cli.reporting import print_lines
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.diagnostics.overheard import passing_on
    from devmap_config.runner.benchmark import jobs_of, run_benchmark
    from devmap_config.runner.demonstration import planned_generation, require_fit_class, warn_of_text_only
    from devmap_config.runner.inputs import UserInput
    from devmap_config.runner.runner import notices, prepare, require_model_alone

    sink = Sink()
    with failures_told(profile, sink, options), passing_on(sink):
        with stages_shown(quiet=not options.shows_tables):
            deployment = prepare(profile, **options.of_request, needs_weights=not random_weights)
        require_model_alone(deployment, "plain transformers, which the plan is compared with, loads a model alone")
        workload, graph = deployment.compiled.loaded.profile.workload, deployment.compiled.model.graph
        generation = planned_generation(workload, new_tokens, graph.measurement, decodes=graph.decodes)
        if generation.prompts.besides is None:
            require_fit_class(deployment.request, UserInput())
        warn_of_text_only(graph.measurement, sink)
        sink.report_all(notices(deployment, asks_machine=True))
        if random_weights:
            deployment = click.get_current_context().with_resource(
                randomly_weighted(deployment, options, asks_machine=False)
            )
    jobs = jobs_of(deployment, profile, **options.of_request, generation=generation)
    with progress(rounds * len(jobs) + 1, quiet=options.quiet) as begun:
        benchmark = run_benchmark(jobs, rounds=rounds, begun=begun)
    if (failure := benchmark.plan.failure) is not None:
        sink.error("load-failed" if failure.doing == "loading" else "forward-failed", f"the plan: {failure}")
    options.report(sink, {}, {"plan": deployment.compiled.to_json(), "benchmark": benchmark.to_json()})
    if options.shows_tables:
        print_lines(lambda width: _lines(benchmark, deployment, width))
    if failure is not None:
        return ExitCode.UNLIKE_LOCK
    return ExitCode.TOO_NOISY if benchmark.is_too_noisy else ExitCode.DONE


TITLES: dict[Phase, str] = {"load": "load", "prefill": "prefill", "decode": "a token"}

WIDE = 70
"""The columns of a terminal that has room for the spread of ratios."""


def _lines(benchmark: Benchmark, deployment: Deployment, width: int) -> Iterator[str | Table]:
    """Yield what was measured, the measurements, and the loaders that failed."""
    from devmap_config.cli.plan_table import media_in_words, weights_in_words
    from devmap_config.cli.predictions import bases_in_words, predicted

    prompts, new_tokens = benchmark.generation.prompts, benchmark.generation.new_tokens
    model = deployment.compiled.model
    measurement = model.graph.measurement
    yield f"{model.class_name}: {weights_in_words(model, deployment.plan)}"
    rounds = counted(benchmark.rounds, "round")
    written = f", {new_tokens:,} written" if new_tokens else ""
    yield f"batch {prompts.batch_size}, {counted(prompts.length, 'token')} prefilled{written}; {rounds}"
    if measurement is not None and (media := media_in_words(measurement)):
        yield media
    yield _table(
        benchmark, ("median", "spread", "× plan", "spread") if width >= WIDE else ("median", "spread", "× plan")
    )
    for result in benchmark.results:
        held = f"at most {_amounts(result.peak_bytes)}"
        yield f"{result.loader}: {held if result.failure is None else result.failure}"
    if bases := deployment.compiled.time_bases:
        yield f"{predicted(deployment.plan)}, for the workload of the profile"
        yield bases_in_words(bases, deployment.plan.prediction)
    yield f"auto was given as much room for weights as the plan has: {_amounts(benchmark.max_memory)}"
    if benchmark.is_too_noisy:
        yield "too noisy: the same, measured twice, differed by so many times; end what else runs, or add `--rounds`"


def _amounts(by_device: Mapping[Any, int]) -> str:
    return ", ".join(f"{format_bytes(size_bytes)} of {device}" for device, size_bytes in by_device.items())


def _table(benchmark: Benchmark, figures: tuple[str, ...]) -> Table:
    """Return a row for each phase of each loader: its median with the spread, and the ratio to the plan's."""
    from devmap_config.cli.tables import new_table

    table = new_table("phase", "by", figures=figures)
    for phase, title in TITLES.items():
        rows = [_cells(benchmark, result, phase) for result in benchmark.results if result.seconds(phase)]
        for number, cells in enumerate(rows):
            table.add_row("" if number else title, *cells[: 1 + len(figures)])
    return table


def _cells(benchmark: Benchmark, result: Measured, phase: Phase) -> tuple[str, ...]:
    seconds = sorted(round(time * 1e9) for time in result.seconds(phase))
    cells = (result.loader, format_duration(round(median(seconds))), format_durations(seconds[0], seconds[-1]))
    ratio = benchmark.ratio(result, phase)
    if ratio is None:
        return cells
    if ratio.is_too_noisy:
        return (*cells, "too noisy", f"{ratio.noise:.2f}×")
    return (*cells, f"{ratio.median:.2f}", f"{ratio.least:.2f}–{ratio.most:.2f}")
