"""`devmap run`: loads a model by its lock, verifies it, and lets it speak."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from devmap_config.amounts import format_bytes
from devmap_config.cli.checking import LOCK_STATES
from devmap_config.cli.command import CommandError, ProfileOptions, profile_command
from devmap_config.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic, Sink
    from devmap_config.runner.runner import Deployment

EXIT_CODES: Mapping[Code, ExitCode] = {
    **dict.fromkeys(LOCK_STATES, ExitCode.STALE),
    "no-weights": ExitCode.WRONG,
    "no-text-input": ExitCode.WRONG,
    "compute-on-cpu": ExitCode.WRONG,
}
"""Exit codes by what went wrong; whatever is not here is the machine or the model not being what the lock says."""


@profile_command("run", "table", "json")
@click.option("--prompt", help="What the model goes on from; a few words of ours else.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=24, show_default=True, help="How much it writes.")
@click.option("--no-generate", is_flag=True, help="Load and verify only.")
@click.option("--no-probe", is_flag=True, help="Do not ask first whether this machine can carry the plan.")
def run(
    profile: Path, options: ProfileOptions, prompt: str | None, max_new_tokens: int, no_generate: bool, no_probe: bool
) -> None:
    """Load the model of PROFILE by its lock, verify where every tensor is, and generate."""
    from devmap_config.cli.progress import loading_shown, stages_shown
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.diagnostics.overheard import passing_on
    from devmap_config.runner.generation import demonstrate
    from devmap_config.runner.loading import show_progress
    from devmap_config.runner.runner import load_verified, notices, prepare

    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    sink = Sink()
    output = None
    with _failures_told(profile, sink, options), passing_on(sink):
        with stages_shown(quiet=not options.shows_tables):
            deployment = prepare(profile, **options.of_request)
        for notice in notices(deployment, asks_machine=not no_probe):
            sink.report(notice)
            if notice.code == "never-on-cards" and options.shows_tables:  # before anything is loaded, in its own line
                click.echo(notice.message, err=True)
        show_progress(sys.stderr.isatty() and options.shows_tables)
        with loading_shown(deployment.loaded_bytes, quiet=not options.shows_tables):
            model = load_verified(deployment)
        if not no_generate:
            output = demonstrate(model, deployment.request, prompt, sink, max_new_tokens=max_new_tokens)
    data = {
        "plan": deployment.plan.to_json(),
        "verified": deployment.unchecked is None,
        "unchecked": deployment.unchecked,
        "new_tensors": list(deployment.new),
        "output": output,
    }
    options.report(_to_tell(sink, options), {}, data)
    if options.output_format == "json":
        return
    if not options.quiet:
        click.echo(_summary(deployment), err=True)
    if output is not None:
        click.echo(output)


@contextmanager
def _failures_told(profile: Path, sink: Sink, options: ProfileOptions) -> Iterator[None]:
    """Raise as a `CommandError` why a model cannot be loaded or run, after what was found before."""
    from devmap_config.diagnostics.diagnostic import ProfileError
    from devmap_config.profile.document import whole_file
    from devmap_config.runner.loading import RunnerError, UnfitMachineError

    data = {"plan": None, "output": None}
    try:
        yield
    except ProfileError as error:
        raise CommandError(error.diagnostics, error.texts, data=data) from None
    except UnfitMachineError as error:
        raise CommandError(error.diagnostics, exit_code=ExitCode.UNLIKE_LOCK, data=data) from None
    except RunnerError as error:
        for finding in error.diagnostics:
            sink.report(replace(finding, span=finding.span or whole_file(str(profile))))
        exit_code = EXIT_CODES.get(error.code, ExitCode.UNLIKE_LOCK)
        raise CommandError(_to_tell(sink, options), exit_code=exit_code, data=data) from None


def _to_tell(sink: Sink, options: ProfileOptions) -> Iterable[Diagnostic]:
    """Return what is left to be told: on a terminal, all but what was said in a line of its own."""
    return sink if options.output_format == "json" else [each for each in sink if each.code != "never-on-cards"]


def _summary(deployment: Deployment) -> str:

    plan, new = deployment.plan, deployment.new
    tensors = sum(len(each.tensors) for each in plan.assignments)
    held = ", ".join(f"{use.id} {format_bytes(use.weights_bytes)}" for use in plan.devices if use.weights_bytes)
    where = f"{tensors} tensors where the lock says ({held})"
    if deployment.unchecked is not None:
        return f"loaded: {where}; whether they are from the checkpoint was not checked: {deployment.unchecked}"
    but = f", but for what is new on purpose: {', '.join(f'`{name}`' for name in new)}" if new else ""
    return f"loaded and verified: {where}, their weights from the checkpoint{but}"
