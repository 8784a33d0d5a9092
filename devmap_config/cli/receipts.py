"""`devmap receipts`: prints predictions of runs beside the measurements."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import click

from devmap_config.amounts import GIBIBYTE
from devmap_config.cli.command import CommandError, Mistakes, command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.cli.options import FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from rich.table import Table

    from devmap_config.runner.receipts import Case, Figure


@command("receipts", "table", "json", "markdown")
@click.argument("files", nargs=-1, type=FILE, metavar="[FILE]...")
def receipts(files: tuple[Path, ...], output_format: str) -> None:
    """Show predicted and measured figures side by side, for each FILE that `devmap run --receipt` wrote.

    Without a FILE, those of the runs on real cards that come with the package.
    """
    from devmap_config.cli.reporting import echo, print_lines, report
    from devmap_config.runner.receipts import FOLDER

    cases: list[Case] = []
    mistakes = Mistakes()
    for path in files or sorted(FOLDER.glob("*.json")):
        with mistakes.collected():
            cases += cases_in(path)
    mistakes.raise_any()
    report((), {}, output_format, data={"cases": [asdict(case) for case in cases]})
    if output_format == "markdown":
        for line in _markdown(cases):
            echo(line)
    elif output_format == "table":
        print_lines(lambda width: _lines(cases, width))


def cases_in(path: Path) -> tuple[Case, ...]:
    """Return the cases of a receipt.

    Raises:
        CommandError: if it cannot be read, or is not a receipt.
    """
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.files import FileError
    from devmap_config.runner.receipts import cases_of

    try:
        return cases_of(path)
    except FileError as error:
        finding = Diagnostic.error(error.code, f"`{path}` {error}", help=error.help)
        raise CommandError([finding], exit_code=ExitCode.USAGE, data={"cases": None}) from None


NAMES = ("case", "device")
FIGURES = ("GiB", "ms a token", "ms a prefill", "load s")

Row = tuple[tuple[str, str], tuple[str, ...]]
"""Names, and figures as predicted → as measured."""


def _rows(cases: Iterable[Case]) -> Iterator[Row]:
    """Yield a row for each device of each case, with the times in the first, and for the process's memory on the
    CPU.
    """
    from devmap_config.runner.receipts import PROCESS

    for case in cases:
        if case.failed is not None:
            yield (case.name, ""), ("out of memory" if case.is_out_of_memory else "failed", "", "", "")
            continue
        token, prefill, load = (figure for figure in case.figures if figure.device is None)
        load_seconds = f"{load.seen:.1f}" if load.seen and load.seen > LEAST_LOAD_SECONDS else ""
        times = (_both(token, 1e-3, 0), _both(prefill, 1e-3, 0), load_seconds)
        for figure in case.figures:
            if figure.name == "running":
                yield (case.name, str(figure.device)), (_both(figure, GIBIBYTE, 2), *times)
                times = ("", "", "")
            elif figure.name in PROCESS:
                yield (case.name, f"{figure.device}: {figure.name}"), (_both(figure, GIBIBYTE, 2), "", "", "")


LEAST_LOAD_SECONDS = 0.01
"""A load that took less time used the model of the case before."""


def _both(figure: Figure, unit: float, digits: int) -> str:
    amounts = (figure.predicted, figure.seen)
    predicted, seen = ("–" if amount is None else f"{amount / unit:.{digits}f}" for amount in amounts)
    return "" if amounts == (None, None) else f"{predicted} → {seen}"


NARROW = 80
"""On terminals with fewer columns, a row has one name, which includes the device if there are several, and three
figures.
"""


def _lines(cases: Iterable[Case], width: int) -> Iterator[str | Table]:
    """Yield each receipt's name and a table of its cases; long names are shortened to make room for figures."""
    from rich.table import Column

    from devmap_config.cli.tables import new_table

    is_narrow = width < NARROW
    figures = FIGURES[:3] if is_narrow else FIGURES
    for receipt, grouped in groupby(cases, key=lambda case: case.receipt):
        of_receipt = list(grouped)
        rates = dict.fromkeys(basis for case in of_receipt for basis in case.rates.values())
        rows = list(_rows(of_receipt))
        held = Counter(case for (case, _), _ in rows)
        table = new_table(*(Column(NAMES[0], overflow="fold"), NAMES[1])[: 2 - is_narrow], figures=figures)
        for (case, device), amounts in rows:
            name = "" if ": " in device else case  # a part of the row above it
            if is_narrow and held[case] > 1:
                name = f"{name} {device}".strip()
            table.add_row(*(name, device)[: 2 - is_narrow], *amounts[: len(figures)])
        by = f" by {' and '.join(rates)} rates" if rates else ""
        yield f"{receipt}: predicted{by} → seen"
        yield table
        yield ""


def _markdown(cases: Iterable[Case]) -> Iterator[str]:
    from devmap_config.cli.markdown import cell

    yield f"| {' | '.join(('receipt', *NAMES, *FIGURES))} |"
    yield f"|---|{'---|' * len(NAMES)}{'--:|' * len(FIGURES)}"
    for case in cases:
        for names, figures in _rows([case]):
            yield f"| {' | '.join(map(cell, (case.receipt, *names, *figures)))} |"
