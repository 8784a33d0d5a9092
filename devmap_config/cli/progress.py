"""Tells on a terminal what a command is doing, and how far it is."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes
from devmap_config.stages import LOGGER, STAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


DESCRIPTION = "{task.description}"
"""What is done now, in a line of progress."""


@contextmanager
def progress(total: int, *, quiet: bool = False, spins: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a line that goes again, where stderr is a terminal; give what is called as each of `total` steps begins.

    One that `spins` does so by a thread, beside which no process may be forked.
    """
    if quiet or not sys.stderr.isatty():  # one that is not seen is not begun: until rich 15 it ends with an empty line
        yield lambda _: None
        return
    from rich.progress import BarColumn, SpinnerColumn

    from devmap_config.cli.console import progress_line

    with progress_line(SpinnerColumn(), BarColumn(), DESCRIPTION, auto_refresh=spins) as shown:
        task = shown.add_task("", total=total, completed=-1)
        yield lambda step: shown.update(task, advance=1, description=step, refresh=True)


@contextmanager
def stages_shown(*, quiet: bool = False) -> Iterator[None]:
    """Show, where stderr is a terminal, a line that goes again: which stage of compiling runs, and for how long."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn

    from devmap_config.cli.console import progress_line

    shown = progress_line(SpinnerColumn(), BarColumn(), DESCRIPTION, TimeElapsedColumn())
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


class ByteProgress:
    """Bytes that are loaded or written: how many are done, of how many."""

    def __init__(self, shown: Any = None, words: str = "") -> None:
        self.total_bytes = 0
        self.done_bytes = 0
        self._shown = shown  # rich's `Progress`; `None` if nobody looks
        self._words = words

    def expect(self, size_bytes: int) -> None:
        """Say that so many more are to come."""
        self.total_bytes += size_bytes
        if self._shown is not None and not self._shown.tasks:
            self._shown.add_task(self._words, amount="")
            self._shown.start()
        self._show()

    def advance(self, size_bytes: int) -> None:
        """Say that so many more are done."""
        self.done_bytes += size_bytes
        self._show()

    def _show(self) -> None:
        if self._shown is None:
            return
        [task] = self._shown.tasks
        amount = f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)}"
        if task.elapsed and self.done_bytes:
            amount += f", {format_bytes(round(self.done_bytes / task.elapsed))}/s"
        self._shown.update(task.id, total=self.total_bytes, completed=self.done_bytes, amount=amount)


@contextmanager
def transfer_shown(words: str, *, quiet: bool = False) -> Iterator[ByteProgress]:
    """Show, where stderr is a terminal, a bar that goes again: how many bytes are done, of how many, and how fast.

    It begins once some are expected: until then, others may show bars of their own.
    """
    if quiet or not sys.stderr.isatty():
        yield ByteProgress()
        return
    from rich.progress import BarColumn

    from devmap_config.cli.console import progress_line

    columns = (DESCRIPTION, BarColumn(), "{task.fields[amount]}")
    # It begins where stdout is redirected, and ends where it is not: rich would put back what it was at first.
    shown = progress_line(*columns, redirect_stdout=False, redirect_stderr=False)
    try:
        yield ByteProgress(shown, words)
    finally:
        if shown.tasks:
            shown.stop()


@contextmanager
def loading_shown(sizes: Mapping[str, int], *, quiet: bool = False) -> Iterator[ByteProgress]:
    """Show what is loaded within, by the bytes of each tensor; one that is not in `sizes` is not read yet."""
    from devmap_config.libraries.transformers import watching_load

    def watch(names: list[str]) -> Callable[[str], None]:
        transfer.expect(sum(sizes.get(name, 0) for name in names))
        return lambda name: transfer.advance(sizes.get(name, 0))

    with transfer_shown("loading weights", quiet=quiet) as transfer, watching_load(watch):
        yield transfer
