"""Tells on a terminal what a command is doing, and how far it is."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from devmap_config.stages import LOGGER, STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress(total: int, *, quiet: bool = False, spins: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a line that goes again, where stderr is a terminal; give what is called as each of `total` steps begins.

    One that `spins` does so by a thread, beside which no process may be forked.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    if quiet or not sys.stderr.isatty():  # one that is not seen is not begun: until rich 15 it ends with an empty line
        yield lambda _: None
        return
    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=spins) as shown:
        task = shown.add_task("", total=total, completed=-1)
        yield lambda step: shown.update(task, advance=1, description=step, refresh=True)


@contextmanager
def stages_shown(*, quiet: bool = False) -> Iterator[None]:
    """Show, where stderr is a terminal, a line that goes again: which stage of compiling runs, and for how long."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    handler, level = _Stages(shown), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        if shown.live.is_started:
            shown.stop()


class _Stages(logging.Handler):
    """Shows the stage that began last; nothing where none does."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """Show a stage."""
        shown = self._shown
        if not shown.live.is_started:
            shown.start()
            shown.add_task("", total=len(STAGES))
        stage = getattr(record, "stage", 0)
        shown.update(shown.task_ids[0], completed=stage, description=record.getMessage(), refresh=True)
