"""Suggests what a pattern that matches nothing was meant to be, by the tree and not only by spelling."""

from __future__ import annotations

import difflib
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.rules.matching import FlatSegment, MatchFailure, children_of
from devmap_config.rules.pattern import ClassPattern, Pattern
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph, Module

NO_DOT = re.compile(r"(?<=[A-Za-z])\[(?=[-:0-9,/]+\])")
"""Matches a range after a name without a dot, as Python indexes a list (`layers[0:4]`): then only the dot is wrong."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A suggestion: `label` is shown beside the pattern, `pattern` goes into the proposed command, `help` replaces
    that command.
    """

    label: str | None = None
    pattern: str = "**"
    help: str | None = None


def tree_command(source: str, pattern: str) -> str:
    """Return the command that shows what a pattern matches."""
    return f"`devmap tree {shlex.quote(source)} --match {_quoted(pattern)}`"


def _quoted(pattern: str) -> str:
    return "'" + pattern.replace("'", "'\\''") + "'"


def nearest_to(pattern: Pattern, failure: MatchFailure | None, graph: ModelGraph) -> Suggestion:
    """Return the suggestion for a pattern, given the point in the tree at which it failed."""
    if isinstance(pattern, ClassPattern):
        return _nearest_class(pattern, graph)
    if (dotted := NO_DOT.sub(".[", pattern.text)) != pattern.text:
        return Suggestion(label=f"a range is a segment of its own: `{dotted}`", pattern=dotted)
    if failure is None:
        return Suggestion(label="no path of the model matches as a whole")
    segment = failure.path[failure.position]
    node = graph.modules.get(failure.node)  # type: ignore[call-overload]
    if node is None:
        return Suggestion(label=f"`{failure.node}` is a tensor: nothing is below it", pattern=failure.node)
    if fused := _fused(node, segment):
        return fused
    if failure.position == 0 and (elsewhere := _with_prefix(failure.path, graph)):
        return elsewhere
    if (numbered := _numbered(node, segment, graph)) is not None:
        return numbered
    spelling = segment.literal or "".join(getattr(piece, "text", "") for piece in segment.pieces)
    children = children_of(node)
    close = difflib.get_close_matches(spelling, list(children), n=1, cutoff=0.5) if spelling else []
    if not close:
        below = ", ".join(f"`{child}`" for child in list(children)[:6]) or "nothing"
        where = f"`{node.path}`" if node.path else graph.class_name
        more = ", …" if len(children) > 6 else ""
        return Suggestion(label=f"{where} holds {below}{more}", pattern=_joined(node.path, "*"))
    path = _joined(node.path, close[0])
    whole = _completed(path, failure.path[failure.position + 1 :], graph)
    if whole is not None:
        return Suggestion(label=f"nearest: {described(whole, graph)}", pattern=whole)
    return Suggestion(label=f"nearest: {described(path, graph)}", pattern=_joined(path, "*"))


def described(path: str, graph: ModelGraph) -> str:
    """Return a path with the number of its numbered children: `model.layers` (80 layers)."""
    module = graph.modules.get(path)  # type: ignore[call-overload]
    if module is None:
        return f"`{path}`"
    count = sum(child.path.rpartition(".")[2].isdigit() for child in module.children)
    last = path.rpartition(".")[2]
    return f"`{path}` ({count} {last if last.endswith('s') else 'modules'})" if count else f"`{path}`"


def _numbered(node: Module, segment: FlatSegment, graph: ModelGraph) -> Suggestion | None:
    """Suggest a number that exists, or a range with its brackets."""
    numbers = sorted(number for child in children_of(node) if (number := number_in(child)) is not None)
    text = segment.literal or ""
    if not numbers or not text[:1].isdecimal():
        return None
    if text.isdecimal():
        return Suggestion(label=f"{described(node.path, graph)} ends at {numbers[-1]}", pattern=_joined(node.path, "*"))
    return Suggestion(
        label=f"a range has brackets: `{_joined(node.path, f'[{text}]')}`", pattern=_joined(node.path, "*")
    )


def _completed(path: str, rest: tuple[FlatSegment, ...], graph: ModelGraph) -> str | None:
    """Return a path followed by the rest of a pattern, each name replaced by the nearest one; `None` if it leads
    nowhere.
    """
    for segment in rest:
        node = graph.modules.get(path)  # type: ignore[call-overload]
        if node is None or segment.literal is None:
            return None
        children = list(children_of(node))
        close = (
            [segment.literal] if segment.literal in children else difflib.get_close_matches(segment.literal, children)
        )
        if not close or (segment.literal.isdigit() and close[0] != segment.literal):
            return None
        path = _joined(path, close[0])
    return path


def _fused(node: Module, segment: FlatSegment) -> Suggestion | None:
    """Explain that experts have no numbers in a model that holds all of them in one tensor."""
    is_number = bool(segment.indices) or (segment.literal or "").isdigit()
    fused = node.experts
    if not is_number or not fused:
        return None
    return Suggestion(
        label=f"`{node.path}` holds its {fused[0].shape[0]} experts in one tensor each",
        pattern=_joined(node.path, "*"),
        help=f"fused experts have one home: pin `{node.path}`, or its `{fused[0].name.rpartition('.')[2]}`",
    )


def _with_prefix(path: tuple[FlatSegment, ...], graph: ModelGraph) -> Suggestion | None:
    """Suggest a path with its missing beginning (`model.layers.0` for `layers.0`), or with this model's beginning."""
    literal = [segment.literal for segment in path]
    for skipped in range(len(path)):
        names: list[str] = []
        for name in literal[skipped:]:
            if name is None or name.isdigit():
                break
            names.append(name)
        if not names:
            continue
        ending = ".".join(names)
        paths = [str(module) for module in graph.modules if module == ending or module.endswith("." + ending)]
        if paths:
            shortest = min(paths, key=len)
            rest = skipped + len(names) < len(path)
            return Suggestion(
                label=f"nearest: {described(shortest, graph)}", pattern=_joined(shortest, "*") if rest else shortest
            )
    return None


def _nearest_class(pattern: ClassPattern, graph: ModelGraph) -> Suggestion:
    classes = list(dict.fromkeys(module.class_name for module in graph.root.walk()))
    if pattern.class_name in classes and pattern.scope is not None:
        return Suggestion(
            label=f"no {pattern.class_name} at or below `{pattern.scope.text}`", pattern=f"class:{pattern.class_name}"
        )
    close = difflib.get_close_matches(pattern.class_name, classes, n=1, cutoff=0.3)
    if close:
        return Suggestion(label=f"nearest class: `{close[0]}`", pattern=f"class:{close[0]}")
    return Suggestion(label=f"classes are {', '.join(f'`{name}`' for name in classes[:6])}")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
