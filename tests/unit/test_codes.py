"""Every code that the program can print has a page, and every page a code."""

from __future__ import annotations

import ast
import re

from conftest import REPOSITORY

from devmap_config.diagnostics.pages import codes, page

CODE = re.compile(r"[a-z]+(-[a-z]+)+|syntax|usage")

MAKERS = {"error", "warning", "report", "refuse", "RunnerError", "TemplateRefusedError", "Violation", "Diagnostic"}


def codes_in_source():
    """The first text argument, or `kind=`/`code=`, of every call that makes a finding."""
    found = set()
    for path in (REPOSITORY / "devmap_config").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in MAKERS:
                continue
            values = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg in ("kind", "code"))]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and CODE.fullmatch(value.value):
                    found.add(value.value)
    return found


def test_every_code_has_a_page():
    assert codes_in_source() <= set(codes())


def test_every_page_is_of_a_code_that_something_prints():
    source = "".join(path.read_text() for path in (REPOSITORY / "devmap_config").rglob("*.py"))
    assert [code for code in codes() if f'"{code}"' not in source] == []


def test_every_page_says_what_it_means_shows_an_example_and_a_mend():
    for code in codes():
        text = page(code)
        assert text.startswith(f"# {code}\n"), code
        assert "```" in text, code
        assert "**What to do.**" in text, code
