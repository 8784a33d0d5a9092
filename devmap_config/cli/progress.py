"""Tells on a terminal what a command is doing, and how far it is."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress(total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a line that goes again, where stderr is a terminal; give what is called as each of `total` steps begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:  # one that is not seen is not begun: until rich 15 it ends with an empty line
        yield lambda _: None
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=total, completed=-1)
        yield lambda step: shown.update(task, advance=1, description=step, refresh=True)
