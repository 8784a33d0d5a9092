"""Prints with rich: everything is escaped, and names that look like markup or emoji are printed unchanged."""

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
    """A console that prints untrusted texts as plain words."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable, with escaped text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible_lines(segment.text))

    def print_unpadded(self, renderable: RenderableType) -> None:
        """Print without the trailing blanks of tables."""
        for line in self.render_lines(renderable, pad=False):
            while line and not line[-1].text.strip(" "):
                line.pop()
            ends = [line[-1]._replace(text=line[-1].text.rstrip(" "))] if line else []
            self.print(Segments([*line[:-1], *ends, Segment.line()]), end="")


def progress_line(*columns: ProgressColumn | str, **options: Any) -> Progress:
    """Return a transient progress line on stderr; a column that is a text may have fields of the task in braces."""
    made = (TextColumn(column, markup=False) if isinstance(column, str) else column for column in columns)
    return Progress(*made, console=EscapingConsole(stderr=True), transient=True, **options)
