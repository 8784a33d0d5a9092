"""Matches patterns. The pattern is an automaton that walks the module tree once; only braces are expanded."""

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
"""The most steps of one pattern, and of all in a profile: as many as sixty that begin with `**` take in 100,000
tensors.
"""

MAX_ALTERNATIVES = 512
"""The most paths that the braces of one pattern may stand for."""

INDEX = "(0|[1-9][0-9]{0,8})"

Node: TypeAlias = "Module | Tensor"


@dataclass(frozen=True, slots=True)
class BeyondEnd:
    """A range that names indices which do not exist under a parent.

    Attributes:
        indices: the range.
        parent: the path of the module whose children are counted.
        existing: the indices that exist under it.
    """

    indices: Indices
    parent: str
    existing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MatchFailure:
    """The deepest point at which an unmatched pattern failed; suggestions start from it.

    Attributes:
        node: the path of the module down to which the pattern matched.
        path: the pattern's segments.
        position: the index of the segment that no child of the node matches.
    """

    node: str
    path: tuple[FlatSegment, ...]
    position: int


@dataclass(frozen=True)
class Match:
    """The result of matching a pattern to a model.

    Attributes:
        names: paths of modules and names of tensors, depth first.
        beyond: ranges that name indices which do not exist.
        failure: the deepest point of failure; `None` if anything matched.
        dead: places in the pattern's text of alternatives, as in `{norm,embd}`, that no match used.
        steps: the work: pairs of a node and a place in the pattern that were compared.
    """

    names: tuple[str, ...]
    beyond: tuple[BeyondEnd, ...] = ()
    failure: MatchFailure | None = None
    dead: tuple[tuple[int, int], ...] = ()
    steps: int = field(default=0, compare=False)


@dataclass(frozen=True)
class FlatSegment:
    """A segment without braces; `start` and `end` are its place in the pattern's text.

    >>> FlatSegment((Literal("layers"),), 0, 6).literal
    'layers'
    """

    pieces: tuple[Piece, ...]
    start: int
    end: int

    @cached_property
    def is_any_segments(self) -> bool:
        """True if the segment is `**`."""
        return bool(self.pieces) and isinstance(self.pieces[0], AnySegments)

    @cached_property
    def is_any_text(self) -> bool:
        """True if the segment is `*`."""
        return len(self.pieces) == 1 and isinstance(self.pieces[0], AnyText)

    @cached_property
    def is_bare_range(self) -> bool:
        """True if the segment is a range and nothing else."""
        return len(self.pieces) == 1 and isinstance(self.pieces[0], Indices)

    @cached_property
    def literal(self) -> str | None:
        """The one name that the segment stands for, or `None` if it may stand for several."""
        if all(isinstance(piece, Literal) for piece in self.pieces):
            return "".join(piece.text for piece in self.pieces if isinstance(piece, Literal))
        return None

    @cached_property
    def indices(self) -> tuple[Indices, ...]:
        """The ranges of the segment, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Indices))

    @cached_property
    def expression(self) -> CompiledExpression:
        """The regular expression of the names that the segment stands for, with a group for each range."""
        return compile_expression("".join(map(_expression, self.pieces)))


def _expression(piece: Piece) -> str:
    if isinstance(piece, Literal):
        escaped: str = re2.escape(piece.text)
        return escaped
    if isinstance(piece, Indices):
        return INDEX
    return "(?s:.)" if isinstance(piece, AnyCharacter) else "(?s:.*)"


def match(pattern: Pattern, graph: ModelGraph) -> Match:
    """Find the modules and tensors of a model that a pattern matches; a matched module stands for its whole subtree.

    Args:
        pattern: a parsed pattern.
        graph: the module tree.

    Returns:
        The names that match and, if none does, the point of failure.

    Raises:
        PatternError: if the pattern's braces stand for too many paths, or matching takes too many steps.
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
    matched: dict[str, None] = {}
    for path in scope.names:
        if path in graph.modules:
            for module in graph.modules[path].walk():  # type: ignore[index]
                if module.class_name == pattern.class_name:
                    matched[module.path] = None
    return Match(tuple(matched), scope.beyond, scope.failure, steps=scope.steps + len(matched))


def _all_names(module: Module) -> Iterator[str]:
    yield module.path
    for tensor in module.own_tensors:
        yield tensor.name
    for child in module.children:
        yield from _all_names(child)


@dataclass(frozen=True, slots=True)
class FlatPath:
    """A path without braces, and the alternatives that it was made from, as places in the pattern's text."""

    segments: tuple[FlatSegment, ...]
    alternatives: frozenset[tuple[int, int]] = frozenset()


def flatten(path: Path, start: int, end: int) -> list[FlatPath]:
    """Expand the braces of a path into paths without braces.

    Args:
        path: the path.
        start: the place of the pattern in its text, for errors.
        end: the place after it.

    Raises:
        PatternError: if there are more than `MAX_ALTERNATIVES` of them.

    Example:
        >>> from devmap_config.rules.pattern import parse_pattern
        >>> paths = flatten(parse_pattern("layers.{norm,mlp.down}").path, 0, 22)
        >>> [[segment.literal for segment in path.segments] for path in paths]
        [['layers', 'norm'], ['layers', 'mlp', 'down']]
    """
    flattened = [FlatPath(())]
    for segment in path:
        expanded = [FlatPath((FlatSegment((), segment.start, segment.end),))]
        for piece in segment.pieces:
            expanded = _joined(expanded, piece, start, end)
        flattened = [
            FlatPath(head.segments + tail.segments, head.alternatives | tail.alternatives)
            for head in flattened
            for tail in expanded
        ]
        _check_count(len(flattened), start, end)
    return flattened


def _joined(paths: list[FlatPath], piece: Piece, start: int, end: int) -> list[FlatPath]:
    """Return each path with a piece appended to its last segment; braces that hold dots begin new segments."""
    if not isinstance(piece, Alternatives):
        return [_extended(path, (FlatSegment((piece,), 0, 0),), frozenset()) for path in paths]
    joined: list[FlatPath] = []
    for alternative in piece.paths:
        place = frozenset({(alternative[0].start, alternative[-1].end)})
        for flat in flatten(alternative, start, end):
            joined += [_extended(path, flat.segments, flat.alternatives | place) for path in paths]
            _check_count(len(joined), start, end)
    return joined


def _extended(path: FlatPath, more: tuple[FlatSegment, ...], alternatives: frozenset[tuple[int, int]]) -> FlatPath:
    """Return a path whose last segment is continued by the first of `more`, and followed by the others."""
    *before, last = path.segments
    first, *rest = more
    joint = FlatSegment(last.pieces + first.pieces, last.start, last.end)
    others = (FlatSegment(segment.pieces, last.start, last.end) for segment in rest)
    return FlatPath((*before, joint, *others), path.alternatives | alternatives)


def _check_count(count: int, start: int, end: int) -> None:
    if count > MAX_ALTERNATIVES:
        raise PatternError(
            f"the braces stand for more than {MAX_ALTERNATIVES} paths", start, end, "write several rules, or use `*`"
        )


State: TypeAlias = tuple[int, int]
"""A state of the automaton: the index of a flat path, and the number of its segments that have matched."""


@dataclass
class _Walk:
    """One depth-first walk over the tree. The pattern is a nondeterministic automaton: each node is visited with its
    states.

    Attributes:
        names: the paths that matched.
        beyond: ranges that named indices which do not exist under some parent.
        within: the places of ranges all of whose indices exist under some parent.
        finished: the flat paths that matched something.
        steps: pairs of node and state that were compared.
        furthest: the deepest point of failure.
    """

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
        self.visit(self.graph.root, self.closure([(index, 0) for index in range(len(self.paths))]))
        # Below a wildcard, parents may have fewer indices than a range names, as long as one has enough.
        beyond = tuple(
            ask for ask in self.beyond if not ask.indices.after_wildcard or ask.indices.start not in self.within
        )
        alive = frozenset(place for index in self.finished for place in flat[index].alternatives)
        dead = sorted({place for path in flat for place in path.alternatives} - alive)
        names = tuple(dict.fromkeys(self.names))
        return Match(names, beyond, None if names else self.furthest, tuple(dead) if names else (), self.steps)

    def closure(self, states: list[State]) -> list[State]:
        """Return the epsilon closure of the states: also those that a `**` reaches by standing for no segment."""
        reached: dict[State, None] = {}
        for index, start in states:
            path, position = self.paths[index], start
            while (index, position) not in reached:  # the states that follow a reached one are reached as well
                reached[index, position] = None
                if position < len(path) and path[position].is_any_segments:
                    position += 1
        return list(reached)

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
                matching: Iterable[str] = children
                then = (index, position)
            else:
                matching = self.matching_children(segment, children, node)
                then = (index, position + 1)
            for child in matching:
                following.setdefault(child, []).append(then)
        for child, child_node in children.items():
            if child in following:
                self.visit(child_node, self.closure(following[child]))

    def matching_children(self, segment: FlatSegment, children: Mapping[str, Node], parent: Node) -> Iterable[str]:
        """Return the children that a segment matches; note ranges that name indices which do not exist."""
        if segment.literal is not None:
            return (segment.literal,) if segment.literal in children else ()
        if segment.is_any_text:
            return children
        if segment.is_bare_range:
            numbered = {child: (child,) for child in children if number_in(child) is not None}
        else:
            matches = ((child, segment.expression.fullmatch(child)) for child in children)
            numbered = {child: match.groups() for child, match in matches if match}
        for group, indices in enumerate(segment.indices):
            numbers = {child: int(groups[group]) for child, groups in numbered.items()}
            existing = sorted(set(numbers.values()))
            if not existing:
                return ()
            if indices.asks_beyond(existing):
                self.beyond.append(BeyondEnd(indices, _name(parent), tuple(existing)))
            else:
                self.within.add(indices.start)
            selected = indices.select(existing)
            numbered = {child: groups for child, groups in numbered.items() if numbers[child] in selected}
        return numbered


def children_of(node: Node) -> dict[str, Node]:
    """Return the children of a node by the last part of their names; tensors have none."""
    if not isinstance(node, Module):
        return {}
    start = len(node.path) + 1 if node.path else 0
    below: dict[str, Node] = {tensor.name[start:]: tensor for tensor in node.own_tensors}
    for child in node.children:
        below[child.path[start:]] = child
    return below


def _name(node: Node) -> str:
    return node.path if isinstance(node, Module) else node.name
