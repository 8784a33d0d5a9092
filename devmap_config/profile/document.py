"""YAML as frozen nodes that know their place: YAML 1.2 scalars, no duplicate keys, bounded in size and expansion."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import yaml
from yaml.events import AliasEvent, MappingStartEvent, ScalarEvent, SequenceEndEvent, SequenceStartEvent

from devmap_config.diagnostics.diagnostic import Related, Span
from devmap_config.files import LINE_BREAK
from devmap_config.profile.quoting import closed, unquoted_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink

MAX_CHARACTERS = 1_000_000
MAX_NODES = 100_000
"""Of a document once every alias is followed."""
MAX_DEPTH = 40

UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

NULL = re.compile(r"~|null|Null|NULL|")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
DECIMAL = re.compile(r"[-+]?[0-9]{1,4000}")
OCTAL = re.compile(r"0o[0-7]{1,1000}")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,1000}")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

Value: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """One value as it was written. `is_plain` is false for quoted and block text, which is text whatever it holds.

    `is_verbatim` says that `text` stands in the file character for character, from `content_column` on;
    `is_unrendered` that it is a template that could not be rendered, which is reported.
    """

    text: str
    span: Span
    is_plain: bool = True
    is_verbatim: bool = False
    content_column: int = 0
    is_unrendered: bool = False

    @property
    def value(self) -> Value:
        """What YAML 1.2's core schema reads."""
        return plain_value(self.text) if self.is_plain else self.text

    def span_within(self, start: int, end: int) -> Span:
        """The place of characters `start` to `end` (exclusive); of the whole value where that cannot be told."""
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
        """The value under a key."""
        return next((entry.value for entry in self.entries if entry.key.text == key), None)

    def only(self, is_wanted: Callable[[str], bool]) -> MappingNode:
        """The mapping with those of its entries whose key is wanted."""
        return replace(self, entries=tuple(entry for entry in self.entries if is_wanted(entry.key.text)))


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value."""

    key: ScalarNode
    value: Node


Node: TypeAlias = "ScalarNode | SequenceNode | MappingNode"


def plain_value(text: str) -> Value:
    """An unquoted scalar by YAML 1.2's core schema: `no` is text, `010` is ten, `12:30` is text."""
    if NULL.fullmatch(text):
        return None
    if TRUE.fullmatch(text):
        return True
    if FALSE.fullmatch(text):
        return False
    if DECIMAL.fullmatch(text):
        return int(text)
    if OCTAL.fullmatch(text) or HEXADECIMAL.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def parse_document(text: str, file: str, sink: Sink) -> MappingNode | None:
    """The mapping that a file holds, or `None` and what is wrong with it in the sink."""
    lines = LINE_BREAK.split(text)
    if len(text) > MAX_CHARACTERS:
        message = f"the file is longer than {MAX_CHARACTERS:,} characters"
        sink.error("too-large", message, whole_file(file), help="split it with `extends`")
        return None
    if found := UNPRINTABLE.search(text):
        before = LINE_BREAK.split(text[: found.start()])
        span = _point(file, len(before), len(before[-1]) + 1)
        sink.error("syntax", f"the character U+{ord(found.group()):04X} is not allowed in YAML", span, help="remove it")
        return None
    try:
        root = _Composer(text, file, lines, sink).document()
    except yaml.MarkedYAMLError as error:
        _report_syntax(error, file, lines, sink)
        return None
    except _RefusedError:
        return None
    if isinstance(root, MappingNode):
        return root
    sink.error(
        "wrong-type",
        "a profile is a mapping of keys to values" if root is not None else "the file is empty",
        whole_file(file),
        help="begin with `version: 1`",
    )
    return None


def without_duplicates(entries: Iterable[Entry], sink: Sink) -> tuple[Entry, ...]:
    """Return the entries without those whose key an earlier one has, which are reported."""
    first: dict[str, Entry] = {}
    for entry in entries:
        earlier = first.setdefault(entry.key.text, entry)
        if earlier is not entry:
            report_duplicate(entry.key.text, entry.key, earlier.key, sink)
    return tuple(first.values())


def report_duplicate(name: str, key: ScalarNode, earlier: ScalarNode, sink: Sink) -> None:
    """Report that what a name stands for is given twice."""
    related = (Related(message="first given here", span=earlier.span),)
    sink.error("duplicate-key", f"`{name}` is given twice", key.span, help="remove one of them", related=related)


def whole_file(file: str) -> Span:
    """The place of what is wrong with a file as a whole: its beginning."""
    return _point(file, 1, 1)


def _point(file: str, line: int, column: int, length: int = 1) -> Span:
    return Span(file=file, line=line, column=column, end_line=line, end_column=column + length)


class _RefusedError(Exception):
    """The document cannot be read on; the sink knows why."""


@dataclass
class _Composer:
    """Builds nodes from libyaml's events, which unlike its nodes come one by one and can be bounded."""

    text: str
    file: str
    lines: list[str]
    sink: Sink
    anchors: dict[str, tuple[Node | None, int]] = field(default_factory=dict)
    node_count: int = 0

    def document(self) -> Node | None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[yaml.Event] = yaml.parse(self.text, Loader=loader)
        next(self.events)  # the stream begins
        start = next(self.events)
        if not isinstance(start, yaml.DocumentStartEvent):
            return None
        root = self.node(next(self.events), 0)
        next(self.events)  # the document ends
        after = next(self.events)
        if isinstance(after, yaml.DocumentStartEvent):
            self.refuse(
                "syntax", "the file holds a second document", after, help="keep one profile a file, without `---`"
            )
        return root

    def node(self, event: yaml.Event, depth: int) -> Node:
        if depth > MAX_DEPTH:
            self.refuse("too-large", f"values are nested deeper than {MAX_DEPTH}", event, help="flatten it")
        if isinstance(event, AliasEvent):
            return self.alias(event)
        count_before = self.node_count
        self.count(1, event)
        anchor: str | None = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = (None, 0)
        if isinstance(event, ScalarEvent):
            node: Node = self.scalar(event)
        elif isinstance(event, SequenceStartEvent):
            node = self.sequence(event, depth)
        elif isinstance(event, MappingStartEvent):
            node = self.mapping(event, depth)
        else:
            raise TypeError(f"libyaml gave {event} where a value begins")
        if anchor is not None:
            self.anchors[anchor] = (node, self.node_count - count_before)
        return node

    def alias(self, event: AliasEvent) -> Node:
        node, count = self.anchors.get(event.anchor or "", (None, 0))
        if event.anchor not in self.anchors:
            self.refuse_undefined_alias(event)
        if node is None:
            self.refuse("syntax", f"`*{event.anchor}` stands within what it refers to", event, help="remove it")
        self.count(count, event)
        return node

    def scalar(self, event: ScalarEvent) -> ScalarNode:
        span = self.span(event)
        tag = event.tag if event.tag != "!" else "tag:yaml.org,2002:str"
        if tag is not None and tag != "tag:yaml.org,2002:str":
            self.refuse("syntax", f"the tag `{_short_tag(tag)}` is not allowed in a profile", event, help="remove it")
        is_plain = event.style in (None, "") and tag is None
        quote = 0 if event.style in (None, "") else 1
        column = span.column + quote
        line = self.lines[span.line - 1] if span.line <= len(self.lines) else ""
        written = line[column - 1 : column - 1 + len(event.value)]
        one_line = span.line == span.end_line and event.style not in ("|", ">")
        return ScalarNode(event.value, span, is_plain, one_line and written == event.value, column)

    def sequence(self, event: SequenceStartEvent, depth: int) -> SequenceNode:
        self.refuse_tag(event)
        items: list[Node] = []
        while not isinstance(item := next(self.events), SequenceEndEvent):
            items.append(self.node(item, depth + 1))
        return SequenceNode(tuple(items), self.span(event, item))

    def mapping(self, event: MappingStartEvent, depth: int) -> MappingNode:
        self.refuse_tag(event)
        entries: list[Entry] = []
        merged: list[MappingNode] = []
        while not isinstance(key_event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key_event, ScalarEvent):
                self.refuse_key(key_event)
            key = self.scalar(key_event)
            self.count(1, key_event)
            value = self.node(next(self.events), depth + 1)
            if key.text == "<<" and key.is_plain:
                merged += self.merge_sources(value, key)
            else:
                entries.append(Entry(key, value))
        entries = list(without_duplicates(entries, self.sink))
        named = {entry.key.text for entry in entries}
        for source in merged:  # YAML: the mapping's own keys win, then the earlier of several merged ones
            for entry in source.entries:
                if entry.key.text not in named:
                    named.add(entry.key.text)
                    entries.append(entry)
        return MappingNode(tuple(entries), self.span(event, key_event))

    def merge_sources(self, value: Node, key: ScalarNode) -> list[MappingNode]:
        sources = value.items if isinstance(value, SequenceNode) else (value,)
        for source in sources:
            if not isinstance(source, MappingNode):
                self.sink.error(
                    "wrong-type",
                    "a merge key takes a mapping or a list of mappings",
                    key.span,
                    help="write `<<: *anchor`",
                )
        return [source for source in sources if isinstance(source, MappingNode)]

    def count(self, nodes: int, event: yaml.Event) -> None:
        self.node_count += nodes
        if self.node_count > MAX_NODES:
            self.refuse(
                "too-large", f"the file expands to more than {MAX_NODES:,} values", event, help="use fewer anchors"
            )

    def refuse_tag(self, event: MappingStartEvent | SequenceStartEvent) -> None:
        if event.tag is not None:
            self.refuse(
                "syntax", f"the tag `{_short_tag(event.tag)}` is not allowed in a profile", event, help="remove it"
            )

    def refuse_key(self, event: yaml.Event) -> NoReturn:
        line, column = _start_of(event)
        if not _report_unquoted(self.file, self.lines, line, column, self.sink):
            self.sink.error("syntax", "a key must be text", self.span(event), help="quote it")
        raise _RefusedError

    def refuse_undefined_alias(self, event: AliasEvent) -> NoReturn:
        line, column = _start_of(event)
        close = difflib.get_close_matches(event.anchor or "", list(self.anchors), n=1)
        if close:
            message, help = f"there is no anchor `{event.anchor}`", f"did you mean `*{close[0]}`?"
            self.sink.error("syntax", message, self.span(event), help=help)
        elif not _report_unquoted(self.file, self.lines, line, column, self.sink):
            message, help = f"`*{event.anchor}` refers to no anchor", f"define it with `&{event.anchor}`"
            self.sink.error("syntax", message, self.span(event), help=help)
        raise _RefusedError

    def refuse(self, code: ErrorCode, message: str, event: yaml.Event, help: str | None = None) -> NoReturn:
        self.sink.error(code, message, self.span(event), help=help)
        raise _RefusedError

    def span(self, first: yaml.Event, last: yaml.Event | None = None) -> Span:
        line, column = _start_of(first)
        end_line, end_column = _end_of(last or first)
        if end_column == 0 and (end_line, end_column) > (line, column):
            # A block ends where the next begins; it is shown up to the end of its own last line.
            while end_line > line and not end_column:
                end_line -= 1
                end_column = len(self.lines[end_line].rstrip())
        return Span(file=self.file, line=line + 1, column=column + 1, end_line=end_line + 1, end_column=end_column + 1)


def _start_of(event: yaml.Event) -> tuple[int, int]:
    """Line and column, from 0."""
    mark: Any = event.start_mark  # libyaml always sets it
    return mark.line, mark.column


def _end_of(event: yaml.Event) -> tuple[int, int]:
    mark: Any = event.end_mark
    return mark.line, mark.column


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _report_syntax(error: yaml.MarkedYAMLError, file: str, lines: list[str], sink: Sink) -> None:
    mark = error.problem_mark or error.context_mark
    line = min(mark.line if mark else 0, len(lines) - 1)
    column = min(mark.column if mark else 0, len(lines[line]))
    if _report_unquoted(file, lines, line, column, sink):
        return
    if lines[line][column : column + 1] == "\t" or "\t" in lines[line][:column]:
        place = lines[line].index("\t")
        sink.error(
            "syntax",
            "a tab stands where YAML wants spaces",
            _point(file, line + 1, place + 1),
            help="indent with spaces",
        )
        return
    if _report_misplaced(error, file, lines, line, column, sink):
        return
    start = error.context_mark
    if start is not None and error.context in UNCLOSED and (line > start.line or not lines[line][column:].strip()):
        # libyaml complains where the text ends, which is seldom where the mistake is.
        message, help = UNCLOSED[error.context]
        sink.error("syntax", message, _point(file, start.line + 1, start.column + 1), help=help)
        return
    message, help = PROBLEMS.get(error.problem or "", (error.problem or "this is not YAML", ""))
    sink.error(
        "syntax",
        message,
        _point(file, line + 1, column + 1),
        help=help or "check the quotes and the indentation",
    )


def _report_misplaced(
    error: yaml.MarkedYAMLError, file: str, lines: list[str], line: int, column: int, sink: Sink
) -> bool:
    """Report a missing `:` or a wrong indentation at the line that has it, not where libyaml notices."""
    start = error.context_mark
    if error.problem == "could not find expected ':'" and start is not None and start.line < line:
        text = lines[start.line].strip()
        place = _point(file, start.line + 1, _indentation(lines[start.line]) + 1, max(len(text), 1))
        sink.error("syntax", f"a `: ` is missing in `{text}`", place, help="write `key: value`")
        return True
    above = next((number for number in range(line - 1, -1, -1) if lines[number].strip()), None)
    is_first_colon = ":" not in lines[line][:column]
    if error.problem != "mapping values are not allowed in this context" or not is_first_colon or above is None:
        return False
    text = lines[above].strip()
    if ": " in text and _indentation(lines[line]) > _indentation(lines[above]):
        key = lines[line][:column].strip()
        place = _point(file, line + 1, _indentation(lines[line]) + 1, len(key))
        message, help = f"`{key}` is indented deeper than the line above", "align it with the keys beside it"
        sink.error("syntax", message, place, help=help)
    else:
        place = _point(file, above + 1, _indentation(lines[above]) + 1, len(text))
        sink.error("syntax", f"a `: ` is missing in `{text}`", place, help="write `key: value`")
    return True


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


UNCLOSED = {
    "while scanning a quoted scalar": ("this quote is never closed", "close it"),
    "while parsing a flow mapping": ("this `{` is not closed", "close it with `}`, or put a `,` between its entries"),
    "while parsing a flow sequence": ("this `[` is not closed", "close it with `]`, or put a `,` between its items"),
}

PROBLEMS = {
    "did not find expected ',' or '}'": ("a `,` or `}` is missing before this", "close the mapping with `}`"),
    "did not find expected ',' or ']'": ("a `,` or `]` is missing before this", "close the list with `]`"),
    "did not find expected key": ("a key was expected here", "check the indentation, and that quotes are closed"),
    "did not find expected '-' indicator": ("a `- ` was expected here", "check the indentation of the list"),
    "could not find expected ':'": ("a `:` is missing after this key", "write `key: value`"),
    "mapping values are not allowed in this context": (
        "a second `: ` stands in one value",
        "quote the value, or begin a new line",
    ),
    "found unexpected end of stream": ("a quote is never closed", "close it"),
    "found unknown escape character": (
        "in double quotes a backslash begins an escape, and this is none",
        "use single quotes: what stands in them is taken as it is",
    ),
    "found unexpected ':'": ("a space is missing after this `:`", "write `key: value`, or quote what holds the `:`"),
    "found character that cannot start any token": (
        "no value can begin with this character",
        "quote the value",
    ),
}


def _report_unquoted(file: str, lines: list[str], line: int, column: int, sink: Sink) -> bool:
    """Report a value that holds what YAML reads as syntax, with the quoted text as the mend."""
    found = unquoted_text(lines[line], column)
    if found is None:
        return False
    start, text = found
    quoted = '"' + closed(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
    sink.error(
        "needs-quotes",
        f"`{text}` must be quoted",
        _point(file, line + 1, start + 1, len(text)),
        help=f"write `{quoted}`",
    )
    return True
