"""The one matcher: a walk over the module tree that follows a pattern, never an expansion into many patterns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import re2

from devmap_config.graph.model import Module, Tensor
from devmap_config.rules.pattern import (
    Alternatives,
    AnyCharacter,
    AnySegments,
    ClassPattern,
    Indices,
    Literal,
    PathPattern,
    Pattern,
    PatternError,
    Piece,
    RegexPattern,
    compile_expression,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.graph.model import ModelGraph
    from devmap_config.rules.pattern import Path

MAX_ALTERNATIVES = 512
"""Paths that the braces of one pattern may stand for."""

INDEX = "(0|[1-9][0-9]*)"

Node: TypeAlias = "Module | Tensor"


@dataclass(frozen=True, slots=True)
class BeyondEnd:
    """A range that asks for more than there is: of these indices under this parent."""

    indices: Indices
    parent: str
    existing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stuck:
    """How far an unmatched pattern got: at this node, no child answers to segment `position` of this path."""

    node: str
    path: tuple[FlatSegment, ...]
    position: int


@dataclass(frozen=True)
class Match:
    """What a pattern matches: paths of modules and names of tensors, depth first; and what it asks beyond."""

    names: tuple[str, ...]
    beyond: tuple[BeyondEnd, ...] = ()
    stuck: Stuck | None = None


@dataclass(frozen=True)
class FlatSegment:
    """A segment without braces; `start` and `end` are its place in the pattern's text."""

    pieces: tuple[Piece, ...]
    start: int
    end: int

    @property
    def is_any_segments(self) -> bool:
        """Whether it is `**`."""
        return bool(self.pieces) and isinstance(self.pieces[0], AnySegments)

    @property
    def literal(self) -> str | None:
        """The one name it stands for."""
        if all(isinstance(piece, Literal) for piece in self.pieces):
            return "".join(piece.text for piece in self.pieces if isinstance(piece, Literal))
        return None

    @property
    def indices(self) -> tuple[Indices, ...]:
        """Its ranges, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Indices))

    @cached_property
    def expression(self) -> re2._Regexp:
        """A name that it may stand for, with a group for each range."""
        return compile_expression("".join(map(_expression, self.pieces)))


def _expression(piece: Piece) -> str:
    if isinstance(piece, Literal):
        escaped: str = re2.escape(piece.text)
        return escaped
    if isinstance(piece, Indices):
        return INDEX
    return "(?s:.)" if isinstance(piece, AnyCharacter) else "(?s:.*)"


def match(pattern: Pattern, graph: ModelGraph) -> Match:
    """Everything in the model's tree that a pattern matches; a match means the whole subtree.

    Raises:
        PatternError: where its braces stand for too many paths.
    """
    if isinstance(pattern, RegexPattern):
        expression = compile_expression(pattern.expression)
        return Match(tuple(name for name in _all_names(graph.root) if expression.fullmatch(name)))
    if isinstance(pattern, ClassPattern):
        return _match_class(pattern, graph)
    return _Walk(pattern, graph).result()


def _match_class(pattern: ClassPattern, graph: ModelGraph) -> Match:
    if pattern.scope is None:
        return Match(tuple(module.path for module in graph.root.walk() if module.class_name == pattern.class_name))
    scope = _Walk(pattern.scope, graph).result()
    found: dict[str, None] = {}
    for path in scope.names:
        if path in graph.modules:
            for module in graph.modules[path].walk():  # type: ignore[index]
                if module.class_name == pattern.class_name:
                    found[module.path] = None
    return Match(tuple(found), scope.beyond, scope.stuck)


def _all_names(module: Module) -> Iterator[str]:
    yield module.path
    for tensor in module.own_tensors:
        yield tensor.name
    for child in module.children:
        yield from _all_names(child)


def flatten(path: Path, start: int, end: int) -> list[tuple[FlatSegment, ...]]:
    """The paths without braces that a path stands for.

    Raises:
        PatternError: where there are too many of them.
    """
    flattened: list[tuple[FlatSegment, ...]] = [()]
    for segment in path:
        ways: list[list[tuple[Piece, ...]]] = [[()]]
        for piece in segment.pieces:
            ways = _joined(ways, piece, start, end)
        tails = [tuple(FlatSegment(pieces, segment.start, segment.end) for pieces in way) for way in ways]
        flattened = [head + tail for head in flattened for tail in tails]
        _check_count(len(flattened), start, end)
    return flattened


def _joined(ways: list[list[tuple[Piece, ...]]], piece: Piece, start: int, end: int) -> list[list[tuple[Piece, ...]]]:
    """Each way, a list of segments, with a piece put to its last one; braces with dots begin new segments."""
    if not isinstance(piece, Alternatives):
        return [[*way[:-1], (*way[-1], piece)] for way in ways]
    joined: list[list[tuple[Piece, ...]]] = []
    for alternative in piece.paths:
        for flat in flatten(alternative, start, end):
            first, *rest = (segment.pieces for segment in flat)
            joined += [[*way[:-1], way[-1] + first, *rest] for way in ways]
            _check_count(len(joined), start, end)
    return joined


def _check_count(count: int, start: int, end: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise PatternError(
            f"the braces stand for more than {MAX_ALTERNATIVES} paths", start, end, "write several rules, or use `*`"
        )


@dataclass
class _Walk:
    """One pass over the tree with the set of places in the pattern that a node may be at."""

    pattern: PathPattern
    graph: ModelGraph
    names: list[str] = field(default_factory=list)
    beyond: list[BeyondEnd] = field(default_factory=list)
    within: set[int] = field(default_factory=set)
    furthest: Stuck | None = None

    def result(self) -> Match:
        paths = flatten(self.pattern.path, 0, len(self.pattern.text))
        self.visit(self.graph.root, self.closed({(path, 0): None for path in paths}))
        # Below a wildcard a range may reach beyond the end of some parents, but not of all.
        beyond = tuple(
            each for each in self.beyond if not each.indices.after_wildcard or each.indices.start not in self.within
        )
        return Match(tuple(dict.fromkeys(self.names)), beyond, None if self.names else self.furthest)

    def closed(self, states: dict[_State, None]) -> dict[_State, None]:
        """The states with those that `**` reaches without taking a segment."""
        closed: dict[_State, None] = {}
        waiting = list(states)
        while waiting:
            path, position = waiting.pop(0)
            if (path, position) in closed:
                continue
            closed[path, position] = None
            if position < len(path) and path[position].is_any_segments:
                waiting.append((path, position + 1))
        return closed

    def visit(self, node: Node, states: dict[_State, None]) -> None:
        name = _name(node)
        if any(position == len(path) for path, position in states):
            self.names.append(name)
        children = children_of(node)
        following: dict[str, dict[_State, None]] = {}
        for path, position in states:
            if position == len(path):
                continue
            if self.furthest is None or position > self.furthest.position:
                self.furthest = Stuck(name, path, position)
            segment = path[position]
            if segment.is_any_segments:
                for child in children:
                    following.setdefault(child, {})[path, position] = None
            else:
                for child in self.answering(segment, children, name):
                    following.setdefault(child, {})[path, position + 1] = None
        for child, child_node in children.items():
            if child in following:
                self.visit(child_node, self.closed(following[child]))

    def answering(self, segment: FlatSegment, children: Mapping[str, Node], parent: str) -> list[str]:
        """The children that a segment stands for."""
        if segment.literal is not None:
            return [segment.literal] if segment.literal in children else []
        found = {child: match for child in children if (match := segment.expression.fullmatch(child))}
        for group, indices in enumerate(segment.indices, start=1):
            numbers = {child: int(match.group(group)) for child, match in found.items()}
            existing = sorted(set(numbers.values()))
            if not existing:
                return []
            if self.asks_beyond(indices, existing):
                self.beyond.append(BeyondEnd(indices, parent, tuple(existing)))
            else:
                self.within.add(indices.start)
            selected = indices.select(existing)
            found = {child: match for child, match in found.items() if numbers[child] in selected}
        return list(found)

    @staticmethod
    def asks_beyond(indices: Indices, existing: list[int]) -> bool:
        return any(hasattr(item, "asks_beyond") and item.asks_beyond(existing) for item in indices.items)


_State: TypeAlias = "tuple[tuple[FlatSegment, ...], int]"


def children_of(node: Node) -> dict[str, Node]:
    """What is directly below a node by its last name; tensors are leaves."""
    if not isinstance(node, Module):
        return {}
    below: dict[str, Node] = {_name(tensor).rpartition(".")[2]: tensor for tensor in node.own_tensors}
    for child in node.children:
        below[child.path.rpartition(".")[2]] = child
    return below


def _name(node: Node) -> str:
    return node.path if isinstance(node, Module) else node.name
