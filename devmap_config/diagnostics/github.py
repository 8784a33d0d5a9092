"""Diagnostics as GitHub's workflow commands, which annotate the lines of a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.diagnostics.diagnostic import Diagnostic


def diagnostics_to_github(diagnostics: Iterable[Diagnostic]) -> list[str]:
    """Return one workflow command for each finding."""
    return [_command(diagnostic) for diagnostic in diagnostics]


def _command(diagnostic: Diagnostic) -> str:
    properties: dict[str, object] = {}
    if (span := diagnostic.span) is not None:
        properties = {"file": visible(span.file), "line": span.line, "endLine": span.end_line, "col": span.column}
        if span.end_line == span.line:  # GitHub accepts an end column only within a line
            properties["endColumn"] = span.end_column
    properties["title"] = diagnostic.code
    named = ",".join(f"{name}={_property(str(value))}" for name, value in properties.items())
    parts = [diagnostic.message, diagnostic.label, diagnostic.help and f"help: {diagnostic.help}"]
    message = "%0A".join(_data(part) for part in parts if part)
    return f"::{diagnostic.severity} {named}::{message}"


def _data(text: str) -> str:
    return text.replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
