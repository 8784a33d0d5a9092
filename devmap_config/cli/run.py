"""`devmap run`: loads a model by its lock, verifies it, and generates."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import counted, format_bytes
from devmap_config.cli.command import ProfileOptions, profile_command
from devmap_config.cli.options import FILE
from devmap_config.cli.reporting import EscapedStream, echo
from devmap_config.cli.running import assisted, facts, failures_told, loaded, randomly_weighted, summary, to_tell
from devmap_config.devices import CPU
from devmap_config.files import is_folder
from devmap_config.wording import is_unicode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from devmap_config.runner.demonstration import Demonstration, Demonstrator
    from devmap_config.runner.generation_times import GenerationWorkload
    from devmap_config.runner.inputs import UserInput
    from devmap_config.runner.runner import Deployment
    from devmap_config.runner.usage import LoadCost


@profile_command("run", "table", "json")
@click.option("--prompt", help="The text to continue, or to answer. [default: a few words]")
@click.option(
    "--chat", is_flag=True, help="Chat by the model's template: one turn with `--prompt`, otherwise interactively."
)
@click.option("--image", type=FILE, help="An image file for the prompt.")
@click.option("--audio", type=FILE, help="A WAV file for the prompt.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="The most tokens to generate. [default: 24; 256 in a chat]"
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="Try the plan without a checkpoint: write one of random weights, load it, generate, and delete it.",
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Decode by compiled code; all of the model must be on one CUDA card, or in float32 on the CPU.",
)
@click.option("--no-generate", is_flag=True, help="Load and verify only.")
@click.option(
    "--receipt",
    type=FILE,
    help="Measure the profile's workload, and write the times and memory to this file beside the predicted ones.",
)
@click.option("--no-probe", is_flag=True, help="Do not check first that this machine can carry the plan.")
def run(
    profile: Path,
    options: ProfileOptions,
    prompt: str | None,
    chat: bool,
    image: Path | None,
    audio: Path | None,
    max_new_tokens: int | None,
    random_weights: bool,
    compiles: bool,
    no_generate: bool,
    receipt: Path | None,
    no_probe: bool,
) -> None:
    """Load the model of PROFILE by its lock, verify where every tensor is, and generate."""
    from devmap_config.cli.progress import stages_shown
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.diagnostics.overheard import passing_on
    from devmap_config.runner.demonstration import demonstrator, demonstrator_of_plan, planned_generation
    from devmap_config.runner.runner import prepare, require_model_alone

    _require_usable(prompt, receipt, options, chat=chat)
    if random_weights and (prompt or chat or image or audio):
        raise click.UsageError("random weights take no input: made-up tokens of the planned length are used")
    sink, outcome, shows = Sink(), None, None
    with failures_told(profile, sink, options), passing_on(sink):
        given = _user_input(prompt, image, audio, chat=chat)
        with stages_shown(quiet=not options.shows_tables):
            deployment = prepare(profile, **options.of_request, needs_weights=not random_weights)
        deployment = replace(deployment, compiles=compiles)
        if receipt is not None:
            require_model_alone(deployment, "a receipt covers only a model by itself")
        workload = deployment.compiled.loaded.profile.workload
        measurement = deployment.compiled.model.graph.measurement
        if not no_generate and random_weights:
            shows = demonstrator_of_plan(deployment.request, workload, measurement, sink, max_new_tokens=max_new_tokens)
        elif not no_generate:
            shows = demonstrator(deployment.request, workload, measurement, given, sink, max_new_tokens=max_new_tokens)
        if random_weights:
            deployment = click.get_current_context().with_resource(
                randomly_weighted(deployment, options, asks_machine=not no_probe)
            )
        model, load = loaded(deployment, options, sink, asks_machine=not no_probe)
    if options.output_format == "table":  # the findings so far, before text is streamed
        options.report(to_tell(sink, options), {}, {})
        sink = Sink()
    if options.shows_tables:
        echo(f"{summary(deployment)}; it took {load.seconds:.1f} s", err=True)
    if shows is not None:
        with failures_told(profile, sink, options), passing_on(sink), assisted(model, deployment):
            writes = options.output_format == "table" and not random_weights
            outcome = _demonstrated(replace(shows, sink=sink), model, given, writes=writes)
    figures = _figures(outcome, deployment, load.seconds)
    output = None if outcome is None or random_weights else outcome.output.value
    if receipt is not None:
        with failures_told(profile, sink, options), passing_on(sink):
            decodes = deployment.compiled.model.graph.decodes
            generates = (
                None if no_generate else planned_generation(workload, max_new_tokens, measurement, decodes=decodes)
            )
            _write_receipt(receipt, deployment, model, load, generates)
    options.report(to_tell(sink, options), {}, {**facts(deployment), "output": output, **figures})
    if options.shows_tables:
        for line in (*_figure_lines(figures), *(() if receipt is None else (f"wrote {receipt}",))):
            echo(line, err=True)


MEASURED_ROUNDS = 3
"""The number of measurements for a receipt."""


def _write_receipt(
    path: Path, deployment: Deployment, model: Any, load: LoadCost, generates: GenerationWorkload | None
) -> None:
    """Measure what the model `generates`, and write the predictions beside the measurements."""
    from devmap_config.runner.demonstration import measured_generation
    from devmap_config.runner.receipt_writing import receipt_of, write_receipt
    from devmap_config.runner.usage import process_watched, reset_peaks

    command = f"devmap run {deployment.compiled.loaded.path.name} --receipt {path.name}"
    command += " --random-weights" if deployment.has_random_weights else ""
    command += " --compile" if deployment.compiles else ""
    command += " --no-generate" if generates is None else f" --max-new-tokens {generates.new_tokens}"
    generation = None
    with process_watched() as process:
        if generates is not None:
            reset_peaks(deployment.plan)
            generation = measured_generation(model, deployment.request, generates, rounds=MEASURED_ROUNDS)
    write_receipt(path, receipt_of(deployment, model, load, generation, process, command=command))


def _require_usable(prompt: str | None, receipt: Path | None, options: ProfileOptions, *, chat: bool) -> None:
    if receipt is not None and not is_folder(receipt.parent):
        raise click.UsageError(f"there is no folder `{receipt.parent}` for the receipt")
    if receipt is not None and is_folder(receipt):
        raise click.UsageError(f"`{receipt}` is a folder: name the receipt's file")
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    if prompt is not None and not is_unicode(prompt):
        raise click.UsageError(f"the prompt is not UTF-8: `{prompt}`")
    if chat and prompt is None and options.output_format == "json":
        raise click.UsageError("`--format json` prints one answer: give the prompt with `--prompt`")


def _user_input(prompt: str | None, image: Path | None, audio: Path | None, *, chat: bool) -> UserInput:
    """Return the input for the model; a chat that has not begun has an empty message."""
    from devmap_config.files import FileError
    from devmap_config.runner.inputs import UserInput
    from devmap_config.runner.media import read_image, read_sound

    media: dict[str, Any] = {}
    for name, path, read in (("images", image, read_image), ("sounds", audio, read_sound)):
        try:
            media[name] = () if path is None else (read(path),)
        except FileError as error:
            raise click.UsageError(f"`{path}` {error}: {error.help}") from None
    return UserInput(prompt=prompt, messages=({"role": "user", "content": prompt or ""},) if chat else (), **media)


def _demonstrated(shows: Demonstrator, model: Any, given: UserInput, *, writes: bool) -> Demonstration | None:
    """Return the model's output, the last one of a chat, and write text to stdout as it is generated."""
    escaped = EscapedStream(sys.stdout)  # while a model runs, other output to stdout goes to stderr

    def write(text: str) -> None:
        if writes:
            escaped.write(text)

    def show(given: UserInput) -> Demonstration:
        outcome = shows.show(model, given, write)
        write("" if outcome.output.text.endswith("\n") else "\n")
        return outcome

    if not given.messages or given.prompt is not None:
        return show(given)
    messages: tuple[Mapping[str, str], ...] = ()
    outcome = None
    for text in _turns():
        messages = (*messages, {"role": "user", "content": text})
        before, outcome = outcome, show(replace(given, messages=messages))
        messages = (*messages, {"role": "assistant", "content": outcome.output.text})
        if before is not None and before.speed is not None and outcome.speed is not None:
            seconds = before.seconds + outcome.seconds
            outcome = replace(outcome, seconds=seconds, speed=before.speed + outcome.speed)
    return outcome


def _turns() -> Iterator[str]:
    """Yield the user's input line by line."""
    question = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            text = input(question)
        except EOFError:
            if question:
                echo("", err=True)
            return
        if text.strip():
            yield text


def _figures(outcome: Demonstration | None, deployment: Deployment, load_seconds: float) -> dict[str, Any]:
    """Return the measurements by their names in `--format json`; `None` without an output."""
    from devmap_config.runner.usage import memory_use

    speed = None if outcome is None else outcome.speed
    names = ("prompt_tokens", "tokens", "first_token_seconds", "tokens_per_second")
    return {
        "load_seconds": load_seconds,
        "seconds": None if outcome is None else outcome.seconds,
        **{name: getattr(speed, name, None) for name in names},
        "memory": [
            {"device": str(use.device), "peak_bytes": use.peak_bytes, "planned_bytes": use.planned_bytes}
            for use in memory_use(deployment.plan)
        ],
    }


def _figure_lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield the measurements as lines for people."""
    if figures["tokens"] is not None:
        first, rate = figures["first_token_seconds"], f"{figures['tokens_per_second']:.1f} tokens a second"
        apart = "" if first is None else f"the first after {first:.2f} s, then "
        prompt = f"after a prompt of {figures['prompt_tokens']:,}"
        yield f"{counted(figures['tokens'], 'token')} {prompt} in {figures['seconds']:.2f} s: {apart}{rate}"
    elif figures["seconds"] is not None:
        yield f"one forward in {figures['seconds']:.2f} s"
    process = {str(CPU): ("this process", " for the model")}
    parts = []
    for use in figures["memory"]:
        holder, of_what = process.get(use["device"], (use["device"], ""))
        planned = f"planned{of_what} {format_bytes(use['planned_bytes'])}"
        parts.append(f"{holder} {format_bytes(use['peak_bytes'])} ({planned})")
    if parts:
        yield f"memory at most: {', '.join(parts)}"
