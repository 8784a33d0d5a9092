"""Finds the value that should have been quoted: patterns and templates hold characters that YAML reads as syntax."""

from __future__ import annotations

import re

VALUE_START = re.compile(r"(?:^|(?<=[\s{\[,]))(?:[-?][ \t]+|[^\s:{}\[\],\"'#][^{}\[\],\"']*?:[ \t]+)")
"""Matches what precedes a value: a dash, or a key."""

DEVICE_RANGE = re.compile(r"(?<![\"'\w])[a-z]+:\[[0-9,-]*\]")
"""Matches a key that names several devices, which YAML reads as two keys within a flow mapping."""

WILDCARD_KEY = re.compile(r"\s*(\*[^\s:\"']*):(?:\s|$)")
"""Matches a key that begins with a star, which YAML reads as an alias."""

SPECIAL = frozenset("[]{}*&!%@`")

UNCLOSED_END = re.compile(r",\s|}\s*$|\s#")

OPENING = {"[": "]", "{": "}"}


def unquoted_text(line: str, column: int) -> tuple[int, str] | None:
    """Return the unquoted value around a column of a line at which YAML stumbled, and the column in which it begins.

    Columns count from 0.

    >>> unquoted_text("  - {match: model.layers.[0-3], device: 0}", 24)
    (12, 'model.layers.[0-3]')
    """
    for device_range in DEVICE_RANGE.finditer(line):
        if device_range.start() <= column <= device_range.end():
            return device_range.start(), device_range.group()
    if wildcard_key := WILDCARD_KEY.match(line):
        return wildcard_key.start(1), wildcard_key.group(1)
    starts = [match.end() for match in VALUE_START.finditer(line)]
    # A dash or a key may stand before a flow mapping, and then the mistake is in one of its values.
    for start in sorted((start for start in starts if start <= column), reverse=True):
        text = _extent(line, start)
        if start + len(text) + 1 < column:
            return None
        if _wants_quotes(text):
            return start, text
        if text and not text.startswith(("{", "[")):
            return None
    return None


def closed(text: str) -> str:
    """Return a text with its open brackets and quotes closed.

    >>> closed("[0-15")
    '[0-15]'
    """
    open_brackets: list[str] = []
    for character in text:
        if character in OPENING:
            open_brackets.append(OPENING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
    return text + "".join(reversed(open_brackets))


def _extent(line: str, start: int) -> str:
    """Return the part of a line from a value's start to the comma, bracket or comment that ends it."""
    open_brackets: list[str] = []
    for position in range(start, len(line)):
        character = line[position]
        if character in OPENING:
            open_brackets.append(OPENING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character in "]}" and open_brackets:
            break
        elif (
            character in "]}"
            or (character == "," and not open_brackets)
            or (character == "#" and line[position - 1].isspace())
        ):
            return line[start:position].rstrip()
    if open_brackets:  # a bracket that is never closed: the value ends before the next key or at the end of the mapping
        return UNCLOSED_END.split(line[start:], maxsplit=1)[0].rstrip()
    return line[start:].rstrip()


def _wants_quotes(text: str) -> bool:
    if not text or text[0] in "\"'|>":
        return False
    if text.startswith("{{"):
        return True
    if text[0] in "{[":
        # `{…}` and `[…]` are YAML's own, unless more follows the bracket: `[0-3].mlp`, `{a,b}.weight`.
        closed = _extent(text, 1)
        rest = text[len(closed) + 2 :]
        return bool(rest) and rest[0] not in " ,}]:" and ": " not in text
    if text[0] in "&!" or ": " in text:
        return False
    return any(character in SPECIAL for character in text)
