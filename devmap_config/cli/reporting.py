"""Prints what a command found: data on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from devmap_config.amounts import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.table import Table
    from rich.text import Text

    from devmap_config.diagnostics.diagnostic import Diagnostic


MOST_SHOWN = 100
"""Findings that people are shown; the rest is counted. Formats for programs hold all."""


def report(
    diagnostics: Iterable[Diagnostic],
    texts: Mapping[str, str],
    output_format: str,
    *,
    quiet: bool = False,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Print findings in a format; `data` are the other keys of the object that `json` prints."""
    found = tuple(diagnostics)
    if output_format == "json":
        from devmap_config.diagnostics.structured import diagnostics_to_json

        print_json({"diagnostics": diagnostics_to_json(found), **(data or {})})
    elif output_format == "sarif":
        from devmap_config.diagnostics.sarif import diagnostics_to_sarif

        print_json(diagnostics_to_sarif(found, own_version()))
    elif output_format == "github":
        from devmap_config.diagnostics.github import diagnostics_to_github

        for line in diagnostics_to_github(found):
            click.echo(line)
    else:
        report_on_terminal([each for each in found if not quiet or each.is_error], texts)


def report_on_terminal(diagnostics: list[Diagnostic], texts: Mapping[str, str]) -> None:
    """Print findings for people, with their number."""
    if not diagnostics:
        return
    from rich.console import Console

    from devmap_config.diagnostics.terminal import print_diagnostics

    console = Console(stderr=True, highlight=False)
    # What stops the command comes first, where not all is shown.
    shown = sorted(diagnostics, key=lambda each: not each.is_error)[:MOST_SHOWN]
    print_diagnostics(diagnostics if len(shown) == len(diagnostics) else shown, texts, console)
    if left_out := len(diagnostics) - len(shown):
        console.print(f"and {counted(left_out, 'more finding')}, which `--format json` shows")
    errors = sum(diagnostic.is_error for diagnostic in diagnostics)
    warnings = len(diagnostics) - errors
    counts = [counted(count, noun) for count, noun in ((errors, "error"), (warnings, "warning")) if count]
    console.print(" and ".join(counts), style="bold")


def print_lines(lines: Callable[[int], Iterable[str | Text | Table]], *, soft_wrap: bool = False) -> None:
    """Print what is made for a width, for that of the terminal; with `soft_wrap` the terminal breaks long lines.

    Words are not broken, for names are to be copied: a line with one that is too long is longer than the terminal.
    """
    from rich.console import Console

    from devmap_config.cli.tables import least_width

    width = Console().width
    for line in lines(width):
        console = Console(highlight=False, width=max(width, least_width(line)))
        console.print(line, soft_wrap=soft_wrap)


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(json.dumps(value, indent=2, ensure_ascii=not is_unicode))


def own_version() -> str:
    """The version of devmap-config."""
    from importlib.metadata import version

    return version("devmap-config")
