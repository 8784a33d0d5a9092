"""The package's names and docstrings keep to docs/glossary.md: one word, one meaning."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache

from conftest import REPOSITORY

PRIVATE_NAMES = {"gift", "mending", "party", "posed", "stuck", "ways_out"}
"""Words that say nothing to a newcomer, as names of anything."""


@cache
def trees():
    return {path: ast.parse(path.read_text()) for path in sorted((REPOSITORY / "devmap_config").rglob("*.py"))}


def nodes(*kinds):
    return [(path, node) for path, tree in trees().items() for node in ast.walk(tree) if isinstance(node, kinds)]


def test_no_class_name_is_used_twice():
    names = Counter(node.name for _, node in nodes(ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_name_is_an_excluded_word():
    stored = [(path, node.id) for path, node in nodes(ast.Name) if isinstance(node.ctx, ast.Store)]
    stored += [(path, node.arg) for path, node in nodes(ast.arg)]
    stored += [(path, node.name) for path, node in nodes(ast.ClassDef, ast.FunctionDef)]
    assert {(path.name, name) for path, name in stored if name.strip("_").lower() in PRIVATE_NAMES} == set()


def test_terms_of_the_glossary_are_defined_once():
    text = (REPOSITORY / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [
        term
        for row in re.findall(r"^\| (\*\*.*?) \| ", text, re.MULTILINE)
        for term in re.findall(r"\*\*(.+?)\*\*", row)
    ]
    assert len(terms) > 50
    assert [term for term, count in Counter(terms).items() if count > 1] == []
