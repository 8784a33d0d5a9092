"""Reports YAML syntax errors at the place of the mistake, rather than where libyaml notices it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Span
from devmap_config.files import LINE_BREAK
from devmap_config.profile.quoting import closed, unquoted_text

if TYPE_CHECKING:
    import yaml

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink

ALIAS = re.compile(r"\*[\w-]+")
"""The start of an alias, which YAML reads as another value of the file."""

SHELL_VARIABLE = re.compile(r"\$\{(?P<name>\w+)\}")

UNCLOSED = {
    "while scanning a quoted scalar": ("this quote is never closed", "close it"),
    "while parsing a flow mapping": ("this `{` is not closed", "close it with `}`, or put a `,` between its entries"),
    "while parsing a flow sequence": ("this `[` is not closed", "close it with `]`, or put a `,` between its items"),
}
"""By libyaml's context: the mistake at its beginning, and advice."""

PROBLEMS = {
    "did not find expected ',' or '}'": ("a `,` or `}` is missing before this", "close the mapping with `}`"),
    "did not find expected ',' or ']'": ("a `,` or `]` is missing before this", "close the list with `]`"),
    "did not find expected key": ("a key was expected here", "check the indentation, and that quotes are closed"),
    "did not find expected '-' indicator": ("a `- ` was expected here", "check the indentation of the list"),
    "could not find expected ':'": ("a `:` is missing after this key", "write `key: value`"),
    "mapping values are not allowed in this context": (
        "a second `: ` stands in one value",
        "quote the value, or begin a new line",
    ),
    "found unexpected end of stream": ("a quote is never closed", "close it"),
    "found unknown escape character": (
        "in double quotes a backslash begins an escape, and this is none",
        "use single quotes: what stands in them is taken as it is",
    ),
    "found unexpected ':'": ("a space is missing after this `:`", "write `key: value`, or quote what holds the `:`"),
    "found character that cannot start any token": ("no value can begin with this character", "quote the value"),
}
"""By libyaml's problem: the mistake at its place, and advice."""


@dataclass
class SourceText:
    """A YAML text, and the sink for its mistakes. Lines and columns count from 0 here."""

    text: str
    file: str
    sink: Sink
    lines: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = LINE_BREAK.split(self.text)

    def span(self, line: int, column: int, length: int = 1) -> Span:
        """Return the place of characters of a line."""
        return Span.within_line(self.file, line + 1, column + 1, length)

    def error(self, message: str, span: Span, help: str, code: ErrorCode = "syntax") -> None:
        """Report a mistake."""
        self.sink.error(code, message, span, help=help)

    def report(self, error: yaml.MarkedYAMLError) -> None:
        """Report what libyaml could not read."""
        mark = error.problem_mark or error.context_mark
        line = min(mark.line if mark else 0, len(self.lines) - 1)
        column = min(mark.column if mark else 0, len(self.lines[line]))
        before, after = self.lines[line][:column], self.lines[line][column:]
        if self.report_unquoted(line, column):
            return
        if "\t" in before + after[:1]:
            span = self.span(line, self.lines[line].index("\t"))
            self.error("a tab stands where YAML requires spaces", span, "indent with spaces")
        elif not self.report_misplaced(error, line, column):
            start = error.context_mark
            if start is not None and error.context in UNCLOSED and (line > start.line or not after.strip()):
                # libyaml reports the end of the text, which is seldom the place of the mistake.
                message, help = UNCLOSED[error.context]
                self.error(message, self.span(start.line, start.column), help)
            else:
                unknown = (error.problem or "this is not YAML", "check the quotes and the indentation")
                message, help = PROBLEMS.get(error.problem or "", unknown)
                self.error(message, self.span(line, column), help)

    def report_misplaced(self, error: yaml.MarkedYAMLError, line: int, column: int) -> bool:
        """Report a missing `:` or a wrong indentation at its line, and return whether that is the mistake."""
        start = error.context_mark
        if error.problem == "could not find expected ':'" and start is not None and start.line < line:
            self.report_missing_colon(start.line)
            return True
        above = next((number for number in range(line - 1, -1, -1) if self.lines[number].strip()), None)
        key = self.lines[line][:column].strip()
        if error.problem != "mapping values are not allowed in this context" or ":" in key or above is None:
            return False
        if ": " in self.lines[above].strip() and self.indentation(line) > self.indentation(above):
            span = self.span(line, self.indentation(line), len(key))
            self.error(f"`{key}` is indented deeper than the line above", span, "align it with the keys beside it")
        else:
            self.report_missing_colon(above)
        return True

    def report_missing_colon(self, line: int) -> None:
        """Report a line that should have been a key and its value."""
        text = self.lines[line].strip()
        span = self.span(line, self.indentation(line), max(len(text), 1))
        self.error(f"a `: ` is missing in `{text}`", span, "write `key: value`")

    def report_unquoted(self, line: int, column: int) -> bool:
        """Report a value that contains YAML syntax, with the quoted text as the fix."""
        unquoted = unquoted_text(self.lines[line], column)
        if unquoted is None:
            return False
        start, text = unquoted
        if shell := SHELL_VARIABLE.fullmatch(text):
            help = f'write `"{{{{ {shell["name"]} }}}}"`, and `--set {shell["name"]}=…`: the environment is not read'
            self.error(f"`{text}` is not a template", self.span(line, start, len(text)), help, "needs-quotes")
            return True
        quoted = '"' + closed(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
        help = f"write `{quoted}`"
        if ALIAS.fullmatch(text):
            help += f"; if it is to stand for another value, write `&{text[1:]}` before that one, further above"
        self.error(f"`{text}` must be quoted", self.span(line, start, len(text)), help, "needs-quotes")
        return True

    def indentation(self, line: int) -> int:
        """Return the number of spaces before a line's text."""
        return len(self.lines[line]) - len(self.lines[line].lstrip())
