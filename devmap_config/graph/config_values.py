"""Checks that the numbers of a model's config are possible, and finds values that may keep the model from being built.

Modules and labels are built one by one, so an absurd number would take hours, and all memory.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LARGEST_NUMBER = 2**63 - 1
"""The largest integer of torch's sizes."""
MOST_LAYERS = 1_000
"""The layers of the deepest network that was published (DeepNet). Measuring and placing as many takes a minute."""
MOST_EXPERTS = 50_000
"""Three times the experts of Doge, which has the most of all models in transformers."""
MOST_COUNTED = 1_000_000
"""Forty times the number of classes of ImageNet-21k."""

LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?)(_|$)")
EXPERTS = re.compile(r"(^|_)experts$")
COUNTS = re.compile(r"(^|_)(n|num|numb|repeats?|levels?|groups?|times|stages?)(_|$)")
"""Matches keys that count things which are built one by one; tested with every key of every config of transformers."""
SIZES = re.compile(
    r"(^|_)(size|dims?|lengths?|widths?|params?|parameters|tokens?|samples?|steps?|words|positions|ids?)(_|$)"
)
"""Matches keys of sizes: one object is built, however large it is."""

LONGEST_VALUE = 40

Path = tuple[str, ...]


def unreasonable_number(config: Mapping[str, Any]) -> str | None:
    """Return a message about the first impossible number of a config; `None` if all are possible.

    >>> unreasonable_number({"text_config": {"num_hidden_layers": 200_000}})
    '`text_config.num_hidden_layers` is 200,000, and no model has more than 1,000'
    """
    for path, value in _numbers(config, ()):
        key = next((part for part in reversed(path) if not part.isdigit()), "")
        if isinstance(value, float):
            if math.isnan(value):
                return f"`{'.'.join(path)}` is not a number (NaN)"
            continue
        if abs(value) > (most := _most(key)):
            number = f"{value:,}" if len(str(value)) < LONGEST_VALUE else f"a number of {len(str(value))} digits"
            return f"`{'.'.join(path)}` is {number}, and no model has more than {most:,}"
    return None


def _most(key: str) -> int:
    if SIZES.search(key):
        return LARGEST_NUMBER
    if LAYERS.search(key):
        return MOST_LAYERS
    if EXPERTS.search(key):
        return MOST_EXPERTS
    return MOST_COUNTED if COUNTS.search(key) else LARGEST_NUMBER


def _numbers(value: object, path: Path) -> Iterator[tuple[Path, int | float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, (*path, str(index)))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def doubtful_values(config: Mapping[str, Any], usual: Mapping[str, Any], path: Path = ()) -> Iterator[str]:
    """Yield the values of a config that are of another type, or another sign, than in the usual config of its type.

    >>> list(doubtful_values({"hidden_size": "x", "text_config": {"num_heads": -1}},
    ...                      {"hidden_size": 4096, "text_config": {"num_heads": 32}}))
    ['`hidden_size` is "x"', '`text_config.num_heads` is -1']
    """
    for key, value in config.items():
        expected, here = usual.get(key), (*path, key)
        if isinstance(value, dict) and isinstance(expected, dict):
            yield from doubtful_values(value, expected, here)
        elif expected is not None and _differs(value, expected):
            literal = json.dumps(value)
            yield f"`{'.'.join(here)}` is {literal if len(literal) <= LONGEST_VALUE else literal[:LONGEST_VALUE] + '…'}"


def _differs(value: object, expected: object) -> bool:
    numbers = (int, float)
    if isinstance(expected, bool) or not isinstance(expected, numbers):
        return not isinstance(value, type(expected)) and value is not None
    if isinstance(value, bool) or not isinstance(value, numbers):
        return value is not None
    return (expected > 0 and value <= 0) or (isinstance(expected, int) and isinstance(value, float))
