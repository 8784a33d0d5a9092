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
    AnyText,
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
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.graph.model import ModelGraph
    from devmap_config.rules.pattern import CompiledExpression, Path

MAX_STEPS = 20_000_000
"""Of one pattern, and of all those of a profile: sixty that begin with `**`, held to a model of 100,000 tensors."""

MAX_ALTERNATIVES = 512
"""Paths that the braces of one pattern may stand for."""

INDEX = "(0|[1-9][0-9]{0,8})"

Node: TypeAlias = "Module | Tensor"


@dataclass(frozen=True, slots=True)
class BeyondEnd:
    """A range that asks for more than there is: of these indices under this parent."""

    indices: Indices
    parent: str
    existing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatchFailure:
    """How far an unmatched pattern got: at this node, no child answers to segment `position` of this path."""

    node: str
    path: tuple[FlatSegment, ...]
    position: int


@dataclass(frozen=True)
class Match:
    """What a pattern matches: paths of modules and names of tensors, depth first; and what it asks beyond.

    `dead` are the places in its text of alternatives (`{norm,embd}`) that no match takes. `steps` is how long it took
    to find: places in the pattern that nodes were held to.
    """

    names: tuple[str, ...]
    beyond: tuple[BeyondEnd, ...] = ()
    failure: MatchFailure | None = None
    dead: tuple[tuple[int, int], ...] = ()
    steps: int = field(default=0, compare=False)


@dataclass(frozen=True)
class FlatSegment:
    """A segment without braces; `start` and `end` are its place in the pattern's text."""

    pieces: tuple[Piece, ...]
    start: int
    end: int

    @cached_property
    def is_any_segments(self) -> bool:
        """Whether it is `**`."""
        return bool(self.pieces) and isinstance(self.pieces[0], AnySegments)

    @cached_property
    def is_any_text(self) -> bool:
        """Whether it is `*`."""
        return len(self.pieces) == 1 and isinstance(self.pieces[0], AnyText)

    @cached_property
    def is_bare_range(self) -> bool:
        """Whether it is a range and nothing else."""
        return len(self.pieces) == 1 and isinstance(self.pieces[0], Indices)

    @cached_property
    def literal(self) -> str | None:
        """The one name it stands for."""
        if all(isinstance(piece, Literal) for piece in self.pieces):
            return "".join(piece.text for piece in self.pieces if isinstance(piece, Literal))
        return None

    @cached_property
    def indices(self) -> tuple[Indices, ...]:
        """Its ranges, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Indices))

    @cached_property
    def expression(self) -> CompiledExpression:
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
        names = tuple(name for name in _all_names(graph.root) if expression.fullmatch(name))
        return Match(names, steps=len(graph.modules) + len(graph.tensors))
    if isinstance(pattern, ClassPattern):
        return _match_class(pattern, graph)
    return _Walk(pattern, graph).result()


def _match_class(pattern: ClassPattern, graph: ModelGraph) -> Match:
    if pattern.scope is None:
        names = tuple(module.path for module in graph.root.walk() if module.class_name == pattern.class_name)
        return Match(names, steps=len(graph.modules))
    scope = _Walk(pattern.scope, graph).result()
    found: dict[str, None] = {}
    for path in scope.names:
        if path in graph.modules:
            for module in graph.modules[path].walk():  # type: ignore[index]
                if module.class_name == pattern.class_name:
                    found[module.path] = None
    return Match(tuple(found), scope.beyond, scope.failure, steps=scope.steps + len(found))


def _all_names(module: Module) -> Iterator[str]:
    yield module.path
    for tensor in module.own_tensors:
        yield tensor.name
    for child in module.children:
        yield from _all_names(child)


@dataclass(frozen=True, slots=True)
class FlatPath:
    """A path without braces, and the alternatives (their places in the text) that it takes out of them."""

    segments: tuple[FlatSegment, ...]
    alternatives: frozenset[tuple[int, int]] = frozenset()


def flatten(path: Path, start: int, end: int) -> list[FlatPath]:
    """The paths without braces that a path stands for.

    Raises:
        PatternError: where there are too many of them.
    """
    flattened = [FlatPath(())]
    for segment in path:
        ways = [FlatPath((FlatSegment((), segment.start, segment.end),))]
        for piece in segment.pieces:
            ways = _joined(ways, piece, start, end)
        flattened = [
            FlatPath(head.segments + tail.segments, head.alternatives | tail.alternatives)
            for head in flattened
            for tail in ways
        ]
        _check_count(len(flattened), start, end)
    return flattened


def _joined(ways: list[FlatPath], piece: Piece, start: int, end: int) -> list[FlatPath]:
    """Each way with a piece put to its last segment; braces with dots begin new segments."""
    if not isinstance(piece, Alternatives):
        return [_extended(way, (FlatSegment((piece,), 0, 0),), frozenset()) for way in ways]
    joined: list[FlatPath] = []
    for alternative in piece.paths:
        place = frozenset({(alternative[0].start, alternative[-1].end)})
        for flat in flatten(alternative, start, end):
            joined += [_extended(way, flat.segments, flat.alternatives | place) for way in ways]
            _check_count(len(joined), start, end)
    return joined


def _extended(way: FlatPath, more: tuple[FlatSegment, ...], alternatives: frozenset[tuple[int, int]]) -> FlatPath:
    """A way whose last segment goes on with the first of more segments, followed by the rest of them."""
    *before, last = way.segments
    first, *rest = more
    joint = FlatSegment(last.pieces + first.pieces, last.start, last.end)
    others = (FlatSegment(segment.pieces, last.start, last.end) for segment in rest)
    return FlatPath((*before, joint, *others), way.alternatives | alternatives)


def _check_count(count: int, start: int, end: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise PatternError(
            f"the braces stand for more than {MAX_ALTERNATIVES} paths", start, end, "write several rules, or use `*`"
        )


State: TypeAlias = tuple[int, int]
"""A place in the pattern: which of its paths, and how many of that path's segments are taken."""


@dataclass
class _Walk:
    """One pass over the tree with the set of places in the pattern that a node may be at."""

    pattern: PathPattern
    graph: ModelGraph
    names: list[str] = field(default_factory=list)
    beyond: list[BeyondEnd] = field(default_factory=list)
    within: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    steps: int = 0
    furthest: MatchFailure | None = None

    def result(self) -> Match:
        flat = flatten(self.pattern.path, 0, len(self.pattern.text))
        self.paths = [path.segments for path in flat]
        self.steps = sum(map(len, self.paths))
        self.visit(self.graph.root, self.closed([(index, 0) for index in range(len(self.paths))]))
        # Below a wildcard a range may reach beyond the end of some parents, but not of all.
        beyond = tuple(
            each for each in self.beyond if not each.indices.after_wildcard or each.indices.start not in self.within
        )
        alive = frozenset(place for index in self.finished for place in flat[index].alternatives)
        dead = sorted({place for path in flat for place in path.alternatives} - alive)
        names = tuple(dict.fromkeys(self.names))
        return Match(names, beyond, None if names else self.furthest, tuple(dead) if names else (), self.steps)

    def closed(self, states: list[State]) -> list[State]:
        """The states with those that `**` reaches without taking a segment, each once."""
        closed: dict[State, None] = {}
        for index, start in states:
            path, position = self.paths[index], start
            while (index, position) not in closed:  # what follows one that is there is there as well
                closed[index, position] = None
                if position < len(path) and path[position].is_any_segments:
                    position += 1
        return list(closed)

    def take_steps(self, count: int) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            message = f"it takes more than {MAX_STEPS:,} steps to hold the model to it"
            raise PatternError(message, 0, len(self.pattern.text), "write a shorter pattern")

    def visit(self, node: Node, states: list[State]) -> None:
        self.take_steps(len(states))
        unfinished = [(index, position) for index, position in states if position < len(self.paths[index])]
        if len(unfinished) < len(states):
            self.names.append(_name(node))
            self.finished.update(index for index, position in states if position == len(self.paths[index]))
        if not unfinished:
            return
        children = children_of(node)
        self.take_steps(len(children))
        following: dict[str, list[State]] = {}
        for index, position in unfinished:
            if self.furthest is None or position > self.furthest.position:
                self.furthest = MatchFailure(_name(node), self.paths[index], position)
            segment = self.paths[index][position]
            if segment.is_any_segments:
                answering: Iterable[str] = children
                then = (index, position)
            else:
                answering = self.answering(segment, children, node)
                then = (index, position + 1)
            for child in answering:
                following.setdefault(child, []).append(then)
        for child, child_node in children.items():
            if child in following:
                self.visit(child_node, self.closed(following[child]))

    def answering(self, segment: FlatSegment, children: Mapping[str, Node], parent: Node) -> Iterable[str]:
        """The children that a segment stands for."""
        if segment.literal is not None:
            return (segment.literal,) if segment.literal in children else ()
        if segment.is_any_text:
            return children
        if segment.is_bare_range:
            found = {child: (child,) for child in children if number_in(child) is not None}
        else:
            matches = ((child, segment.expression.fullmatch(child)) for child in children)
            found = {child: match.groups() for child, match in matches if match}
        for group, indices in enumerate(segment.indices):
            numbers = {child: int(groups[group]) for child, groups in found.items()}
            existing = sorted(set(numbers.values()))
            if not existing:
                return ()
            if indices.asks_beyond(existing):
                self.beyond.append(BeyondEnd(indices, _name(parent), tuple(existing)))
            else:
                self.within.add(indices.start)
            selected = indices.select(existing)
            found = {child: groups for child, groups in found.items() if numbers[child] in selected}
        return found


def children_of(node: Node) -> dict[str, Node]:
    """What is directly below a node by its last name; tensors are leaves."""
    if not isinstance(node, Module):
        return {}
    start = len(node.path) + 1 if node.path else 0
    below: dict[str, Node] = {tensor.name[start:]: tensor for tensor in node.own_tensors}
    for child in node.children:
        below[child.path[start:]] = child
    return below


def _name(node: Node) -> str:
    return node.path if isinstance(node, Module) else node.name
