"""Every function that writes amounts and words of messages has an example, which `test_docstrings.py` runs."""

from __future__ import annotations

import doctest

import pytest

from devmap_config import amounts, wording


@pytest.mark.parametrize("module", [amounts, wording])
def test_every_function_has_an_example(module):
    public = [name for name, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module) if test.examples}
    assert sorted(examples) == sorted(name for name in public if not name.startswith("_"))
