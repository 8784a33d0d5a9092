"""The common parts of commands: options, failures in the requested format, exit codes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import (
    format_option,
    outside_option,
    profile_argument,
    quiet_option,
    remote_code_option,
    set_option,
    unmeasured_option,
    verbose_option,
)
from devmap_config.cli.progress import stages_shown
from devmap_config.cli.reporting import report
from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic, Sink, TooManyErrorsError
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.profile.permissions import NO_PERMISSIONS, Permissions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.cli.options import Decorator
    from devmap_config.compiler import Compilation, Compiled, Request

    Function = Callable[..., ExitCode | None]


class CommandError(DevmapError):
    """A command failed.

    Attributes:
        exit_code: the exit code of the command.
        data: the other keys of the object that `--format json` prints.
    """

    def __init__(
        self,
        diagnostics: Iterable[Diagnostic],
        texts: Mapping[str, str] | None = None,
        *,
        exit_code: ExitCode = ExitCode.WRONG,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        findings = tuple(diagnostics)
        super().__init__("; ".join(finding.message for finding in findings), findings, texts)
        self.exit_code = exit_code
        self.data = data or {"plan": None}


class Command(click.Command):
    """A command that reports its failures in the requested format."""

    def invoke(self, context: click.Context) -> Any:
        """Call the command's function, and turn its errors for users into exit codes."""
        try:
            return super().invoke(context) or ExitCode.DONE
        except DevmapError as error:
            failed = _failure_of(error)
        except LibraryChangedError as error:
            failed = CommandError(_change_of(error))
        output_format, quiet = context.params.get("output_format", "table"), context.params.get("quiet", False)
        report(failed.diagnostics, failed.texts, output_format, quiet=quiet, data=failed.data)
        return failed.exit_code


def _failure_of(error: DevmapError) -> CommandError:
    """Return the failure of a command for an error."""
    if isinstance(error, CommandError):
        return error
    exit_code = ExitCode.WRONG if isinstance(error, TooManyErrorsError) else ExitCode.USAGE
    return CommandError(error.diagnostics, error.texts, exit_code=exit_code)


class Mistakes:
    """Collects the errors of several files or machines that a user names, to report all of them at once."""

    def __init__(self) -> None:
        self._errors: list[DevmapError | click.UsageError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect an error that is raised within the context, so that later items are checked as well."""
        try:
            yield
        except (DevmapError, click.UsageError) as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raise the collected errors; several become one, with the most serious exit code.

        Raises:
            CommandError: if there is more than one error.
            DevmapError: if there is this one.
            click.UsageError: if there is this one.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        failures = [_failure_of(_as_finding(error)) for error in self._errors]
        if failures:
            raise CommandError(
                dict.fromkeys(finding for failure in failures for finding in failure.diagnostics),
                {name: text for failure in failures for name, text in failure.texts.items()},
                exit_code=min(failure.exit_code for failure in failures),
                data=failures[0].data,
            )


def _as_finding(error: DevmapError | click.UsageError) -> DevmapError:
    if isinstance(error, DevmapError):
        return error
    return CommandError([Diagnostic.error("usage", error.format_message())], exit_code=ExitCode.USAGE)


def command(name: str, *formats: str) -> Callable[[Function], Command]:
    """Make a command of a function; if there are formats, it has the option `--format`, whose default is the first."""
    return lambda function: _command_of(name, function, *formats)


def _command_of(name: str, function: Function, *formats: str, options: tuple[Decorator, ...] = ()) -> Command:
    """Return a command whose shared options are listed after its own."""
    made = click.command(name, cls=Command, context_settings={"help_option_names": ["-h", "--help"]})(function)
    for option in (format_option(*formats), *options) if formats else options:
        made.params += click.command()(option(lambda: None)).params
    return made


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """The options of every command on profiles."""

    output_format: str = "table"
    variables: Mapping[str, str] = field(default_factory=dict)
    quiet: bool = False
    permissions: Permissions = NO_PERMISSIONS

    @property
    def shows_tables(self) -> bool:
        """True if results are printed for people."""
        return self.output_format == "table" and not self.quiet

    @property
    def of_request(self) -> dict[str, Any]:
        """The fields of a request to the pipeline that these options decide."""
        return {"variables": self.variables, "permissions": self.permissions}

    def request(self, profile: Path, **options: Any) -> Request:
        """Return the request to compile a profile, with the values that its lock records."""
        from devmap_config.compiler import Request

        return Request.for_profile(profile, **self.of_request, **options)

    def run_pipeline(self, profile: Path, **options: Any) -> Compilation:
        """Run the pipeline on a profile, and show its progress on a terminal."""
        from devmap_config.compiler import run_pipeline

        with stages_shown(quiet=self.quiet):
            return run_pipeline(self.request(profile, **options))

    def compile(self, profile: Path, **options: Any) -> Compiled:
        """Run the pipeline on a profile.

        Raises:
            CommandError: if the profile is wrong or cannot be satisfied.
        """
        from devmap_config.compiler import Rejected

        compilation = self.run_pipeline(profile, **options)
        if isinstance(compilation, Rejected):
            raise CommandError(compilation.diagnostics, compilation.texts)
        return compilation

    def report(self, diagnostics: Iterable[Diagnostic], texts: Mapping[str, str], data: Mapping[str, Any]) -> None:
        """Print findings; `data` are the other keys of the object that `--format json` prints."""
        report(diagnostics, texts, self.output_format, quiet=self.quiet, data=data)


def profile_command(name: str, *formats: str, argument: Decorator = profile_argument) -> Callable[[Function], Command]:
    """Make a command of a function of `profile`, `options` (those of all such commands) and its own options.

    Args:
        name: the command's.
        formats: the choices of `--format`, the default first; empty if it has no such option.
        argument: the argument instead of PROFILE, which may be named by its lock.
    """
    shared = (set_option, quiet_option, verbose_option, outside_option, remote_code_option, unmeasured_option)

    def decorate(function: Function) -> Command:
        @wraps(function)
        def run(**values: Any) -> ExitCode | None:
            from devmap_config.plan.lock import profile_of

            permissions = Permissions(**{field.name: values.pop(field.name) for field in fields(Permissions)})
            given = {field.name: values.pop(field.name) for field in fields(ProfileOptions) if field.name in values}
            if "profile" in values:
                values["profile"] = profile_of(values["profile"])
            return function(options=ProfileOptions(permissions=permissions, **given), **values)

        return _command_of(name, argument(run), *formats, options=shared)

    return decorate


def _change_of(error: LibraryChangedError) -> Sink:
    """Return a diagnostic about a changed library, for parts of commands that cannot say what follows from it."""
    from devmap_config.graph.failures import failure_of
    from devmap_config.graph.findings import report_failure

    sink = Sink()
    report_failure(failure_of(error), "this cannot be done", None, sink, allowed=None)
    return sink
