"""The weights that a module's code reads off modules within it, without calling these: by its source, as a last resort.

Nothing brings such a weight in where it is streamed. A dry run finds it; this is for models that none gets through.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

DESCRIPTIONS = frozenset(
    ("dtype", "shape", "ndim", "size", "dim", "numel", "requires_grad", "is_floating_point", "element_size")
)
"""What of a tensor is the same though its data is elsewhere; its device is not."""


def read_without_a_call(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each module with a tensor, by their paths, that its forward reads off a module without calling that."""
    for path, module in model.named_modules():
        for name in _read_by(module, "forward", set()):
            yield path, f"{path}.{name}" if path else name


def _read_by(module: torch.nn.Module, method: str, seen: set[tuple[torch.nn.Module, str]]) -> Iterator[str]:
    """Yield the tensors that a method reads; those of the module itself are there where it is `forward` that is called.

    A method of a module within, called by its name, is followed: what it reads of that module nothing brings in.
    """
    if (module, method) in seen:
        return
    seen.add((module, method))
    for steps in _reads(type(module), method):  # type: ignore[arg-type]
        for count in range(method == "forward", len(steps)):
            owner_path, name = ".".join(steps[:count]), steps[count]
            try:
                owner = module.get_submodule(owner_path)
            except AttributeError:
                break
            prefix = f"{owner_path}." if owner_path else ""
            own = (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
            if any(name == tensor for tensor, _ in own):
                yield f"{prefix}{name}"
            elif owner is not module and name != "forward" and inspect.isfunction(getattr(type(owner), name, None)):
                yield from (f"{prefix}{read}" for read in _read_by(owner, name, seen))


@functools.cache
def _reads(module_class: type[torch.nn.Module], start: str) -> tuple[tuple[str, ...], ...]:
    """What is read of `self` in a method of a class, and in the methods that it calls, each as its names in turn."""
    found: dict[tuple[str, ...], None] = {}
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        method = inspect.unwrap(getattr(module_class, name, None))  # type: ignore[arg-type]
        if name in seen or not inspect.isfunction(method) or method.__module__.startswith("torch."):
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
    """Yield the names that follow `self`, wherever it is read: `("embed", "weight")`; what is called is without it."""
    within = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node in within:
            continue
        steps: list[str] = []
        each: ast.expr = node
        while isinstance(each, ast.Attribute):
            steps.insert(0, each.attr)
            each = each.value
        if isinstance(each, ast.Name) and each.id == "self" and isinstance(node.ctx, ast.Load):
            yield tuple(steps)
