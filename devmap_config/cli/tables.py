"""Makes tables that fit the terminal without breaking names."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from devmap_config.cli.console import EscapingConsole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIDEST = 140

GAP = "   "


def new_table(*names: str | Column, figures: tuple[str, ...], rest: str | None = None) -> Table:
    """Return a table without rows.

    Args:
        names: the columns that identify a row; columns given as a heading are never wrapped.
        figures: the headings of the columns after these, aligned to the right.
        rest: the heading of the last column, which takes the remaining room.
    """
    columns = [Column(name, no_wrap=True) if isinstance(name, str) else name for name in names]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    if rest is not None:
        table.add_column(rest, no_wrap=True, ratio=1)
    return table


def listing(
    rows: Iterable[tuple[tuple[str, ...], Iterable[str]]],
    width: int,
    *,
    names: tuple[str, ...] = (),
    figures: tuple[str, ...],
    rest: str,
) -> Iterator[Table | Text]:
    """Return rows of cells with names that belong to each row: beside the cells or, if too long, below them.

    Args:
        rows: the cells of each row, and the names.
        width: of the terminal.
        names: the headings of the first cells.
        figures: the headings of the other cells.
        rest: the heading of the names.
    """
    listed = [(cells, tuple(held)) for cells, held in rows]
    table = new_table(*names, figures=figures, rest=rest)
    for cells, held in listed:
        table.add_row(*cells, "\n".join(held))
    table.width = min(width, WIDEST)
    if least_width(table) <= width:
        yield table
        return
    lines = ((*names, *figures), *(cells for cells, _ in listed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = " " * max(min((width - sum(widths)) // max(len(widths) - 1, 1), 3), 1)

    def line(cells: tuple[str, ...]) -> str:
        placed = (
            f"{cell:<{room}}" if place < len(names) else f"{cell:>{room}}"
            for place, (cell, room) in enumerate(zip(cells, widths, strict=True))
        )
        return gap.join(placed).rstrip()

    whole = partial(Text, no_wrap=True)
    yield whole(line(lines[0]), style="bold")
    yield whole("─" * min(width, WIDEST))
    for cells, held in listed:
        yield whole(line(cells))
        yield from (whole(f"  {name}") for name in held)


def aligned(rows: Sequence[Sequence[str]], width: int, *, headings: Sequence[str] = ()) -> Iterator[Text | Padding]:
    """Return rows in columns or, if these are too wide, the first cell of each row with the others below it.

    Args:
        rows: the cells, the same number in each row.
        width: of the terminal.
        headings: the headings of the columns, if any.
    """
    rows = [[cell.replace("\n", r"\n") for cell in row] for row in rows]  # a line break is one of a name's
    lines = [*([headings] if headings else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) <= width:
        for cells in lines:
            yield Text(GAP.join(f"{cell:<{room}}" for cell, room in zip(cells, widths, strict=True)), no_wrap=True)
        return
    room = max(map(len, headings[1:]), default=0)
    for first, *others in rows:
        line = GAP.join((f"{first:<{widths[0]}}", *others))
        if not headings and len(line.rstrip()) <= width:
            yield Text(line, no_wrap=True)
            continue
        yield Text(first, no_wrap=True)
        for place, cell in enumerate(others, 1):
            if cell:
                name = f"{headings[place]:<{room}}{GAP}" if headings else ""
                yield Padding(f"{name}{cell}", (0, 0, 0, 2), expand=False)


def least_width(line: str | Text | Table | Padding) -> int:
    """Return the least width of a line or a table without broken words."""
    console = EscapingConsole(width=10_000)
    if isinstance(line, Table):
        width, line.width = line.width, None
        least = console.measure(line).minimum
        line.width = width
        return least
    if isinstance(line, Padding):
        return console.measure(line).minimum
    text = Text(line) if isinstance(line, str) else line
    return text.cell_len if text.no_wrap else console.measure(text).minimum
