"""The tables of docs/libraries.md, made from the adapters and their imports; run as a script, it rewrites them."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path

from devmap_config.libraries.private import Private

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "devmap_config"
PAGE = REPOSITORY / "docs" / "libraries.md"

SOURCES = sorted(PACKAGE.rglob("*.py"))
ADAPTERS = sorted((PACKAGE / "libraries").glob("*.py"))
LIBRARIES = ("torch", "transformers", "accelerate")


def privates():
    """Return each adapter's constants: the name and the private part that it stands for."""
    found = {}
    for path in ADAPTERS:
        if path.stem != "__init__":
            module = import_module(f"devmap_config.libraries.{path.stem}")
            named = {name: value for name, value in vars(module).items() if isinstance(value, Private)}
            if named:
                found[path.stem] = named
    return found


@cache
def functions_by_constant(path):
    """Return, for each name that an adapter defines, the names that it uses."""
    tree = ast.parse(path.read_text())
    uses = {}
    for node in tree.body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        inside = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        for name in names:
            uses[name] = inside - {name}
    return uses


@cache
def imported_from_adapters():
    """Return, for each module of the product, the names that it imports from each adapter."""
    found = {}
    for path in SOURCES:
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("devmap_config.libraries."):
                names = found.setdefault(name, {}).setdefault(node.module.rpartition(".")[2], set())
                names |= {alias.name for alias in node.names}
    return found


def users_of(adapter, constant):
    """Return the modules of the product that import a constant, or something that uses it."""
    uses = functions_by_constant(PACKAGE / "libraries" / f"{adapter}.py")
    resting = {constant}
    while more := {name for name, inside in uses.items() if inside & resting} - resting:
        resting |= more
    return sorted(name for name, imports in imported_from_adapters().items() if imports.get(adapter, set()) & resting)


def table():
    """Return the rows of the page by library: the private part, its use, and the modules that use it."""
    rows = {library: [] for library in LIBRARIES}
    for adapter, named in privates().items():
        for constant, private in named.items():
            users = ", ".join(f"`{user}`" for user in users_of(adapter, constant))
            rows[private.library].append(f"| `{private.name}` | {private.use} | {users} |")
    return rows


HEAD = "| what | what rests on it | used by |\n|---|---|---|\n"


def with_tables(text):
    """Return the page with the table of each library replaced."""
    for library, rows in table().items():
        section = f"## {library}\n\n{HEAD}" + "\n".join(rows) + "\n\n"
        before, heading, rest = text.partition(f"## {library}\n")
        following = rest.find("\n## ") + 1
        text = before + section + (rest[following:] if heading and following else "")
    return text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
