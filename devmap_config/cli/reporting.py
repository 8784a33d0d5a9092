"""Prints the results of commands: data on stdout, messages on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from devmap_config.amounts import counted
from devmap_config.wording import json_text, visible_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from devmap_config.diagnostics.diagnostic import Diagnostic


MOST_SHOWN = 100
"""The most findings that are printed for people; the rest is counted. Formats for programs have all."""


def echo(line: str, *, err: bool = False) -> None:
    """Print a line, on stderr if `err` is true; line breaks in it come from names, and are escaped."""
    click.echo(visible_lines(line.replace("\n", r"\n")), err=err)


def echo_lines(text: str, *, err: bool = False) -> None:
    """Print a text without its final line break, on stderr if `err` is true."""
    click.echo(visible_lines(text.rstrip("\n")), err=err)


class EscapedStream:
    """Writes text in pieces, escaped like `echo_lines`, even if something to escape is split between pieces."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> None:
        """Write a piece."""
        click.echo("".join(map(self._escaped, text)), file=self._stream, nl=False)

    def _escaped(self, character: str) -> str:
        line, self._line = self._line, "" if character == "\n" else self._line + character
        if (character == ":" and line.strip() == ":") or (character == "[" and line.endswith("##")):
            return f"\\x{ord(character):x}"
        return visible_lines(character)


def report(
    diagnostics: Iterable[Diagnostic],
    texts: Mapping[str, str],
    output_format: str,
    *,
    quiet: bool = False,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Print findings in a format; `data` are the other keys of the object that `json` prints."""
    findings = tuple(diagnostics)
    if output_format == "json":
        from devmap_config.diagnostics.structured import diagnostics_to_json

        print_json({"diagnostics": diagnostics_to_json(findings), **(data or {})})
    elif output_format == "sarif":
        from devmap_config.diagnostics.sarif import diagnostics_to_sarif

        print_json(diagnostics_to_sarif(findings, own_version()))
    elif output_format == "github":
        from devmap_config.diagnostics.github import diagnostics_to_github

        for line in diagnostics_to_github(findings):
            click.echo(line)
    else:
        report_on_terminal([finding for finding in findings if not quiet or finding.is_error], texts)


def report_on_terminal(diagnostics: list[Diagnostic], texts: Mapping[str, str]) -> None:
    """Print findings for people, with their count."""
    if not diagnostics:
        return
    from devmap_config.cli.console import EscapingConsole
    from devmap_config.diagnostics.terminal import print_diagnostics

    console = EscapingConsole(stderr=True)
    # Errors come first if not all findings are shown.
    first = sorted(diagnostics, key=lambda finding: not finding.is_error)[:MOST_SHOWN]
    print_diagnostics(diagnostics if len(first) == len(diagnostics) else first, texts, console)
    if left_out := len(diagnostics) - len(first):
        console.print(f"and {counted(left_out, 'more finding')}, which `--format json` shows")
    errors = sum(diagnostic.is_error for diagnostic in diagnostics)
    warnings = len(diagnostics) - errors
    counts = [counted(count, noun) for count, noun in ((errors, "error"), (warnings, "warning")) if count]
    console.print(" and ".join(counts), style="bold")


def print_lines(lines: Callable[[int], Iterable[str | Text | Table | Padding]], *, soft_wrap: bool = False) -> None:
    """Print lines that are made for the width of the terminal; with `soft_wrap`, the terminal breaks long lines.

    Words are not broken, so that names can be copied: a line with a very long word exceeds the terminal.
    """
    from devmap_config.cli.console import EscapingConsole
    from devmap_config.cli.tables import least_width

    width = EscapingConsole().width
    for made in lines(width):
        line = made.replace("\n", r"\n") if isinstance(made, str) else made  # line breaks come from names
        console = EscapingConsole(width=max(width, least_width(line)))
        if soft_wrap:
            console.print(line, soft_wrap=True)
        else:
            console.print_unpadded(line)


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(json_text(value, is_ascii=not is_unicode))


def own_version() -> str:
    """Return the version of devmap-config."""
    from importlib.metadata import version

    return version("devmap-config")
