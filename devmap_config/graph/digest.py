"""One digest for all plain data: of a config, a lock, the names in a checkpoint."""

from __future__ import annotations

import hashlib
import json


def digest(value: object) -> str:
    """Return the digest of plain data, whatever the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
