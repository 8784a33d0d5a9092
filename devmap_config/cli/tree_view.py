"""Shows a module tree, with equal neighbours once, with their range of indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from devmap_config.amounts import format_bytes
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.graph.model import ModelGraph, Module, Tensor

MATCHED = "bold green"


@dataclass(frozen=True)
class _EqualNeighbours:
    """Equal neighbours, and the first of them."""

    module: Module
    name: str
    count: int


def tree_lines(graph: ModelGraph, matched: tuple[str, ...] | None, depth: int | None = None) -> Iterator[Text]:
    """Yield the tree with a line for each module or tensor; with `matched`, only those, marked, and their ancestors."""
    marks = frozenset(matched or ())
    yield Text.assemble(
        (graph.class_name, "bold"), f"  {format_bytes(graph.size_bytes)}", *([("  ←", MATCHED)] if "" in marks else [])
    )
    yield from _below(graph, graph.root, marks, "", depth, filtered=matched is not None and "" not in marks)
    if matched is not None:
        names = [name for name in matched if name in graph.modules or name in graph.tensors]
        tensors = {tensor.name for name in names for tensor in _tensors(graph, name)}
        size_bytes = graph.weights_bytes(tuple(sorted(tensors)))  # tied tensors count once
        yield Text(f"{len(names)} matched, {format_bytes(size_bytes)}", style=MATCHED)


def tree_to_json(graph: ModelGraph, matched: tuple[str, ...] | None) -> dict[str, Any]:
    """Return the tree as plain data: modules in order, each with its class and bytes, and the matches of a pattern."""
    modules = [
        {
            "path": module.path,
            "class": module.class_name,
            "size_bytes": graph.weights_bytes(tuple(tensor.name for tensor in module.tensors())),
        }
        for module in graph.modules.values()
    ]
    tensors = [
        {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype, "size_bytes": tensor.size_bytes}
        for tensor in graph.tensors.values()
    ]
    return {"modules": modules, "tensors": tensors, "matched": None if matched is None else list(matched)}


def _tensors(graph: ModelGraph, name: str) -> tuple[Tensor, ...]:
    if name in graph.modules:
        return tuple(graph.modules[name].tensors())  # type: ignore[index]
    return (graph.tensors[name],)  # type: ignore[index]


def _below(
    graph: ModelGraph, module: Module, marks: frozenset[str], indent: str, depth: int | None, *, filtered: bool
) -> Iterator[Text]:
    if depth == 0:
        return
    runs = _runs(module, marks)
    visible_runs = [run for run in runs if not filtered or _leads_to_match(run.module, marks)]
    tensors = [tensor for tensor in module.own_tensors if not filtered or tensor.name in marks]
    entries: list[_EqualNeighbours | Tensor] = [*tensors, *visible_runs]
    for number, entry in enumerate(entries):
        is_last = number == len(entries) - 1
        branch, onward = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        if not isinstance(entry, _EqualNeighbours):
            yield _tensor_line(entry, indent + branch, marks)
            continue
        yield _run_line(graph, entry, indent + branch, marks)
        yield from _below(
            graph,
            entry.module,
            marks,
            indent + onward,
            None if depth is None else depth - 1,
            filtered=filtered and entry.module.path not in marks,
        )


def _tensor_line(tensor: Tensor, lead: str, marks: frozenset[str]) -> Text:
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    line = Text.assemble(
        (lead, "dim"),
        tensor.name.rpartition(".")[2],
        (f"  {shape} {tensor.dtype}", "dim"),
        f"  {format_bytes(tensor.size_bytes)}",
    )
    return _marked(line, tensor.name in marks, len(lead))


def _run_line(graph: ModelGraph, run: _EqualNeighbours, lead: str, marks: frozenset[str]) -> Text:
    size_bytes = graph.weights_bytes(tuple(tensor.name for tensor in run.module.tensors()))
    size = f"  {format_bytes(size_bytes)}" if size_bytes else ""
    each = f" each, {run.count} of them" if run.count > 1 and size else ""
    line = Text.assemble((lead, "dim"), run.name, (f"  {run.module.class_name}", "cyan"), f"{size}{each}")
    return _marked(line, run.module.path in marks, len(lead))


def _marked(line: Text, is_marked: bool, start: int) -> Text:
    if is_marked:
        line.append("  ←", style=MATCHED)
        line.stylize(MATCHED, start)
    return line


def _runs(module: Module, marks: frozenset[str]) -> list[_EqualNeighbours]:
    """Return the children, with numbered neighbours that are equal, and equally matched, joined."""
    runs: list[_EqualNeighbours] = []
    signatures: list[object] = []
    for child in module.children:
        name = child.path.rpartition(".")[2]
        signature = _signature(child, child.path, marks)
        number = number_in(name)
        if runs and number is not None and signatures[-1] == signature:
            last = runs[-1]
            first = last.module.path.rpartition(".")[2]
            if number_in(first) == number - last.count:
                runs[-1] = _EqualNeighbours(last.module, f"[{first}-{name}]", last.count + 1)
                continue
        runs.append(_EqualNeighbours(child, name, 1))
        signatures.append(signature)
    return runs


def _signature(module: Module, root: str, marks: frozenset[str]) -> object:
    return (
        module.class_name,
        module.path.removeprefix(root),
        module.path in marks,
        tuple(
            (tensor.name.removeprefix(root), tensor.shape, tensor.dtype, tensor.name in marks)
            for tensor in module.own_tensors
        ),
        tuple(_signature(child, root, marks) for child in module.children),
    )


def _leads_to_match(module: Module, marks: frozenset[str]) -> bool:
    return any(
        inner.path in marks or any(tensor.name in marks for tensor in inner.own_tensors) for inner in module.walk()
    )
