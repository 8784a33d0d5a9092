"""Text in GitHub's Markdown that is nothing but text: no table is broken by it, nobody mentioned, nothing linked."""

from __future__ import annotations

import re

from devmap_config.wording import visible

PLAIN = re.compile(r"(?!.*(?:www\.|://))[\w ,.:/%→–+()-]*")
"""What is no markup wherever it stands in a cell."""

CODE = re.compile(r"[^`|]+")
"""What may stand in backticks, in a table too."""


def code(text: str) -> str:
    """Return a name as code.

    >>> code("model.layers.[0-3]"), code("a|`b`")
    ('`model.layers.[0-3]`', '<code>a&#124;&#96;b&#96;</code>')
    """
    shown = visible(text)
    if CODE.fullmatch(shown):
        return f"`{shown}`"
    return f"<code>{''.join(each if each.isalnum() or each == '.' else f'&#{ord(each)};' for each in shown)}</code>"


def cell(text: str) -> str:
    """Return text as it is, or as code where that would be more than text.

    >>> cell("1.0 GiB → 2.0 GiB"), cell("@someone")
    ('1.0 GiB → 2.0 GiB', '`@someone`')
    """
    return text if PLAIN.fullmatch(text) else code(text)
