"""What commands have in common that load a model by its lock: random weights, and failures with their exit codes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.cli.checking import LOCK_STATES
from devmap_config.cli.command import CommandError
from devmap_config.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.cli.command import ProfileOptions
    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic, Sink
    from devmap_config.runner.runner import Deployment

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
}
"""Exit codes by what went wrong; whatever is not here is the machine or the model not being what the lock says."""


@contextmanager
def randomly_weighted(deployment: Deployment, options: ProfileOptions) -> Iterator[Deployment]:
    """Give a deployment with random weights, and show how many are written."""
    from devmap_config.cli.progress import transfer_shown
    from devmap_config.runner.random_weights import with_random_weights

    with ExitStack() as shown:
        transfer = shown.enter_context(transfer_shown("writing random weights", quiet=not options.shows_tables))
        with with_random_weights(deployment, transfer.expect, transfer.advance) as random:
            shown.close()
            yield random


@contextmanager
def failures_told(profile: Path, sink: Sink, options: ProfileOptions) -> Iterator[None]:
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
        raise CommandError(to_tell(sink, options), exit_code=exit_code, data=data) from None


def to_tell(sink: Sink, options: ProfileOptions) -> Iterable[Diagnostic]:
    """Return what is left to be told: on a terminal, all but what was said in a line of its own."""
    return sink if options.output_format == "json" else [each for each in sink if each.code != "never-on-cards"]
