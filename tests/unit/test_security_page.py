"""docs/security.md says the bounds that the code has, and names tests that are there."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from conftest import REPOSITORY

from devmap_config.files import Kind

PAGE = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|]+ \| ([^|]*\d[^|]*) \| (`[^|]+`) \|$", PAGE, re.MULTILINE)


def constants(names):
    """The values that a row names; a name that begins with a dot is of the module before."""
    module = ""
    for name in re.findall("`([^`]+)`", names):
        before, _, constant = name.rpartition(".")
        module = before or module
        value = getattr(import_module(f"devmap_config.{module}"), constant)
        yield value.max_bytes if isinstance(value, Kind) else value


@pytest.mark.parametrize(("bound", "names"), ROWS)
def test_a_bound_is_what_the_code_has(bound, names):
    assert {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", bound)} == set(constants(names))


def test_every_kind_of_file_that_a_stranger_may_bring_has_a_row():
    kinds = {name for name, value in vars(import_module("devmap_config.files")).items() if isinstance(value, Kind)}
    assert kinds - {"PACKAGED", "KERNEL"} == set(re.findall(r"`files\.([A-Z_]+)`", PAGE)) - {"MAX_VALUES"}
    assert len(ROWS) == 20


def test_each_promise_names_tests_that_are_there():
    named = re.findall(r"tests/[\w/.]+\.py", PAGE)
    assert len(named) >= 8
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
