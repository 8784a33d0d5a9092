"""Words that messages have in common: the first of many, the nearest of several, the first line of an error."""

from __future__ import annotations

import difflib
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


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that another was most likely meant to be, if any is near.

    >>> closest("wrokload", ["model", "workload"])
    'workload'
    """
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1)), None)


def first_line(error: Exception) -> str:
    r"""Return the first line of an error's text, without its full stop; nothing where it has none.

    >>> first_line(ValueError("it is wrong.\nAnd more."))
    'it is wrong'
    """
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
