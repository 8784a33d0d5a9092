"""`devmap run`: loads a model by its lock, verifies it, and lets it speak."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import format_bytes
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

    from devmap_config.diagnostics.diagnostic import Diagnostic, Sink
    from devmap_config.runner.loading import RunnerError
    from devmap_config.runner.runner import Deployment

EXIT_CODES = {
    "missing-lock": 3,
    "stale-lock": 3,
    "unreadable-lock": 3,
    "newer-lock": 3,
    "broken-lock": 3,
    "no-weights": 1,
    "no-text-input": 1,
    "compute-on-cpu": 1,
}
"""Exit codes by what went wrong; whatever is not here is the machine or the model not being what the lock says."""

EXIT_UNLIKE_LOCK = 4

SAID_AGAIN = ("untried-version", "library-changed", "measuring-failed", "figures-moved", "remote-code")
"""What is said again where a plan is run, of its libraries and of code that comes with the model."""


@click.command("run")
@profile_argument
@click.option("--prompt", default="A model is placed", show_default=True, help="What the model goes on from.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=24, show_default=True, help="How much it writes.")
@click.option("--no-generate", is_flag=True, help="Load and verify only.")
@click.option("--no-probe", is_flag=True, help="Do not ask first whether this machine can carry the plan.")
@format_option("table", "json")
@set_option
@quiet_option
@outside_option
@remote_code_option
@unmeasured_option
def run(
    profile: Path,
    prompt: str,
    max_new_tokens: int,
    no_generate: bool,
    no_probe: bool,
    output_format: str,
    variables: dict[str, str],
    quiet: bool,
    allow_outside: bool,
    trust_remote_code: bool,
    allow_unmeasured: bool,
) -> int:
    """Load the model of PROFILE by its lock, verify where every tensor is, and generate."""
    from devmap_config.cli.reporting import report
    from devmap_config.diagnostics.diagnostic import ProfileError, Sink
    from devmap_config.runner.loading import RunnerError, UnfitMachineError, show_progress
    from devmap_config.runner.overheard import passing_on
    from devmap_config.runner.runner import load_verified, prepare, require_fit_machine

    if not prompt.strip():
        raise click.UsageError("the prompt is empty")
    sink = Sink()
    try:
        deployment = prepare(
            profile,
            variables=variables,
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
            allow_unmeasured=allow_unmeasured,
        )
        for finding in deployment.compiled.diagnostics:
            if finding.code in SAID_AGAIN:
                sink.report(finding)
        if deployment.left_out is not None:
            sink.warning("unexpected-tensors", f"the checkpoint holds more than is loaded: {deployment.left_out}")
        if not no_probe:
            for finding in require_fit_machine(deployment):
                sink.report(finding)
        _tell_if_untried(deployment, sink, quiet=quiet or output_format == "json")
        show_progress(sys.stderr.isatty() and not quiet and output_format != "json")
        with passing_on(sink):
            model = load_verified(deployment)
            output = None if no_generate else _speak(model, deployment, prompt, max_new_tokens, sink)
    except ProfileError as error:
        report(error.diagnostics, error.texts, output_format, quiet=quiet, data={"plan": None, "output": None})
        return 1
    except UnfitMachineError as error:
        report(error.diagnostics, {}, output_format, quiet=quiet, data={"plan": None, "output": None})
        return EXIT_UNLIKE_LOCK
    except RunnerError as error:
        return _report_failure(error, profile, sink, output_format, quiet=quiet)
    if output_format == "json":
        data = {
            "plan": deployment.plan.to_json(),
            "verified": deployment.unchecked is None,
            "unchecked": deployment.unchecked,
            "new_tensors": list(deployment.new),
            "output": output,
        }
        report(sink, {}, "json", data=data)
        return 0
    report(_in_full(sink), {}, output_format, quiet=quiet)
    if not quiet:
        click.echo(_summary(deployment), err=True)
    if output is not None:
        click.echo(output)
    return 0


def _speak(model: Any, deployment: Deployment, prompt: str, max_new_tokens: int, sink: Sink) -> str:
    from devmap_config.runner.generation import demonstrate

    return demonstrate(model, deployment.request, prompt, sink, max_new_tokens=max_new_tokens)


def _summary(deployment: Deployment) -> str:

    plan, new = deployment.plan, deployment.new
    tensors = sum(len(each.tensors) for each in plan.assignments)
    held = ", ".join(f"{use.id} {format_bytes(use.weights_bytes)}" for use in plan.devices if use.weights_bytes)
    where = f"{tensors} tensors where the lock says ({held})"
    if deployment.unchecked is not None:
        return f"loaded: {where}; whether they are from the checkpoint was not checked: {deployment.unchecked}"
    but = f", but for what is new on purpose: {', '.join(f'`{name}`' for name in new)}" if new else ""
    return f"loaded and verified: {where}, their weights from the checkpoint{but}"


def _tell_if_untried(deployment: Deployment, sink: Sink, *, quiet: bool) -> None:
    """Say in one line, before anything is loaded, where what is promised of a card was never seen on one."""
    from devmap_config.runner.receipts import NEVER_RUN, runs_untried

    if not runs_untried(deployment.plan):
        return
    sink.warning("never-on-cards", NEVER_RUN)
    if not quiet:
        click.echo(NEVER_RUN, err=True)


def _in_full(sink: Sink) -> list[Diagnostic]:
    """What is left to be told on a terminal: all but what was said in a line of its own."""
    return [each for each in sink if each.code != "never-on-cards"]


def _report_failure(error: RunnerError, profile: Path, sink: Sink, output_format: str, *, quiet: bool) -> int:
    from dataclasses import replace

    from devmap_config.cli.reporting import report
    from devmap_config.profile.document import whole_file

    place = whole_file(str(profile))
    for finding in error.diagnostics:
        sink.report(replace(finding, span=finding.span or place))
    found = sink if output_format == "json" else _in_full(sink)
    report(found, {}, output_format, quiet=quiet, data={"plan": None, "output": None})
    return EXIT_CODES.get(error.code, EXIT_UNLIKE_LOCK)
