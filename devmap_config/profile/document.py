"""YAML as immutable nodes with their places: YAML 1.2 scalars, no duplicate keys, bounded size and depth."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import yaml
from yaml.events import AliasEvent, MappingStartEvent, ScalarEvent, SequenceEndEvent, SequenceStartEvent

from devmap_config.diagnostics.diagnostic import Related, Span
from devmap_config.files import LINE_BREAK
from devmap_config.profile.device_names import kind_of
from devmap_config.profile.syntax import SourceText
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink

MAX_CHARACTERS = 1_000_000
MAX_SCALAR_CHARACTERS = 10_000
"""Longer than any path, pattern or description that somebody writes, so that their parsers may be slow on long texts.
"""
MAX_NODES = 100_000
"""The most nodes of a document, counted with every alias followed."""
MAX_DEPTH = 40

UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Value: TypeAlias = "str | int | float | bool | None"

CORE_SCHEMA: tuple[tuple[re.Pattern[str], Callable[[str], Value]], ...] = (
    (re.compile(r"~|null|Null|NULL|"), lambda _: None),
    (re.compile(r"true|True|TRUE"), lambda _: True),
    (re.compile(r"false|False|FALSE"), lambda _: False),
    (re.compile(r"[-+]?[0-9]{1,4000}"), int),
    (re.compile(r"0o[0-7]{1,1000}|0x[0-9a-fA-F]{1,1000}"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", "", 1))),
)
"""The patterns of plain scalars that YAML 1.2 does not read as text, each with the function that reads it."""


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """One value as it was written.

    Attributes:
        text: the value, unquoted and unescaped.
        span: its place.
        is_plain: false for quoted and block text, which is text whatever it looks like.
        is_verbatim: `text` stands in the file character for character, so that places within it are known.
        content_column: the column in which `text` begins, behind a quote.
        is_unrendered: the value is a template that could not be rendered, or not the name of a device; this was
            reported.
    """

    text: str
    span: Span
    is_plain: bool = True
    is_verbatim: bool = False
    content_column: int = 0
    is_unrendered: bool = False

    @property
    def value(self) -> Value:
        """The value by YAML 1.2's core schema."""
        return plain_value(self.text) if self.is_plain else self.text

    def span_within(self, start: int, end: int) -> Span:
        """Return the place of characters `start` to `end` (exclusive), or of the whole value if that is not known."""
        if not self.is_verbatim:
            return self.span
        column = self.content_column
        return replace(self.span, column=column + start, end_column=column + max(end, start + 1))


@dataclass(frozen=True, slots=True)
class SequenceNode:
    """A list."""

    items: tuple[Node, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class MappingNode:
    """A mapping; its entries keep their order."""

    entries: tuple[Entry, ...]
    span: Span

    def get(self, key: str) -> Node | None:
        """Return the value under a key, or `None`."""
        return next((entry.value for entry in self.entries if entry.key.text == key), None)

    def only(self, is_wanted: Callable[[str], bool]) -> MappingNode:
        """Return the mapping reduced to the entries whose key `is_wanted`."""
        return replace(self, entries=tuple(entry for entry in self.entries if is_wanted(entry.key.text)))


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value."""

    key: ScalarNode
    value: Node


Node: TypeAlias = "ScalarNode | SequenceNode | MappingNode"


def plain_value(text: str) -> Value:
    """Return the value of an unquoted scalar by YAML 1.2's core schema.

    >>> plain_value("no"), plain_value("010"), plain_value("12:30"), plain_value("~")
    ('no', 10, '12:30', None)
    """
    return next((read(text) for pattern, read in CORE_SCHEMA if pattern.fullmatch(text)), text)


def is_null(node: Node | None) -> bool:
    """Return whether a node is `null`, or the missing value of a key."""
    return isinstance(node, ScalarNode) and node.value is None


def whole_file(file: str) -> Span:
    """Return the place for a mistake of a file as a whole: its beginning."""
    return Span.within_line(file, 1, 1)


def without_duplicates(entries: Iterable[Entry], sink: Sink) -> tuple[Entry, ...]:
    """Return the entries whose key is not in an earlier entry, and report the others."""
    first: dict[str, Entry] = {}
    for entry in entries:
        earlier = first.setdefault(entry.key.text, entry)
        if earlier is not entry:
            report_duplicate(entry.key.text, entry.key, earlier.key, sink)
    return tuple(first.values())


def report_duplicate(name: str, key: ScalarNode, earlier: ScalarNode, sink: Sink) -> None:
    """Report a key that is written twice."""
    related = (Related(message="first given here", span=earlier.span),)
    help = "remove one of them"
    if kind_of(name) is not None:
        help += ", or give it a number of its own; equal devices are a range, as `cuda:[0-1]`"
    sink.error("duplicate-key", f"`{name}` is given twice", key.span, help=help, related=related)


def parse_document(text: str, file: str, sink: Sink) -> MappingNode | None:
    """Parse a YAML file whose root is a mapping.

    Args:
        text: the content of the file.
        file: its name, for places.
        sink: takes the diagnostics.

    Returns:
        The mapping, or `None` if the text is not one.
    """
    source = SourceText(text, file, sink)
    try:
        root = _Composer(source).document()
    except yaml.MarkedYAMLError as error:
        source.report(error)
        return None
    except _RefusedError:
        return None
    if isinstance(root, MappingNode):
        return root
    message = "a profile is a mapping of keys to values" if root is not None else "the file is empty"
    source.error(message, whole_file(file), "begin with `version: 1`", "wrong-type")
    return None


class _RefusedError(Exception):
    """Parsing cannot go on; the reason has been reported."""


@dataclass
class _Composer:
    """Builds nodes from libyaml's events one by one, so that size and depth can be bounded."""

    source: SourceText
    anchors: dict[str, tuple[Node | None, int]] = field(default_factory=dict)
    node_count: int = 0

    def document(self) -> Node | None:
        self.check_characters()
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[Any] = yaml.parse(self.source.text, Loader=loader)
        next(self.events)  # the stream begins
        if not isinstance(next(self.events), yaml.DocumentStartEvent):
            return None
        root = self.node(next(self.events), 0)
        next(self.events)  # the document ends
        after = next(self.events)
        if isinstance(after, yaml.DocumentStartEvent):
            self.refuse("the file holds a second document", after, "keep one profile a file, without `---`")
        return root

    def check_characters(self) -> None:
        text, file = self.source.text, self.source.file
        if len(text) > MAX_CHARACTERS:
            message = f"the file is longer than {MAX_CHARACTERS:,} characters"
            self.refuse(message, whole_file(file), "split it with `extends`", "too-large")
        if unprintable := UNPRINTABLE.search(text):
            before = LINE_BREAK.split(text[: unprintable.start()])
            message = f"the character U+{ord(unprintable.group()):04X} is not allowed in YAML"
            self.refuse(message, self.source.span(len(before) - 1, len(before[-1])), "remove it")

    def node(self, event: Any, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self.refuse(f"values are nested deeper than {MAX_DEPTH}", event, "flatten it", "too-large")
        if isinstance(event, AliasEvent):
            return self.alias(event)
        count_before = self.node_count
        self.count(1, event)
        if event.anchor is not None:
            self.anchors[event.anchor] = (None, 0)
        node = self.scalar(event) if isinstance(event, ScalarEvent) else self.collection(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, self.node_count - count_before)
        return node

    def alias(self, event: AliasEvent) -> Node:
        name = event.anchor or ""
        if name not in self.anchors:
            if close := closest(name, self.anchors):
                self.refuse(f"there is no anchor `{name}`", event, f"did you mean `*{close}`?")
            self.refuse_unquoted(event, f"`*{name}` refers to no anchor", f"define it with `&{name}`")
        node, count = self.anchors[name]
        if node is None:
            self.refuse(f"`*{name}` stands within what it refers to", event, "remove it")
        self.count(count, event)
        return node

    def scalar(self, event: ScalarEvent) -> ScalarNode:
        self.check_tag(event)
        if len(event.value) > MAX_SCALAR_CHARACTERS:
            message = f"a value is longer than {MAX_SCALAR_CHARACTERS:,} characters"
            self.refuse(message, event, "shorten it", "too-large")
        span, is_quoted = self.span(event), event.style not in (None, "")
        column = span.column + is_quoted
        line = self.source.lines[span.line - 1] if span.line <= len(self.source.lines) else ""
        written = line[column - 1 : column - 1 + len(event.value)]
        one_line = span.line == span.end_line and event.style not in ("|", ">")
        is_plain = not is_quoted and event.tag is None
        return ScalarNode(event.value, span, is_plain, one_line and written == event.value, column)

    def collection(self, event: MappingStartEvent | SequenceStartEvent, depth: int) -> Node:
        self.check_tag(event)
        if isinstance(event, MappingStartEvent):
            return self.mapping(event, depth)
        items: list[Node] = []
        while not isinstance(item := next(self.events), SequenceEndEvent):
            items.append(self.node(item, depth + 1))
        return SequenceNode(tuple(items), self.span(event, item))

    def mapping(self, event: MappingStartEvent, depth: int) -> MappingNode:
        entries: list[Entry] = []
        merged: list[Entry] = []
        while not isinstance(key_event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key_event, ScalarEvent):
                self.refuse_unquoted(key_event, "a key must be text", "quote it")
            key = self.scalar(key_event)
            self.count(1, key_event)
            value = self.node(next(self.events), depth + 1)
            if key.text == "<<" and key.is_plain:
                merged += self.merged_entries(value, key)
            else:
                entries.append(Entry(key, value))
        own = without_duplicates(entries, self.source.sink)
        # YAML: the mapping's own keys win, then the earlier of several merged ones.
        by_key = {entry.key.text: entry for entry in (*reversed(merged), *own)}
        names = dict.fromkeys(entry.key.text for entry in (*own, *merged))
        return MappingNode(tuple(by_key[name] for name in names), self.span(event, key_event))

    def merged_entries(self, value: Node, key: ScalarNode) -> Iterator[Entry]:
        for merged in value.items if isinstance(value, SequenceNode) else (value,):
            if isinstance(merged, MappingNode):
                yield from merged.entries
            else:
                message = "a merge key takes a mapping or a list of mappings"
                self.source.error(message, key.span, "write `<<: *anchor`", "wrong-type")

    def count(self, nodes: int, event: yaml.Event) -> None:
        self.node_count += nodes
        if self.node_count > MAX_NODES:
            message = f"the file expands to more than {MAX_NODES:,} values"
            self.refuse(message, event, "use fewer anchors", "too-large")

    def check_tag(self, event: ScalarEvent | MappingStartEvent | SequenceStartEvent) -> None:
        allowed = (None, "!", "tag:yaml.org,2002:str") if isinstance(event, ScalarEvent) else (None,)
        if event.tag not in allowed:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self.refuse(f"the tag `{tag}` is not allowed in a profile", event, "remove it")

    def refuse_unquoted(self, event: Any, message: str, help: str) -> NoReturn:
        """Stop parsing at a pattern that lacks its quotes, or else with this message."""
        if self.source.report_unquoted(event.start_mark.line, event.start_mark.column):
            raise _RefusedError
        self.refuse(message, event, help)

    def refuse(self, message: str, place: yaml.Event | Span, help: str, code: ErrorCode = "syntax") -> NoReturn:
        self.source.error(message, place if isinstance(place, Span) else self.span(place), help, code)
        raise _RefusedError

    def span(self, first: Any, last: Any = None) -> Span:
        """Return the place from one event to another; libyaml counts lines and columns from 0."""
        start, end = first.start_mark, (last or first).end_mark
        end_line, end_column = end.line, end.column
        if end_column == 0 and (end_line, end_column) > (start.line, start.column):
            # libyaml ends a block where the next begins; its place ends with its own last line.
            while end_line > start.line and not end_column:
                end_line -= 1
                end_column = len(self.source.lines[end_line].rstrip())
        return Span(
            file=self.source.file,
            line=start.line + 1,
            column=start.column + 1,
            end_line=end_line + 1,
            end_column=end_column + 1,
        )
