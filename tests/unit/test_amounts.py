"""Amounts read as their docstrings show."""

from __future__ import annotations

import doctest

from devmap_config import amounts


def test_every_function_formats_as_its_example_shows():
    public = [name for name, value in vars(amounts).items() if callable(value) and value.__module__ == amounts.__name__]
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(amounts) if test.examples}
    assert sorted(examples) == sorted(name for name in public if not name.startswith("_"))
    for test in examples.values():
        assert doctest.DocTestRunner().run(test).failed == 0, test.name
