"""The pattern language: its grammar, and the syntax tree that a pattern is parsed into."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeAlias

import re2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLASS_PREFIX = "class:"
REGEX_PREFIX = "re:"
SCOPE_SEPARATOR = " in "

RESERVED = frozenset(".,:[]{}()*?!^$+|\\\"'")
"""Characters that no literal part of a pattern can hold; only `re:` can match a name that has one."""

_NUMBER = re.compile(r"[0-9]+")
_CLASS_NAME = re.compile(r"[^\W\d]\w*")
_MAX_DIGITS = 9
_MAX_NESTING = 16


class PatternError(ValueError):
    """A text is not a pattern.

    Attributes:
        message: what is wrong.
        start: the first wrong character of the text.
        end: the character after the last wrong one.
        help: what to write instead.
    """

    def __init__(self, message: str, start: int, end: int, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.start = start
        self.end = end
        self.help = help


@dataclass(frozen=True, slots=True)
class IndexRange:
    """Integers from `first` to `last`, both included, in steps of `step`; without an end if `last` is `None`.

    >>> IndexRange(0, None, step=2).select([0, 1, 2, 3])
    [0, 2]
    """

    first: int
    last: int | None
    step: int = 1

    def select(self, existing: Sequence[int]) -> list[int]:
        """Return those of the existing indices that are in the range."""
        return [
            index
            for index in existing
            if index >= self.first
            and (self.last is None or index <= self.last)
            and not (index - self.first) % self.step
        ]

    def asks_beyond(self, existing: Sequence[int]) -> bool:
        """Return whether the range names an index that does not exist.

        It does if it ends after the last of `existing`, or is one number that is not among them.

        >>> IndexRange(0, 7).asks_beyond([0, 1, 2, 3])
        True
        >>> IndexRange(2, None).asks_beyond([0, 1, 2, 3])
        False
        """
        if self.last is None:
            return False
        return self.last > max(existing) or (self.first == self.last and self.last not in existing)


@dataclass(frozen=True, slots=True)
class IndexSlice:
    """A Python slice over the ascending list of the indices that exist.

    >>> IndexSlice(-2, None).select([0, 1, 2, 3])
    [2, 3]
    """

    start: int | None
    stop: int | None
    step: int | None = None

    def select(self, existing: Sequence[int]) -> list[int]:
        """Return those of the existing indices, which ascend, that the slice takes."""
        return list(existing[self.start : self.stop : self.step])


@dataclass(frozen=True, slots=True)
class Literal:
    """A text that stands for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class AnyText:
    """`*`: any characters of one segment, or none."""


@dataclass(frozen=True, slots=True)
class AnyCharacter:
    """`?`: one character."""


@dataclass(frozen=True, slots=True)
class AnySegments:
    """`**`: any number of whole segments; it is always a segment of its own."""

    start: int


@dataclass(frozen=True, slots=True)
class Indices:
    """A range in brackets, `[…]`: a whole number within a segment.

    Attributes:
        items: the comma-separated ranges and slices.
        start: the place of `[` in the pattern's text.
        end: the place after `]`.
        after_wildcard: whether a wildcard stands before it, so that it is counted under several parents. Some of those
            may have too few indices for it, as long as one has enough.
    """

    items: tuple[IndexRange | IndexSlice, ...]
    start: int
    end: int
    after_wildcard: bool = False

    def select(self, existing: Sequence[int]) -> frozenset[int]:
        """Return the set of those of the existing indices, which ascend, that the range stands for."""
        return frozenset(index for item in self.items for index in item.select(existing))

    def asks_beyond(self, existing: Sequence[int]) -> bool:
        """Return whether one of the ranges names an index that does not exist; slices never do."""
        return any(isinstance(item, IndexRange) and item.asks_beyond(existing) for item in self.items)


@dataclass(frozen=True, slots=True)
class Alternatives:
    """`{a,b.c}`: one of several paths, as a segment or within one."""

    paths: tuple[Path, ...]


Piece: TypeAlias = Literal | AnyText | AnyCharacter | AnySegments | Indices | Alternatives


@dataclass(frozen=True, slots=True)
class PatternSegment:
    """The part of a pattern between two dots; `start` and `end` are its place in the text."""

    pieces: tuple[Piece, ...]
    start: int
    end: int

    @property
    def literal(self) -> str | None:
        """The one name that the segment stands for, or `None` if it may stand for several."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0], Literal):
            return self.pieces[0].text
        return None


Path: TypeAlias = tuple[PatternSegment, ...]


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A dotted path with wildcards; without segments it stands for the whole model."""

    text: str
    path: Path


@dataclass(frozen=True, slots=True)
class ClassPattern:
    """`class:Name in path`: every module of a class; with a `scope`, those at or below what the scope matches."""

    text: str
    class_name: str
    scope: PathPattern | None = None


@dataclass(frozen=True, slots=True)
class RegexPattern:
    """`re:…`: every path that the expression matches as a whole."""

    text: str
    expression: str


Pattern: TypeAlias = PathPattern | ClassPattern | RegexPattern


def parse_pattern(text: str) -> Pattern:
    """Parse a pattern.

    Args:
        text: a dotted path with wildcards, `class:Name` or `re:…`; the empty text stands for the whole model.

    Returns:
        The syntax tree.

    Raises:
        PatternError: if the text is not a pattern; it carries the place and what to write instead.

    Example:
        >>> parse_pattern("lm_head").path[0].literal
        'lm_head'
        >>> parse_pattern("model.layers.[0-3,8-]").path[2].pieces[0].select(range(10))
        frozenset({0, 1, 2, 3, 8, 9})
        >>> parse_pattern("class:LlamaMLP in model.layers.0").class_name
        'LlamaMLP'
        >>> try:
        ...     parse_pattern("model.layers.1[0-9]")
        ... except PatternError as error:
        ...     print(error.start, error.help)
        13 write the whole numbers: `[10-19]`, not `1[0-9]`
    """
    if text.startswith(REGEX_PREFIX):
        return _parse_regex(text)
    if text.startswith(CLASS_PREFIX):
        return _parse_class(text)
    return _parse_path(text, 0)


class CompiledExpression(Protocol):
    """A compiled regular expression of RE2."""

    def fullmatch(self, text: str) -> Any:
        """Return a match of the whole text; `None` if there is none."""

    def match(self, text: str) -> Any:
        """Return a match of the text's beginning; `None` if there is none."""


def compile_expression(expression: str, most_bytes: int = 2**23) -> CompiledExpression:
    """Compile a regular expression by RE2, whose time is linear in the text that is matched.

    Args:
        expression: the expression; RE2 has no lookaround and no back-references.
        most_bytes: the memory that the compiled expression may take.

    Raises:
        re2.error: if the expression cannot be read, or takes more memory.

    Example:
        >>> bool(compile_expression("layers[.][0-9]+").fullmatch("layers.12"))
        True
    """
    compiled: CompiledExpression = re2.compile(expression, engine_options(most_bytes))
    return compiled


def engine_options(most_bytes: int) -> Any:
    """Return options of RE2 with which it logs nothing and gives an expression at most `most_bytes` of memory."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = most_bytes
    return options


MAX_BYTES_OF_KEYS = 2**28
"""Enough for the expressions of a map of a megabyte."""


def compile_keys(keys: Iterable[str]) -> CompiledExpression:
    """Compile the keys of a `device_map` into one expression, as transformers joins them to look up a tensor.

    The keys with most dots come first, then the longest; they are not escaped, and the expression has no end.
    """
    order = sorted(keys, key=lambda key: (key.count("."), len(key)), reverse=True)
    return compile_expression("|".join(f"(?:{key})" for key in order), most_bytes=MAX_BYTES_OF_KEYS)


def _parse_regex(text: str) -> RegexPattern:
    expression = text[len(REGEX_PREFIX) :]
    if not expression:
        raise PatternError("the expression is empty", 0, len(text), "write a regular expression after `re:`")
    try:
        compile_expression(expression)
    except re2.error as error:
        raise _regex_error(text, expression, error) from None
    return RegexPattern(text, expression)


def _regex_error(text: str, expression: str, error: Exception) -> PatternError:
    reason = error.args[0] if error.args else ""
    reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
    # RE2 gives no offset, but its message ends with the fragment that it could not read.
    fragment = reason.partition(": ")[2]
    offset = expression.find(fragment) if fragment else -1
    start = len(REGEX_PREFIX) + max(offset, 0)
    end = start + len(fragment) if offset >= 0 else len(text)
    return PatternError(
        f"the expression cannot be read: {reason}",
        start,
        end,
        "expressions are RE2's: without lookaround and back-references",
    )


def _parse_class(text: str) -> ClassPattern:
    start = len(CLASS_PREFIX)
    name, separator, _ = text[start:].partition(SCOPE_SEPARATOR)
    if not name:
        raise PatternError("the class name is empty", 0, start, "write one, such as `class:LlamaDecoderLayer`")
    match = _CLASS_NAME.match(name)
    if match is None or match.end() < len(name):
        wrong = start + (match.end() if match else 0)
        raise PatternError(
            f"a class name cannot hold `{text[wrong]}`",
            wrong,
            wrong + 1,
            "write `class:Name`, or `class:Name in model.layers.[0-3]` for those below a path",
        )
    if not separator:
        return ClassPattern(text, name)
    scope_start = start + len(name) + len(separator)
    if scope_start == len(text):
        raise PatternError(
            "the path after `in` is empty", scope_start - 3, scope_start - 1, f"or drop `in`: `class:{name}`"
        )
    return ClassPattern(text, name, _parse_path(text, scope_start))


def _parse_path(text: str, start: int) -> PathPattern:
    parser = _PathParser(text, start)
    path = parser.whole_path()
    _check_any_segments(path, open_left=False, open_right=False)
    return PathPattern(text[start:], path)


def _check_any_segments(path: Path, *, open_left: bool, open_right: bool) -> None:
    """Refuse a `**` that is not alone in its segment, even if only because of text around its braces."""
    for position, segment in enumerate(path):
        left = open_left and position == 0
        right = open_right and position == len(path) - 1
        for place, piece in enumerate(segment.pieces):
            shares_left = left or place > 0
            shares_right = right or place < len(segment.pieces) - 1
            if isinstance(piece, AnySegments) and (shares_left or shares_right):
                raise PatternError(
                    "`**` is a segment of its own",
                    piece.start,
                    piece.start + 2,
                    "write `*` for any characters within a segment, `**.` for any number of segments",
                )
            if isinstance(piece, Alternatives):
                for alternative in piece.paths:
                    _check_any_segments(alternative, open_left=shares_left, open_right=shares_right)


_NOT_IN_A_PATH = {
    "!": "there is no negation: name what you mean, or let a deeper rule decide for the exception",
    "^": "there is no negation: name what you mean, or let a deeper rule decide for the exception",
    "(": "alternatives are written `{a,b}`; a regular expression begins with `re:`",
    ")": "alternatives are written `{a,b}`; a regular expression begins with `re:`",
    "|": "alternatives are written `{a,b}`; a regular expression begins with `re:`",
    "+": "a regular expression begins with `re:`",
    "$": "a regular expression begins with `re:`",
    "\\": "there are no escapes; a regular expression begins with `re:`",
    ",": "a comma separates alternatives within `{}` and numbers within `[]`",
    ":": "the prefixes are `class:` and `re:`",
    "]": "no `[` is open here",
    "}": "no `{` is open here",
}


class _PathParser:
    """A recursive-descent parser of one dotted path; `position` is the next character of `text`."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position
        self.after_wildcard = False
        self.nesting = 0

    def whole_path(self) -> Path:
        if self.position == len(self.text):
            return ()
        path = self.path(within_braces=False)
        if self.position < len(self.text):
            self.refuse_character()
        return path

    def path(self, *, within_braces: bool) -> Path:
        segments = [self.segment(within_braces=within_braces)]
        while self.peek() == ".":
            self.position += 1
            segments.append(self.segment(within_braces=within_braces))
        return tuple(segments)

    def segment(self, *, within_braces: bool) -> PatternSegment:
        start = self.position
        pieces: list[Piece] = []
        while (piece := self.piece()) is not None:
            pieces.append(piece)
        ends_here = self.peek() in (("", ".", ",", "}") if within_braces else ("", "."))
        if not ends_here:
            self.refuse_character()
        if not pieces:
            self.refuse_empty_segment(start, within_braces=within_braces)
        return PatternSegment(tuple(pieces), start, self.position)

    def piece(self) -> Piece | None:
        character = self.peek()
        if character == "*":
            return self.star()
        if character == "?":
            self.position += 1
            self.after_wildcard = True
            return AnyCharacter()
        if character == "[":
            return self.indices()
        if character == "{":
            return self.alternatives()
        return self.literal()

    def literal(self) -> Literal | None:
        start = self.position
        while (character := self.peek()) and character not in RESERVED and not character.isspace():
            self.position += 1
        return Literal(self.text[start : self.position]) if self.position > start else None

    def star(self) -> AnyText | AnySegments:
        start = self.position
        while self.peek() == "*":
            self.position += 1
        self.after_wildcard = True
        count = self.position - start
        if count > 2:
            raise PatternError(
                f"`{'*' * count}` means nothing",
                start,
                self.position,
                "`*` is one segment or part of one, `**` any number of segments",
            )
        return AnyText() if count == 1 else AnySegments(start)

    def alternatives(self) -> Alternatives:
        start = self.position
        self.nesting += 1
        if self.nesting > _MAX_NESTING:
            raise PatternError(f"braces are nested deeper than {_MAX_NESTING}", start, start + 1)
        wildcard_before = self.after_wildcard
        wildcard_within = False
        paths: list[Path] = []
        while not paths or self.peek() == ",":
            self.position += 1
            if not self.peek():
                break
            self.after_wildcard = wildcard_before
            paths.append(self.path(within_braces=True))
            wildcard_within |= self.after_wildcard
        if self.peek() != "}":
            raise PatternError("this `{` is never closed", start, start + 1, "close it with `}`")
        self.position += 1
        self.nesting -= 1
        self.after_wildcard = wildcard_within
        return Alternatives(tuple(paths))

    def indices(self) -> Indices:
        start = self.position
        if start and self.text[start - 1] in "0123456789]":
            self.refuse_part_of_a_number(start - 1, start + 1)
        close = self.text.find("]", start)
        if close < 0:
            raise PatternError("this `[` is never closed", start, start + 1, "close it with `]`")
        if close == start + 1:
            raise PatternError("the range is empty", start, close + 1, "write `*` for any one segment")
        items: list[IndexRange | IndexSlice] = []
        while self.peek() != "]":
            self.position += 1
            items.append(self.index_item())
            if self.peek() not in (",", "]"):
                self.refuse_range_character()
        self.position = close + 1
        if self.peek() and self.peek() in "0123456789":
            self.refuse_part_of_a_number(close, close + 2)
        return Indices(tuple(items), start, close + 1, self.after_wildcard)

    def index_item(self) -> IndexRange | IndexSlice:
        start = self.position
        first = self.number(signed=True)
        if self.peek() == ":":
            return self.index_slice(first)
        if first is None:
            self.refuse_range_character()
        if first < 0 or self.text[start] == "-":
            item = self.text[start : self.position]
            raise PatternError(
                f"`{item}` is negative, which only a slice may be",
                start,
                self.position,
                f"`[{item}:]` is from the {-first}th last to the end" if first < -1 else f"`[{item}:]` is the last one",
            )
        last: int | None = first
        if self.peek() == "-":
            self.position += 1
            last = self.number(signed=False)
            if last is not None and last < first:
                raise PatternError(
                    "the range runs backwards",
                    start,
                    self.position,
                    f"both ends are included: write `[{last}-{first}]`",
                )
        return IndexRange(first, last, self.range_step())

    def range_step(self) -> int:
        if self.peek() != "/":
            return 1
        self.position += 1
        start = self.position
        step = self.number(signed=False)
        if step is None:
            self.refuse_range_character()
        if step == 0:
            self.refuse_zero_step(start)
        return step

    def index_slice(self, start: int | None) -> IndexSlice:
        self.position += 1
        stop = self.number(signed=True)
        if self.peek() != ":":
            return IndexSlice(start, stop)
        self.position += 1
        step_start = self.position
        step = self.number(signed=True)
        if step == 0:
            self.refuse_zero_step(step_start)
        return IndexSlice(start, stop, step)

    def number(self, *, signed: bool) -> int | None:
        start = self.position
        sign = 1 if signed and self.peek() == "-" else 0
        match = _NUMBER.match(self.text, start + sign)
        if match is None:
            return None
        digits = match.group()
        self.position = match.end()
        if len(digits) > 1 and digits[0] == "0":
            raise PatternError(
                f"`{digits}` has a leading zero", match.start(), match.end(), f"write `{int(digits[:_MAX_DIGITS])}`"
            )
        if len(digits) > _MAX_DIGITS:
            raise PatternError(f"`{digits}` is not an index of a module", match.start(), match.end())
        return -int(digits) if sign else int(digits)

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def refuse_character(self) -> NoReturn:
        """Raise the error for the next character, which cannot stand here in a path."""
        character = self.peek()
        place = (self.position, self.position + 1)
        if character.isspace():
            raise PatternError("a path holds no spaces", *place, "remove it")
        if character in "]}":
            raise PatternError(f"stray `{character}`", *place, _NOT_IN_A_PATH[character])
        raise PatternError(f"a path cannot hold `{character}`", *place, _NOT_IN_A_PATH.get(character, "remove it"))

    def refuse_empty_segment(self, start: int, *, within_braces: bool) -> NoReturn:
        if within_braces and self.peek() in (",", "}") and self.text[start - 1] in "{,":
            raise PatternError("an alternative is empty", start - 1, start + 1, "write a name between `{`, `,` and `}`")
        if self.peek() == ".":
            message, place = "a segment is empty", start
        else:
            message, place = "the path ends in a dot", start - 1
        raise PatternError(message, place, place + 1, "remove the dot, or write `*` for any one segment")

    def refuse_part_of_a_number(self, start: int, end: int) -> NoReturn:
        raise PatternError(
            "a range stands for a whole number, never for one of its digits",
            start,
            end,
            "write the whole numbers: `[10-19]`, not `1[0-9]`",
        )

    def refuse_zero_step(self, start: int) -> NoReturn:
        raise PatternError("a step of 0 never moves", start, self.position, "write a step of 1 or more")

    def refuse_range_character(self) -> NoReturn:
        character = self.peek()
        place = (self.position, self.position + 1)
        if character in ("!", "^"):
            raise PatternError("a range has no negation", *place, "list what you mean, such as `[0-3,8-]`")
        if character in (",", "]"):
            raise PatternError("a number is missing", *place, "write a number, such as in `[0,2,8-11]`")
        if character.isspace():
            raise PatternError("a range holds no spaces", *place, "remove it")
        raise PatternError(
            f"a range cannot hold `{character}` here",
            *place,
            "ranges are `[0-15]`, `[16-]`, `[0,2,8-11]`, `[0-31/2]`, or slices such as `[-4:]`",
        )
