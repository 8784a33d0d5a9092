"""Escapes text for GitHub's Markdown, so that it breaks no table, mentions nobody and links nothing."""

from __future__ import annotations

import re

from devmap_config.wording import visible

PLAIN = re.compile(r"(?!.*(?:www\.|://))[\w ,.:/%→–+()-]*")
"""Matches text that is never markup in a cell."""

CODE = re.compile(r"[^`|]+")
"""Matches text that may stand in backticks, even in a table."""


def code(text: str) -> str:
    """Return a name as code.

    >>> code("model.layers.[0-3]"), code("a|`b`")
    ('`model.layers.[0-3]`', '<code>a&#124;&#96;b&#96;</code>')
    """
    shown = visible(text)
    if CODE.fullmatch(shown):
        return f"`{shown}`"
    escaped = "".join(letter if letter.isalnum() or letter == "." else f"&#{ord(letter)};" for letter in shown)
    return f"<code>{escaped}</code>"


def cell(text: str) -> str:
    """Return text unchanged or, if it could be markup, as code.

    >>> cell("1.0 GiB → 2.0 GiB"), cell("@someone")
    ('1.0 GiB → 2.0 GiB', '`@someone`')
    """
    return text if PLAIN.fullmatch(text) else code(text)
