"""Reads a `device_map` as transformers does: which key takes which tensor, and which tensors no key names.

transformers joins the keys into one regular expression, in which a dot matches any character and no key is anchored at
its end, so that `layers.1` also matches `layers.10`. It then looks up the device by the text that matched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import re2

from devmap_config.graph.model import ancestors
from devmap_config.rules.pattern import MAX_BYTES_OF_KEYS, compile_keys, engine_options
from devmap_config.wording import HALF_CHARACTER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from devmap_config.graph.model import ModelGraph, TensorName

PLAIN = re.compile(r"[\w.\-]*")
"""Matches text that stands for itself in a regular expression, except for its dots."""


@dataclass(frozen=True)
class MapReading:
    """The effect of a map in transformers.

    Attributes:
        taken_by: for each tensor the key that takes it; a tensor without one goes to the CPU.
        left_out: the tensors that no key names, by themselves or by a module around them.
        unknown: the keys that name nothing.
        fatal: the keys that make transformers fail: expressions that match a tensor or cannot be compiled, and other
            keys whose dot matches another character in the name of a tensor.
    """

    taken_by: Mapping[TensorName, str]
    left_out: tuple[TensorName, ...]
    unknown: tuple[str, ...]
    fatal: tuple[str, ...]


def read_as_transformers(keys: Collection[str], graph: ModelGraph) -> MapReading:
    """Return the effect that a map with these keys has in transformers."""
    order = sorted(filter(None, keys), key=lambda key: (key.count("."), len(key)), reverse=True)
    rank = {key: number for number, key in enumerate(order)}
    names = compile_keys(key for key in order if PLAIN.fullmatch(key))
    expressions = _Expressions(key for key in order if not PLAIN.fullmatch(key))
    fatal = list(expressions.unreadable)
    taken_by: dict[TensorName, str] = {}
    misread: dict[str, str] = {}
    for name in graph.tensors:
        match = names.match(name)
        key = match.group() if match else ""
        before = rank.get(key, len(order))
        fatal += [other for other in expressions.matching(name) if rank[other] < before]
        if key in keys:
            taken_by[name] = key
        elif key and key not in misread:  # transformers looks up the matched text in the map
            misread[key] = next(other for other in order if len(other) == len(key) and _takes(other, key))
    known = {str(name) for name in (*graph.modules, *graph.tensors)}
    return MapReading(
        taken_by=taken_by,
        left_out=tuple(name for name in graph.tensors if not any(place in keys for place in (name, *ancestors(name)))),
        unknown=tuple(key for key in keys if key not in known and key not in fatal),
        fatal=tuple(dict.fromkeys((*fatal, *misread.values()))),
    )


def _takes(key: str, text: str) -> bool:
    """Return whether a key of plain characters matches a text of the same length."""
    return all(mark in (".", character) for mark, character in zip(key, text, strict=True))


class _Expressions:
    """Keys that are read as regular expressions, all matched at once in linear time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._set = re2.Set.MatchSet(engine_options(MAX_BYTES_OF_KEYS))
        self._keys: list[str] = []
        self.unreadable: list[str] = []
        for key in keys:
            try:
                self._set.Add(HALF_CHARACTER.sub("\ufffd", key))  # names have none, and RE2 refuses them
                self._keys.append(key)
            except re2.error:
                self.unreadable.append(key)
        self._set.Compile()

    def matching(self, name: str) -> list[str]:
        """Return the keys that match the beginning of a name."""
        return [self._keys[number] for number in sorted(self._set.Match(name) or ())]
