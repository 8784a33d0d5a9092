"""Helpers for the text of messages: the first few of many names, the nearest known word, the first line of an error.

Names and texts from untrusted files are escaped where a terminal or a parser would interpret them.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def first_of(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first few of several texts, and how many more there are.

    >>> first_of(["`a`", "`b`", "`c`", "`d`", "`e`"])
    '`a`, `b`, `c` and 2 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


MOST_DIGITS = 9
"""No index or module has more digits; Python refuses numbers of more than 4,300 digits, and is slow for long ones."""


def number_in(name: str) -> int | None:
    """Return the number that a name spells exactly as Python prints it, or `None`.

    >>> number_in("12"), number_in("012"), number_in("²"), number_in("9" * 5_000)
    (12, None, None, None)
    """
    is_one = name.isdecimal() and name.isascii() and len(name) <= MOST_DIGITS
    return int(name) if is_one and (name == "0" or name[0] != "0") else None


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is closest to a misspelt one, if any is close.

    >>> closest("wrokload", ["model", "workload"])
    'workload'
    """
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1)), None)


def first_line(error: Exception) -> str:
    r"""Return the first line of an error's text, without its full stop; an empty text if it has none.

    >>> first_line(ValueError("it is wrong.\nAnd more."))
    'it is wrong'
    """
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")


LONG_NAME = re.compile(r"`([^`]{500})[^`]{500,}([^`]{100})`")
LONGEST_TEXT = 5_000


def shortened(text: str) -> str:
    """Return a text with the middle of its longest names left out, cut to the length of a message.

    >>> len(shortened("`" + "x" * 5_000 + "` is not a name"))
    617
    """
    text = LONG_NAME.sub(r"`\1…\2`", text)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


NOT_PLAIN = re.compile(r"[^ -~]")

COMMAND = re.compile(r"^([ \t]*):(?=:[A-Za-z])|#(?=#\[)")
"""How a line begins that GitHub's runner takes for a command, on stderr as well; `##[` may stand anywhere in one."""


def is_unicode(text: str) -> bool:
    r"""Return whether a text can be written as UTF-8: bytes of names that are not stand in it as half characters.

    Example:
        >>> is_unicode("café"), is_unicode("caf\udce9")
        (True, False)
    """
    return HALF_CHARACTER.search(text) is None


HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return a text on one line, escaped where a character does not show: controls, bidi overrides, half characters.

    A byte of a name that is not UTF-8 is shown as such.

    >>> print(visible("caf\udce9\n\x1b[2J \u202egnp.模型"))
    caf\xe9\n\x1b[2J \u202egnp.模型
    """
    return NOT_PLAIN.sub(lambda match: _shown(match[0]), text)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def visible_lines(text: str) -> str:
    r"""Return lines that are safe to print: they neither control a terminal nor command GitHub's runner.

    >>> print(visible_lines("a\n ::error ::b\x07"))
    a
     \x3a:error ::b\x07
    """
    lines = ("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))
    return "\n".join(COMMAND.sub(_escaped_command, line) for line in lines)


def _escaped_command(match: re.Match[str]) -> str:
    return r"\x23" if match[1] is None else rf"{match[1]}\x3a"


def json_text(value: object, *, is_ascii: bool = False, sort_keys: bool = False) -> str:
    r"""Return a value as indented JSON without invisible characters; half characters are escaped by `visible`.

    >>> print(json_text({"a": "caf\udce9\u202e"}))
    {
      "a": "caf\\xe9\u202e"
    }
    """

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character == "\n" or (character.isprintable() and not is_ascii):
            return character
        escaped_character = _shown(character) if "\ud800" <= character <= "\udfff" else character
        return json.dumps(escaped_character)[1:-1]

    text = NOT_PLAIN.sub(escaped, json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False))
    return text.replace("##[", r"\u0023#[")


def in_words(value: object) -> str:
    """Return the value of a setting as text for a reader.

    >>> in_words(True), in_words(1)
    ('yes', '1')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
