"""Flattens parsed values to scalars by their routes, which a lock records in order to say later which of them
changed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, TypeAlias

from devmap_config.graph.digest import digest
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.hardware.inventory import Inventory

Scalar: TypeAlias = "str | int | float | bool | None"
Values: TypeAlias = "Mapping[str, Scalar]"

MAX_CHARACTERS = 100
"""Longer values are stored as digests, because people read locks. No hub id is longer."""

ABSOLUTE_PATH = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")

DIGEST_CHARACTERS = 19
"""`sha256:` and twelve digits, enough to see that two digests differ."""


def values_of(data: object) -> dict[str, Scalar]:
    """Return plain data as scalars by route: `rope_scaling.factor`, `placement.pins[2].device`.

    A list of scalars is one value. Long values, and paths of one machine, are replaced by digests.
    """
    return dict(_scalars(data, ""))


def values_of_hardware(inventory: Inventory) -> dict[str, Scalar]:
    """Return each figure of the devices and the links, with equal figures of several devices joined:
    `cuda:[0-7].memory_bytes`.
    """
    data = inventory.to_json()
    figures: dict[tuple[str, Scalar], list[str]] = {}
    for device in data["devices"]:  # type: ignore[attr-defined]
        for name, value in device.items():
            if name != "id":
                figures.setdefault((f".{name}", value), []).append(device["id"])
    for pair, link in data["links"].items():  # type: ignore[attr-defined]
        text = f"{link['bytes_per_second']} B/s, {link['latency_nanoseconds']} ns"
        unpinned = link["unpinned_bytes_per_second"]
        text += "" if unpinned is None else f", {unpinned} B/s from memory that is not pinned"
        figures.setdefault(("", text), []).append(pair)
    values = {f"{names}{figure}": value for (figure, value), ids in figures.items() for names in folded_devices(ids)}
    for name, route in (("dispatch_nanoseconds", "host"), ("together_bytes_per_second", "links")):
        if (value := data.get(name)) is not None:
            values[f"{route}.{name}"] = value  # type: ignore[assignment]
    return values


def folded_devices(ids: Iterable[str]) -> tuple[str, ...]:
    """Return devices, or pairs of them, as ranges.

    Example:
        >>> folded_devices(["node-1/cuda:0", "node-1/cuda:1"])
        ('node-1/cuda:[0-1]',)
    """
    paths = [re.sub(r"[:-]", lambda match: {":": ".", "-": ".-."}[match.group()], device) for device in ids]
    return tuple(path.replace(".-.", "-").replace(".", ":") for path in fold_paths(paths, with_steps=False))


def _scalars(data: object, route: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _scalars(value, f"{route}.{key}" if route else str(key))
        if not data and route:
            yield route, "{}"
    elif isinstance(data, (list, tuple)):
        if any(isinstance(item, (dict, list, tuple)) for item in data):
            for index, item in enumerate(data):
                yield from _scalars(item, f"{route}[{index}]")
        else:
            text = json.dumps(list(data), ensure_ascii=False, default=str)
            yield route, text if len(text) <= MAX_CHARACTERS else f"{len(data)} items, {_short_digest(text)}"
    elif data is None or isinstance(data, (bool, int, float)):
        yield route, data
    else:
        text = str(data)
        is_kept = len(text) <= MAX_CHARACTERS and not ABSOLUTE_PATH.match(text)
        yield route, text if is_kept else f"{len(text)} characters, {_short_digest(text)}"


def _short_digest(text: str) -> str:
    return digest(text)[:DIGEST_CHARACTERS]
