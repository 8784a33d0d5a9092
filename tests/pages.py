"""The pages of the documentation as blocks that can be run.

A `yaml` block whose first line is a comment with a file name is that file. A `console` block has commands behind `$ `,
followed by the lines that they print: each of these must be in the output, regardless of blanks; `…` matches anything.
A command ends with `# exit code N` if that is not 0, and with `# needs: gpu` or `# needs: hub` if it is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parent.parent

BLOCK = re.compile(r"^```(?P<kind>\w+)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# (?P<name>[\w./-]+\.yaml)$", re.MULTILINE)
MARK = re.compile(r"\s+# (?:needs: (?P<needs>gpu|hub)|exit code (?P<code>\d+))$")

ELSEWHERE = ("docs/ci.md", "docs/vllm.md")
"""Pages whose blocks are run by a test of their own: `tests/integration/test_ci.py`, `tests/engines/test_vllm.py`."""


@dataclass(frozen=True)
class File:
    """A block that is a file."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line with the lines that the page shows as its output."""

    line: str
    printed: tuple[str, ...] = ()
    exit_code: int = 0
    needs: str | None = None


def pages() -> list[Path]:
    """Return the pages: the README and docs, without those of the codes, which `tests/cases` runs."""
    found = sorted((REPOSITORY / "docs").rglob("*.md"))
    return [REPOSITORY / "README.md", *(page for page in found if "codes" not in page.parts)]


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> Iterator[File | Command]:
    """Return the files and commands of a page, in order."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        kind, text = block["kind"], block["text"]
        if kind == "yaml" and (named := NAME.match(text)):
            yield File(named["name"], text)
        elif kind == "bash":
            yield command_of(text.strip("\n"), ())
        elif kind == "console":
            yield from _console(text)


def _console(text: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(number for number, line in enumerate(lines, 1) if not line.endswith("\\"))
        yield command_of("\n".join(lines[:end]), tuple(line for line in lines[end:] if line.strip("… ")))


def command_of(line: str, printed: tuple[str, ...]) -> Command:
    mark = MARK.search(line)
    if mark is None:
        return Command(line, printed)
    return Command(line[: mark.start()], printed, int(mark["code"] or 0), mark["needs"])
