"""Diagnostics as SARIF 2.1.0, which code hosts show beside the lines of a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from devmap_config.diagnostics.codes import page, severities, summary

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic, Span

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def diagnostics_to_sarif(diagnostics: Iterable[Diagnostic], version: str) -> dict[str, Any]:
    """Return a SARIF log with one run; `version` is that of devmap-config."""
    findings = tuple(diagnostics)
    codes = sorted({diagnostic.code for diagnostic in findings})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {"name": "devmap-config", "version": version, "rules": [_rule(code) for code in codes]}
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(diagnostic, codes) for diagnostic in findings],
            }
        ],
    }


def _rule(code: Code) -> dict[str, Any]:
    """Return the description of a code, which code hosts show beside the finding."""
    text = page(code)
    return {
        "id": code,
        "shortDescription": {"text": summary(code)},
        "help": {"text": text, "markdown": text},
        "defaultConfiguration": {"level": severities(code)[0]},
    }


def _result(diagnostic: Diagnostic, codes: Sequence[Code]) -> dict[str, Any]:
    parts = [diagnostic.message, diagnostic.label, diagnostic.help]
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "ruleIndex": codes.index(diagnostic.code),
        "level": diagnostic.severity,
        "message": {"text": _plain("\n".join(part for part in parts if part))},
    }
    if diagnostic.span is not None:
        result["locations"] = [{"physicalLocation": _location(diagnostic.span)}]
    if diagnostic.related:
        result["relatedLocations"] = [
            {"id": number, "physicalLocation": _location(related.span), "message": {"text": _plain(related.message)}}
            for number, related in enumerate(diagnostic.related)
        ]
    return result


def _plain(text: str) -> str:
    """Escape brackets that SARIF would read as Markdown links."""
    return text.replace("](", r"\](")


def _location(span: Span) -> dict[str, Any]:
    return {
        "artifactLocation": {"uri": quote(span.file, errors="surrogateescape")},
        "region": {
            "startLine": span.line,
            "startColumn": span.column,
            "endLine": span.end_line,
            "endColumn": span.end_column,
        },
    }
