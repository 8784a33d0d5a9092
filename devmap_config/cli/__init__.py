"""The commands `devmap` and `devmap-compile`. Each command has a file, and imports heavy modules only when it runs."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import sys
from io import StringIO, TextIOWrapper
from typing import TYPE_CHECKING

import click

from devmap_config.cli.adopt import adopt
from devmap_config.cli.bench import bench
from devmap_config.cli.calibrate import calibrate
from devmap_config.cli.check import check
from devmap_config.cli.compile import compile_command
from devmap_config.cli.diff import diff
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.explain import explain
from devmap_config.cli.export import export
from devmap_config.cli.fit import fit
from devmap_config.cli.hardware import hardware
from devmap_config.cli.init import init
from devmap_config.cli.probe import probe
from devmap_config.cli.receipts import receipts
from devmap_config.cli.report import report as report_command
from devmap_config.cli.reporting import echo, echo_lines
from devmap_config.cli.reporting import report as report_diagnostics  # `report` is a module beside it
from devmap_config.cli.run import run
from devmap_config.cli.schema import schema
from devmap_config.cli.serve import serve
from devmap_config.cli.simulate import simulate
from devmap_config.cli.tree import tree
from devmap_config.cli.update import update
from devmap_config.diagnostics.diagnostic import Diagnostic
from devmap_config.files import discard_output, open_standard_streams

if TYPE_CHECKING:
    from devmap_config.diagnostics.codes import ErrorCode


class Commands(click.Group):
    """The group of commands, with their help listed in full sentences."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of each command's help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, made.get_short_help_str(limit=500)) for name, made in self.commands.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="devmap-config", prog_name="devmap")
def devmap() -> None:
    """A compiler for model placement: YAML profiles to verified device maps."""


for command in (
    compile_command,
    check,
    diff,
    run,
    bench,
    receipts,
    calibrate,
    serve,
    simulate,
    export,
    report_command,
    fit,
    init,
    adopt,
    tree,
    probe,
    hardware,
    schema,
    explain,
    update,
):
    devmap.add_command(command)


GARBAGE_THRESHOLD = 50_000
"""The objects between two garbage collections; with Python's default of 700, these take a tenth of the time of
importing torch.
"""


def main() -> None:
    """Run the command `devmap`."""
    _run(devmap, "devmap")


def compile_main() -> None:
    """Run the command `devmap-compile`, which is `devmap compile`."""
    _run(compile_command, "devmap-compile")


def _run(command: click.Command, name: str) -> None:
    """Run a command; errors of click and bugs become exit codes and, with `--format json`, an object."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    open_standard_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters outside of the encoding must not fail
    try:
        code = _exit_code(command, name)
        sys.stdout.flush()
    except OSError as error:
        code = _fault(error)
    sys.exit(code)


def _exit_code(command: click.Command, name: str) -> int:
    try:
        code = command.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        output = StringIO()
        error.show(file=output)
        echo_lines(output.getvalue(), err=True)
        _print_failure("usage", error.format_message())
        return ExitCode.USAGE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FAULTS:
            raise
        if isinstance(error, MemoryError):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from None
        from traceback import format_exc

        echo_lines(format_exc(), err=True)
        echo("this is a bug of devmap-config; please report it with the lines above", err=True)
        _print_failure("internal-error", f"{type(error).__name__}: {error}")
        return ExitCode.BUG
    return code if isinstance(code, int) else ExitCode.DONE


FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EBADF),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPIPE),
)
"""Errors that mean that the machine lacks or forbids something, for instance when writing to a stream."""


def _fault(error: OSError) -> ExitCode:
    """Print an error of the machine in a line, if printing is still possible."""
    discard_output(sys.stdout)
    if isinstance(error, BrokenPipeError):  # the reader has seen enough
        discard_output(sys.stderr)
        return ExitCode.WRONG
    what = f"`{error.filename}`: " if error.filename else "what was found cannot be written: "
    message = "memory ran out" if error.errno == errno.ENOMEM else f"{what}{error.strerror}"
    try:
        echo(f"Error: {message}", err=True)
    except OSError:
        discard_output(sys.stderr)
    return ExitCode.USAGE


def _output_format() -> str:
    """Return the value of `--format`, if it was parsed."""
    arguments = sys.argv[1:]
    given = [name.partition("=")[2] for name in arguments if name.startswith("--format=")]
    given += [after for before, after in itertools.pairwise(arguments) if before == "--format"]
    return given[-1] if given else "table"


def _print_failure(code: ErrorCode, message: str) -> None:
    """Print the object that `--format json` promises for a command that failed before it had a result."""
    if _output_format() == "json":
        report_diagnostics([Diagnostic.error(code, message)], {}, "json", data={"plan": None})
