"""Tells on a terminal what a command is doing, and how far it is."""

from __future__ import annotations

import logging
import sys
import threading
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

    One that `spins` does so by a thread, beside which no process may be forked. Elsewhere than on a terminal, a step
    that takes long is printed once.
    """
    if quiet or not sys.stderr.isatty():  # one that is not seen is not begun: until rich 15 it ends with an empty line
        late = _LateWord()
        try:
            yield (lambda _: None) if quiet or not spins else late.note
        finally:
            late.cancel()
        return
    from rich.progress import BarColumn, SpinnerColumn

    from devmap_config.cli.console import progress_line

    with progress_line(SpinnerColumn(), BarColumn(), DESCRIPTION, auto_refresh=spins) as shown:
        task = shown.add_task("", total=total, completed=-1)
        yield lambda step: shown.update(task, advance=1, description=step, refresh=True)


@contextmanager
def stages_shown(*, quiet: bool = False) -> Iterator[None]:
    """Show on stderr which stage of compiling runs: on a terminal in a line that goes again, else once if it lasts."""
    if quiet:
        yield
        return
    handler: _Stages | _LateStage = _LateStage()
    if sys.stderr.isatty():
        from rich.progress import BarColumn, SpinnerColumn, TimeElapsedColumn

        from devmap_config.cli.console import progress_line

        handler = _Stages(progress_line(SpinnerColumn(), BarColumn(), DESCRIPTION, TimeElapsedColumn()))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.stop()


SECONDS_WITHOUT_A_WORD = 10
"""After so many seconds a command says on a stderr that is no terminal what it is doing."""


class _LateWord:
    """Prints what is being done if that takes long: once, however much follows."""

    def __init__(self) -> None:
        self._timer = threading.Timer(SECONDS_WITHOUT_A_WORD, self._print)
        self._timer.daemon = True
        self._words = ""

    def note(self, words: str) -> None:
        """Note what is done now, and begin to wait at the first."""
        is_first, self._words = not self._words, words
        if is_first:
            self._timer.start()

    def cancel(self) -> None:
        """Print nothing any more."""
        self._timer.cancel()

    def _print(self) -> None:
        from devmap_config.cli.reporting import echo

        echo(f"{self._words}: this may take a minute", err=True)


class _LateStage(logging.Handler):
    """Prints a stage that takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._late = _LateWord()

    def emit(self, record: logging.LogRecord) -> None:
        """Note a stage."""
        self._late.note(record.getMessage())

    def stop(self) -> None:
        """Print nothing any more."""
        self._late.cancel()


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

    def stop(self) -> None:
        """Show nothing any more."""
        if self._shown.live.is_started:
            self._shown.stop()


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
