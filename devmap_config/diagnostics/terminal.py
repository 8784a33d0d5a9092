"""Diagnostics for a terminal, with the lines of source that they point into."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.text import Text

from devmap_config.files import LINE_BREAK
from devmap_config.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console  # noqa: TID251  whoever has one, prints

    from devmap_config.diagnostics.diagnostic import Diagnostic, Span

COLOURS = {"error": "bold red", "warning": "bold yellow"}
MARGIN = "bold blue"

CODE = re.compile("`[^`]*`")

CONTEXT_CELLS = 12
"""The cells of a long line that are kept before the marked part."""


def print_diagnostics(diagnostics: Iterable[Diagnostic], texts: Mapping[str, str], console: Console) -> None:
    """Print each finding with its place, its line and its advice; `texts` are the files by their shown names."""
    findings = tuple(diagnostics)
    files = {span.file for diagnostic in findings for span in _spans(diagnostic)} & texts.keys()
    sources = {file: LINE_BREAK.split(texts[file]) for file in sorted(files)}
    for diagnostic in findings:
        for line in _lines(diagnostic, sources, console.width):
            console.print(line, soft_wrap=True)
        console.print()


def _spans(diagnostic: Diagnostic) -> list[Span]:
    spans = (diagnostic.span, *(related.span for related in diagnostic.related))
    return [span for span in spans if span is not None]


Sources = Mapping[str, list[str]]
"""The lines of files, by their shown names."""


def _lines(diagnostic: Diagnostic, sources: Sources, width: int) -> Iterator[Text]:
    colour = COLOURS[diagnostic.severity]
    head = f"{diagnostic.severity}[{diagnostic.code}]"
    message = _wrapped(f"{head}: {diagnostic.message}", width, indent="  ")
    for number, line in enumerate(message):
        text = Text(line, style="bold")
        if number == 0:
            text.stylize(colour, 0, len(head))
        yield text
    margin = max((len(str(span.line)) for span in _spans(diagnostic)), default=1) + 1
    if diagnostic.span is not None:
        yield from _snippet(diagnostic.span, diagnostic.label, sources, width, margin, "-->", "^", colour)
    for related in diagnostic.related:
        yield from _snippet(related.span, related.message, sources, width, margin, ":::", "-", MARGIN)
    if diagnostic.help:
        lead = " " * margin + "= help: " if diagnostic.span else "  = help: "
        # A command that is too long for the line still starts beside the words before it.
        kept_lead = lead.replace(" ", "\xa0")
        for number, line in enumerate(_wrapped(kept_lead + diagnostic.help, width, indent=" " * len(lead))):
            text = Text(line)
            if number == 0:
                text.stylize(MARGIN, 0, len(lead))
            yield text


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    """Wrap a text to a width; text in backticks is not broken, so that it can be copied."""
    unbroken = CODE.sub(lambda code: code.group().replace(" ", "\xa0"), text)
    lines = textwrap.wrap(
        unbroken, max(width, 40), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\xa0", " ") for line in lines or [""]]


def _snippet(
    span: Span, label: str | None, sources: Sources, width: int, margin: int, arrow: str, mark: str, colour: str
) -> Iterator[Text]:
    yield Text.assemble((" " * (margin - 1) + arrow, MARGIN), f" {visible(span.file)}:{span.line}:{span.column}")
    lines = sources.get(span.file, [])
    if span.line > len(lines):
        if label:
            yield Text.assemble((" " * margin + "= ", MARGIN), label)
        return
    source = lines[span.line - 1]
    end = span.end_column if span.end_line == span.line else len(source) + 1
    room = max(width - margin - 3, 20)
    parts = _around(source, span.column - 1, end - 1, 8 * room)
    before, marked, after = (visible(part.replace("\t", "    ")) for part in parts)
    before, marked, after = _fitted(before, marked, after, room)
    gutter = " " * margin
    yield Text(f"{gutter}|", style=MARGIN)
    yield Text.assemble((f"{span.line:>{margin - 1}} |", MARGIN), f" {before}{marked}{after}")
    underline = mark * max(cell_len(marked), 1)
    lead = cell_len(before)
    if label and lead + len(underline) + 1 + cell_len(label) > room:
        yield Text.assemble((f"{gutter}|", MARGIN), " " * (lead + 1), (underline, colour))
        for line in _wrapped(label, max(room - 2, 20), indent=""):
            yield Text.assemble((f"{gutter}|", MARGIN), "   ", (line, colour))
        return
    yield Text.assemble((f"{gutter}|", MARGIN), " " * (lead + 1), (f"{underline} {label or ''}".rstrip(), colour))


def _around(line: str, start: int, end: int, most: int) -> tuple[str, str, str]:
    """Split a line into the parts before, in and after a place, each with at most `most` characters, as no more can
    be shown.
    """
    return line[max(start - most, 0) : start], line[start : min(end, start + most)], line[end : end + most]


def _fitted(before: str, marked: str, after: str, room: int) -> tuple[str, str, str]:
    """Cut the three parts of a line to `room` terminal cells, around the marked part."""
    if cell_len(before) + cell_len(marked) + cell_len(after) <= room:
        return before, marked, after
    if cell_len(before) + cell_len(marked) > room - 1 and cell_len(before) > CONTEXT_CELLS:
        while cell_len(before) > CONTEXT_CELLS:
            before = before[1:]
        before = "…" + before
    marked = _cut(marked, room - cell_len(before) - 1)
    return before, marked, _cut(after, room - cell_len(before) - cell_len(marked))


def _cut(text: str, room: int) -> str:
    if cell_len(text) <= room:
        return text
    if room <= 1:
        return ""
    return chop_cells(text, room - 1)[0] + "…"
