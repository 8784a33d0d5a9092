"""Finds weights of inner modules that a module's code reads without calling them, by its source, as a last resort.

Nothing copies such a weight in if it is streamed. A dry run detects that; this is for models that cannot be dry-run.
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
"""Attributes of a tensor that do not depend on where its data are, unlike its device."""

ITEM = "*"


def read_without_a_call(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the path of each module with the name of a tensor that its forward reads from an inner module without
    calling it.
    """
    for path, module in model.named_modules():
        for name in _read_by(module, "forward", set()):
            yield path, f"{path}.{name}" if path else name


def _read_by(module: torch.nn.Module, method: str, seen: set[tuple[torch.nn.Module, str]]) -> Iterator[str]:
    """Yield the tensors that a method reads, without those of the module itself if the method is `forward`.

    Methods and properties of inner modules are followed, because nothing copies in the tensors that they read from that
    module.
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
    """Yield the modules that names lead to, with their paths; `ITEM` leads to all items of a list."""
    if not steps:
        yield "", module
        return
    names = dict(module.named_children())
    for name in names if steps[0] == ITEM else names.keys() & {steps[0]}:
        for path, inner in _modules_at(names[name], steps[1:]):
            yield f"{name}.{path}" if path else name, inner


def _function_of(module_class: type[torch.nn.Module], name: str) -> FunctionType | None:
    """Return the function that runs when a method of a class is called, or a property is read."""
    attribute = inspect.getattr_static(module_class, name, None)
    attribute = inspect.unwrap(attribute.fget if isinstance(attribute, property) else attribute)  # type: ignore[arg-type]
    return attribute if isinstance(attribute, FunctionType) and not attribute.__module__.startswith("torch.") else None


@functools.cache
def _reads(module_class: type[torch.nn.Module], start: str) -> tuple[tuple[str, ...], ...]:
    """Return the attributes of `self` that a method of a class reads, and the methods that it calls, each as a tuple of
    names.
    """
    chains: dict[tuple[str, ...], None] = {}
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        method = _function_of(module_class, name)
        if name in seen or method is None:
            continue
        seen.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):  # it has no source file
            continue
        for steps in _chains(tree):
            if len(steps) == 1:
                waiting += steps
            if DESCRIPTIONS.isdisjoint(steps):
                chains[steps] = None
    return tuple(chains)


def _chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yield the names that follow `self` wherever it is read, such as `("embed", "weight")`, without modules that are
    called.

    Names that follow a variable for an item of a list, from a loop or an index, follow that list.
    """
    items = {"self": ()} | {name: (*steps, ITEM) for name, steps in _items(tree)}
    within = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in within and isinstance(node.ctx, ast.Load):
            root, steps = _dotted(node)
            if root in items:
                yield *items[root], *steps


def _items(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the variables that hold an item of a list of `self`, with the names of that list."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.comprehension)):
            targets, values = node.target, node.iter
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            targets, values = node.targets[0], node.value
        else:
            continue
        lists = [_dotted(node) for node in ast.walk(values) if isinstance(node, ast.Attribute)]
        steps = max((names for root, names in lists if root == "self"), key=len, default=())
        names = [node.id for node in ast.walk(targets) if isinstance(node, ast.Name)]
        yield from ((name, steps) for name in names if steps and name != "self")


def _dotted(node: ast.expr) -> tuple[str | None, tuple[str, ...]]:
    """Return a name and the names that follow it after dots; `None` if the expression begins with something else."""
    steps: list[str] = []
    while isinstance(node, ast.Attribute):
        steps.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else None), tuple(steps)
