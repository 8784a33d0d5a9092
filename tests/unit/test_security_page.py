"""docs/security.md states the limits that the code has, and names existing tests."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
from conftest import REPOSITORY

from devmap_config.files import Kind

PAGE = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| [^|]+ \| ([^|]*\d[^|]*) \| (`[^|]+`) \|$", PAGE, re.MULTILINE)


def constants(names):
    """Return the values that a row names; a name that begins with a dot is of the previous module."""
    module = ""
    for name in re.findall("`([^`]+)`", names):
        before, _, constant = name.rpartition(".")
        module = before or module
        value = getattr(import_module(f"devmap_config.{module}"), constant)
        yield value.max_bytes if isinstance(value, Kind) else value


@pytest.mark.parametrize(("bound", "names"), ROWS)
def test_stated_limits_are_those_of_the_code(bound, names):
    assert {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", bound)} == set(constants(names))


def test_every_kind_of_file_from_strangers_has_a_row():
    kinds = {name for name, value in vars(import_module("devmap_config.files")).items() if isinstance(value, Kind)}
    assert kinds - {"PACKAGED", "KERNEL"} == set(re.findall(r"`files\.([A-Z_]+)`", PAGE)) - {"MAX_VALUES"}
    assert len(ROWS) == 20


def test_each_promise_names_existing_tests():
    named = re.findall(r"tests/[\w/.]+\.py", PAGE)
    assert len(named) >= 8
    assert [name for name in named if not (REPOSITORY / name).is_file()] == []
