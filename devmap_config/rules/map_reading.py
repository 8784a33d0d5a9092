"""Reads a `device_map` as transformers does: which tensor goes where by which key, and what no key names.

Its keys are joined into one regular expression, in which a dot takes any character and nothing is anchored at the end,
so that `layers.1` takes `layers.10` as well; the device is then looked up by what matched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import re2

from devmap_config.graph.model import ancestors
from devmap_config.rules.pattern import compile_expression, compile_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.rules.pattern import CompiledExpression

PLAIN = re.compile(r"[\w.\-]*")
"""What means itself in a regular expression, but for the dot."""


@dataclass(frozen=True)
class MapReading:
    """What transformers makes of a map.

    Attributes:
        taken_by: by tensor the key that takes it; without one it goes to the CPU.
        left_out: the tensors that no key names, by themselves or by a module around them.
        unknown: the keys that name nothing.
        fatal: the keys over which transformers fails: expressions that match a tensor, or are none.
    """

    taken_by: Mapping[TensorName, str]
    left_out: tuple[TensorName, ...]
    unknown: tuple[str, ...]
    fatal: tuple[str, ...]


def read_as_transformers(keys: Collection[str], graph: ModelGraph) -> MapReading:
    """Return what transformers makes of a map with these keys."""
    order = sorted(filter(None, keys), key=lambda key: (key.count("."), len(key)), reverse=True)
    rank = {key: number for number, key in enumerate(order)}
    names = compile_keys(key for key in order if PLAIN.fullmatch(key))
    expressions = {key: _compiled(key) for key in order if not PLAIN.fullmatch(key)}
    fatal = [key for key, expression in expressions.items() if expression is None]
    taken_by: dict[TensorName, str] = {}
    for name in graph.tensors:
        found = names.match(name)
        key = found.group() if found else ""
        before = rank.get(key, len(order))
        fatal += [other for other, each in expressions.items() if each and rank[other] < before and each.match(name)]
        if key in keys:
            taken_by[name] = key
    known = {str(name) for name in (*graph.modules, *graph.tensors)}
    return MapReading(
        taken_by=taken_by,
        left_out=tuple(name for name in graph.tensors if not any(place in keys for place in (name, *ancestors(name)))),
        unknown=tuple(key for key in keys if key not in known and key not in fatal),
        fatal=tuple(dict.fromkeys(fatal)),
    )


def _compiled(key: str) -> CompiledExpression | None:
    """Return a key as the expression that it is read as, if it is one; by an engine that cannot run away."""
    try:
        return compile_expression(key)
    except re2.error:
        return None
