"""The common parts of commands that load a model by its lock: loading, progress, warnings and failures."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes
from devmap_config.cli.checking import LOCK_STATES
from devmap_config.cli.command import CommandError
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.reporting import echo

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.cli.command import ProfileOptions
    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic, Sink
    from devmap_config.runner.runner import Deployment
    from devmap_config.runner.usage import LoadCost

EXIT_CODES: Mapping[Code, ExitCode] = {
    **dict.fromkeys(LOCK_STATES, ExitCode.STALE),
    "no-weights": ExitCode.WRONG,
    "no-text-input": ExitCode.WRONG,
    "no-chat-template": ExitCode.WRONG,
    "no-processor": ExitCode.WRONG,
    "pillow-missing": ExitCode.WRONG,
    "unfit-input": ExitCode.WRONG,
    "compute-on-cpu": ExitCode.WRONG,
    "beyond-context": ExitCode.WRONG,
    "no-tokenizer": ExitCode.WRONG,
    "server-missing": ExitCode.WRONG,
    "bad-adapter": ExitCode.WRONG,
    "unfit-adapter": ExitCode.WRONG,
    "peft-missing": ExitCode.WRONG,
}
"""Exit codes by diagnostic; for all others, the machine or the model differs from the lock."""


@contextmanager
def randomly_weighted(deployment: Deployment, options: ProfileOptions, *, asks_machine: bool) -> Iterator[Deployment]:
    """Yield a deployment with random weights, and show the progress of writing; the machine may be checked first."""
    from devmap_config.cli.progress import transfer_shown
    from devmap_config.runner.random_weights import with_random_weights
    from devmap_config.runner.runner import require_fit_machine

    if asks_machine:
        require_fit_machine(deployment)
    with ExitStack() as shown:
        transfer = shown.enter_context(transfer_shown("writing random weights", quiet=not options.shows_tables))
        with with_random_weights(deployment, transfer.expect, transfer.advance) as random:
            shown.close()
            yield random


def loaded(deployment: Deployment, options: ProfileOptions, sink: Sink, *, asks_machine: bool) -> tuple[Any, LoadCost]:
    """Load and verify the model, and return it with the cost of loading."""
    from devmap_config.cli.progress import loading_shown
    from devmap_config.runner.loading import show_progress
    from devmap_config.runner.runner import load_verified, notices
    from devmap_config.runner.usage import LoadCost, peaks, process_bytes

    for notice in notices(deployment, asks_machine=asks_machine):
        sink.report(notice)
        if notice.code == "never-on-cards" and options.shows_tables:  # printed before loading, in its own line
            echo(notice.message, err=True)
    show_progress(sys.stderr.isatty() and options.shows_tables)
    start_seconds, held_bytes = time.perf_counter(), process_bytes()
    with loading_shown(deployment.loaded_bytes, quiet=not options.shows_tables):
        model = load_verified(deployment)
    seconds = time.perf_counter() - start_seconds
    return model, LoadCost(seconds=seconds, process_bytes=held_bytes, peak_bytes=peaks(deployment.plan))


@contextmanager
def failures_told(profile: Path, sink: Sink, options: ProfileOptions) -> Iterator[None]:
    """Turn errors of loading and running into `CommandError`, after the earlier findings."""
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
        raise CommandError(to_tell(sink, options), exit_code=exit_code, data=data) from None


@contextmanager
def assisted(model: Any, deployment: Deployment) -> Iterator[None]:
    """Load the draft model of a profile, if there is one, and have the model generate with it while the context
    lasts.
    """
    from devmap_config.runner.runner import load_draft, with_draft

    without_draft = vars(model).get("generate")  # one that gives it the planned cache, or none of its own
    with_draft(model, load_draft(deployment))
    try:
        yield
    finally:
        vars(model).pop("generate", None)
        if without_draft is not None:
            model.generate = without_draft


def to_tell(sink: Sink, options: ProfileOptions) -> Iterable[Diagnostic]:
    """Return the findings to print; on a terminal, without the one that was printed in its own line."""
    return (
        sink if options.output_format == "json" else [finding for finding in sink if finding.code != "never-on-cards"]
    )


def facts(deployment: Deployment) -> dict[str, Any]:
    """Return the facts about a loaded model for `--format json`."""
    return {
        "plan": deployment.compiled.to_json(),
        "verified": deployment.unchecked is None,
        "unchecked": deployment.unchecked,
        "new_tensors": list(deployment.new),
    }


def summary(deployment: Deployment) -> str:
    """Return a summary of the loaded model for people."""
    plan, new = deployment.plan, deployment.new
    tensors = sum(len(assignment.tensors) for assignment in plan.assignments)
    held = ", ".join(f"{use.id} {format_bytes(use.weights_bytes)}" for use in plan.devices if use.weights_bytes)
    where = f"{tensors} tensors where the lock says ({held})"
    if deployment.has_random_weights:
        return f"loaded random weights: {where}"
    if deployment.unchecked is not None:
        return f"loaded: {where}; whether they are from the checkpoint was not checked: {deployment.unchecked}"
    but = f", but for what is new on purpose: {', '.join(f'`{name}`' for name in new)}" if new else ""
    adapter = "" if deployment.compiled.model.adapter is None else " and the adapter"
    return f"loaded and verified: {where}, their weights from the checkpoint{adapter}{but}"
