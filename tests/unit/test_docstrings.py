"""The docstrings: their examples run, and their sentences say what a function returns or does."""

from __future__ import annotations

import doctest
import importlib

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "devmap_config"

FILES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}

COMPILE = {"devmap_config.compiler", "devmap_config.runner.runner"}
"""Modules with examples that compile and load a model, which `tests/integration/test_python.py` runs."""


def examples_of(name):
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if ">>> " in text and name not in COMPILE])
def test_the_examples_of_a_module_hold(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    examples = examples_of(name)
    assert examples
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
