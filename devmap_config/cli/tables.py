"""How tables look, whatever they hold."""

from __future__ import annotations

from rich import box
from rich.table import Column, Table


def new_table(
    *names: str | Column, figures: tuple[str, ...], rest: str | None = None, width: int | None = None
) -> Table:
    """Return a table without rows.

    Args:
        names: the columns that say what a row is of; those given by their heading alone are never wrapped.
        figures: headings of the columns after these, aligned to the right.
        rest: the heading of the last column, which takes the room that there is.
        width: that of the table, if it is to be as wide whatever it holds.
    """
    columns = [Column(name, no_wrap=True) if isinstance(name, str) else name for name in names]
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", width=width)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    if rest is not None:
        table.add_column(rest, overflow="fold", ratio=1)
    return table
