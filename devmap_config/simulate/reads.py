"""The weights that a module's code reads off modules within it, without calling these: by its source, as a last resort.

Nothing brings such a weight in where it is streamed. A dry run finds it; this is for models that none gets through.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import FunctionType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DESCRIPTIONS = frozenset(
    ("dtype", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_floating_point", "element_size")
)
"""What of a tensor is the same though its data is elsewhere; its device is not."""

ITEM = "*"


def read_without_a_call(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each module with a tensor, by their paths, that its forward reads off a module without calling that."""
    for path, module in model.named_modules():
        for name in _read_by(module, "forward", set()):
            yield path, f"{path}.{name}" if path else name


def _read_by(module: torch.nn.Module, method: str, seen: set[tuple[torch.nn.Module, str]]) -> Iterator[str]:
    """Yield the tensors that a method reads; those of the module itself are there where it is `forward` that is called.

    A method or property of a module within, called by its name, is followed: what it reads of that module nothing
    brings in.
    """
    if (module, method) in seen:
        return
    seen.add((module, method))
    for steps in _reads(type(module), method):  # type: ignore[arg-type]
        for count in range(method == "forward", len(steps)):
            for owner_path, owner in _modules_at(module, steps[:count]):
                prefix, name = f"{owner_path}." if owner_path else "", steps[count]
                own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
                if any(name == tensor for tensor, _ in own):
                    yield f"{prefix}{name}"
                elif owner is not module and name != "forward" and _function_of(type(owner), name) is not None:
                    yield from (f"{prefix}{read}" for read in _read_by(owner, name, seen))


def _modules_at(module: torch.nn.Module, steps: tuple[str, ...]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules that names lead to, with their paths; `ITEM` leads to all within a list."""
    if not steps:
        yield "", module
        return
    names = dict(module.named_children())
    for name in names if steps[0] == ITEM else names.keys() & {steps[0]}:
        for path, found in _modules_at(names[name], steps[1:]):
            yield f"{name}.{path}" if path else name, found


def _function_of(module_class: type[torch.nn.Module], name: str) -> FunctionType | None:
    """Return what runs where a method of a class is called, or a property read."""
    found = inspect.getattr_static(module_class, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)  # type: ignore[arg-type]
    return found if isinstance(found, FunctionType) and not found.__module__.startswith("torch.") else None


@functools.cache
def _reads(module_class: type[torch.nn.Module], start: str) -> tuple[tuple[str, ...], ...]:
    """Return the attributes of `self` that a method of a class reads, and the methods that it calls, each as its names
    in turn.
    """
    found: dict[tuple[str, ...], None] = {}
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        method = _function_of(module_class, name)
        if name in seen or method is None:
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):  # it was not made from a file
            continue
        for steps in _chains(tree):
            if len(steps) == 1:
                waiting += steps
            if DESCRIPTIONS.isdisjoint(steps):
                found[steps] = None
    return tuple(found)


def _chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the names that follow `self`, wherever it is read: `("embed", "weight")`; what is called is without it.

    What follows the name of an item, by which a loop goes through a list or that is taken of one, follows that list.
    """
    items = {"self": ()} | {name: (*steps, ITEM) for name, steps in _items(tree)}
    within = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in within and isinstance(node.ctx, ast.Load):
            root, steps = _dotted(node)
            if root in items:
                yield *items[root], *steps


def _items(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names that stand for an item of a list of `self`, with the names of that list."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            targets, values = node.target, node.iter
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            targets, values = node.targets[0], node.value
        else:
            continue
        lists = [_dotted(each) for each in ast.walk(values) if isinstance(each, ast.Attribute)]
        steps = max((names for root, names in lists if root == "self"), key=len, default=())
        names = [each.id for each in ast.walk(targets) if isinstance(each, ast.Name)]
        yield from ((name, steps) for name in names if steps and name != "self")


def _dotted(node: ast.expr) -> tuple[str | None, tuple[str, ...]]:
    """Return a name and the names that follow it with dots; `None` if it begins with something else."""
    steps: list[str] = []
    while isinstance(node, ast.Attribute):
        steps.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), tuple(steps)
