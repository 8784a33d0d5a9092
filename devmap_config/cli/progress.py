"""Shows on a terminal what a command is doing, and its progress."""

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
"""The column of a progress line that says what is being done."""


@contextmanager
def progress(total: int, *, quiet: bool = False, spins: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a transient line if stderr is a terminal; yield a function to call when each of `total` steps begins.

    A line that `spins` uses a thread, so that no process may be forked meanwhile. If stderr is not a terminal, a step
    that takes long is printed once.
    """
    if quiet or not sys.stderr.isatty():  # before rich 15, an invisible line would print an empty one
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
    """Show on stderr which stage of compiling runs: on a terminal in a transient line, else once if it takes long."""
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
"""The seconds after which a command prints what it is doing, if stderr is not a terminal."""


class _LateWord:
    """Prints what is being done if that takes long, but only once."""

    def __init__(self) -> None:
        self._timer = threading.Timer(SECONDS_WITHOUT_A_WORD, self._print)
        self._timer.daemon = True
        self._words = ""

    def note(self, words: str) -> None:
        """Note what is being done, and start the timer at the first call."""
        is_first, self._words = not self._words, words
        if is_first:
            self._timer.start()

    def cancel(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _print(self) -> None:
        from devmap_config.cli.reporting import echo

        echo(f"{self._words}: this may take a minute", err=True)


class _LateStage(logging.Handler):
    """A log handler that prints a stage if it takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._late = _LateWord()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the stage that begins."""
        self._late.note(record.getMessage())

    def stop(self) -> None:
        """Stop the timer."""
        self._late.cancel()


class _Stages(logging.Handler):
    """A log handler that shows the stage that began last."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self._shown = shown

    def emit(self, record: logging.LogRecord) -> None:
        """Show the stage that begins."""
        shown = self._shown
        if not shown.live.is_started:
            shown.start()
            shown.add_task("", total=len(STAGES))
        stage = getattr(record, "stage", 0)
        shown.update(shown.task_ids[0], completed=stage, description=record.getMessage(), refresh=True)

    def stop(self) -> None:
        """Stop showing stages."""
        if self._shown.live.is_started:
            self._shown.stop()


class ByteProgress:
    """The progress of loading or writing, in bytes."""

    def __init__(self, shown: Any = None, words: str = "") -> None:
        self.total_bytes = 0
        self.done_bytes = 0
        self._shown = shown  # rich's `Progress`; `None` if nothing is shown
        self._words = words

    def expect(self, size_bytes: int) -> None:
        """Add bytes to the expected total."""
        self.total_bytes += size_bytes
        if self._shown is not None and not self._shown.tasks:
            self._shown.add_task(self._words, amount="")
            self._shown.start()
        self._show()

    def advance(self, size_bytes: int) -> None:
        """Add bytes to those that are done."""
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
    """Show a transient bar if stderr is a terminal: the bytes that are done, the total, and the speed.

    The bar starts when bytes are expected: until then, others may show bars of their own.
    """
    if quiet or not sys.stderr.isatty():
        yield ByteProgress()
        return
    from rich.progress import BarColumn

    from devmap_config.cli.console import progress_line

    columns = (DESCRIPTION, BarColumn(), "{task.fields[amount]}")
    # It starts while stdout is redirected, and ends when it no longer is: rich would restore the stdout of its start.
    bar = progress_line(*columns, redirect_stdout=False, redirect_stderr=False)
    try:
        yield ByteProgress(bar, words)
    finally:
        if bar.tasks:
            bar.stop()


@contextmanager
def loading_shown(sizes: Mapping[str, int], *, quiet: bool = False) -> Iterator[ByteProgress]:
    """Show the progress of loading while the context lasts, by the bytes of each tensor; those missing in `sizes`
    are not read.
    """
    from devmap_config.libraries.transformers import watching_load

    def watch(names: list[str]) -> Callable[[str], None]:
        transfer.expect(sum(sizes.get(name, 0) for name in names))
        return lambda name: transfer.advance(sizes.get(name, 0))

    with transfer_shown("loading weights", quiet=quiet) as transfer, watching_load(watch):
        yield transfer
