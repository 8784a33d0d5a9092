"""Writes profiles: the YAML text of values, quoted where YAML or this language would read them otherwise."""

from __future__ import annotations

import re

from devmap_config.profile.document import plain_value

PLAIN = re.compile(r"[A-Za-z0-9_./~-][A-Za-z0-9_./:~-]*")
"""What needs no quotes anywhere, not even in a flow mapping."""


def yaml_text(value: str) -> str:
    """A text as a YAML scalar that reads back as this very text."""
    is_plain = PLAIN.fullmatch(value) and isinstance(plain_value(value), str) and not value.endswith(":")
    if is_plain:
        return value
    escaped = "".join(_escaped(character) for character in value)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\U{ord(character):08x}"
