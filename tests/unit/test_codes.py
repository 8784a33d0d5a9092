"""Every diagnostic code is registered, reported somewhere, and explained on a page."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY

from devmap_config.diagnostics import codes
from devmap_config.diagnostics.codes import CODES, page, severities, summary
from devmap_config.diagnostics.diagnostic import Diagnostic
from devmap_config.diagnostics.sarif import diagnostics_to_sarif

PAGES = {path.stem for path in (REPOSITORY / "docs" / "codes").glob("*.md")}


def test_every_code_has_a_page():
    assert set(CODES) == PAGES
    assert len(set(CODES)) == len(CODES)


def test_every_code_is_reported_somewhere():
    modules = (path for path in (REPOSITORY / "devmap_config").rglob("*.py") if str(path) != codes.__file__)
    source = "".join(path.read_text() for path in modules)
    assert [code for code in CODES if f'"{code}"' not in source] == []


@pytest.mark.parametrize("code", CODES)
def test_a_page_names_its_severities_and_has_an_example_and_a_remedy(code):
    text = page(code)
    assert text.startswith(f"# {code}\n\n*")
    head, _, _ = text.partition(" · ")
    assert set(re.findall(r"\*(error|warning)\*", head)) == set(severities(code))
    assert "```" in text
    assert "**What to do.**" in text


@pytest.mark.parametrize("code", CODES)
def test_sarif_takes_its_help_from_the_registry(code):
    finding = Diagnostic(code=code, severity=severities(code)[0], message="so it is")
    [rule] = diagnostics_to_sarif([finding], "0.1.0")["runs"][0]["tool"]["driver"]["rules"]
    assert rule["id"] == code
    assert rule["shortDescription"] == {"text": summary(code)}
    assert re.fullmatch(r"[^\n]{15,300}\.", summary(code))
    assert rule["help"]["markdown"] == page(code)
    assert rule["defaultConfiguration"] == {"level": severities(code)[0]}
