"""Printing by rich: everything is escaped, and names that look like markup or emoji are printed as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn
from rich.segment import Segment, Segments

from devmap_config.wording import visible_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import ConsoleOptions, RenderableType


class EscapingConsole(Console):
    """A console on which texts of strangers are words and nothing else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what a renderable is made of, its text escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible_lines(segment.text))

    def print_unpadded(self, renderable: RenderableType) -> None:
        """Print without the blanks by which tables fill their lines."""
        for line in self.render_lines(renderable, pad=False):
            while line and not line[-1].text.strip(" "):
                line.pop()
            ends = [line[-1]._replace(text=line[-1].text.rstrip(" "))] if line else []
            self.print(Segments([*line[:-1], *ends, Segment.line()]), end="")


def progress_line(*columns: ProgressColumn | str, **options: Any) -> Progress:
    """Return a line on stderr that goes again: of columns, a text being one with names of the task in braces."""
    made = (TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns)
    return Progress(*made, console=EscapingConsole(stderr=True), transient=True, **options)
