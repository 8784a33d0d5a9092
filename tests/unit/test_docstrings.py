"""The examples in docstrings run, and docstrings state what a function returns or does."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from functools import cache

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
def test_docstring_examples_of_a_module_run(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    examples = examples_of(name)
    assert examples
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


PRIVATE_OPENINGS = ("how", "what", "when", "where", "whether", "which", "who", "whose", "why")
"""A sentence that begins so leaves out what a function does with it."""


@cache
def documented():
    """Yield every docstring with its place and its object."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [
        (name, node) for name, text in FILES.items() for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)
    ]
    return [
        (f"{name}.{getattr(node, 'name', '')}", node, docstring)
        for name, node in nodes
        if (docstring := ast.get_docstring(node))
    ]


def test_docstrings_state_what_is_returned_or_done():
    openings = {place: text.split()[0].lower().strip(",:") for place, _, text in documented()}
    assert len(openings) > 2000
    assert [place for place, word in openings.items() if word in PRIVATE_OPENINGS] == []


ENTRIES = re.compile(r"^(Args|Attributes):\n((?: {4}.*\n?|\n(?= {4}))+)", re.MULTILINE)


def test_args_and_attributes_are_complete_and_exist():
    listed = 0
    for place, node, text in documented():
        for section, entries in ENTRIES.findall(text):
            names = {
                name.strip("* ")
                for line in re.findall(r"^ {4}([\w*, ]+):", entries, re.MULTILINE)
                for name in line.split(",")
            }
            listed += len(names)
            if isinstance(node, ast.ClassDef):
                body = "\n".join(map(ast.unparse, node.body))
                missing = {name for name in names if not re.search(rf"\b{name}\b *[:=(,]", body)}
                assert not missing, f"{place} has no {missing}"
            else:
                signature = node.args
                arguments = {argument.arg for argument in ast.walk(signature) if isinstance(argument, ast.arg)}
                assert section == "Args"
                assert names == {name for name in arguments - {"self", "cls"} if not name.startswith("_")}, place
    assert listed > 500
