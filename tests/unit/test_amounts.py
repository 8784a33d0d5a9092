"""Amounts and other words of messages read as their docstrings show."""

from __future__ import annotations

import doctest

import pytest

from devmap_config import amounts, wording


@pytest.mark.parametrize("module", [amounts, wording])
def test_every_function_formats_as_its_example_shows(module):
    public = [name for name, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module) if test.examples}
    assert sorted(examples) == sorted(name for name in public if not name.startswith("_"))
    for test in examples.values():
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
