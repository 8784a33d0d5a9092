"""Recognises a card of the catalogue by the name that its driver reports, and only if its memory agrees.

`reported_names.csv` holds the names exactly as they are reported: a `NVIDIA GeForce RTX 4090 Laptop GPU` is not an
`rtx-4090`. Cards with different memory may have the same name, and are then not in the catalogue.
"""

from __future__ import annotations

from functools import cache

from devmap_config.hardware.catalogue import catalogue_rows, load_catalogue

LEAST_SHARE_SEEN = 0.9
"""The least share of a card's memory that is reported: torch reports about 1.5 % less than the driver, and error
correction takes up to 6 %.
"""


def recognised(reported_name: str, memory_bytes: int | None, kind: str) -> str | None:
    """Return the catalogue's name of a card, if it is listed; `memory_bytes` is the memory that the card reports, if
    any.
    """
    name = _names().get(_spelling(reported_name))
    if name is None:
        return None
    accelerator = load_catalogue()[name]
    if accelerator.kind != kind:
        return None
    if memory_bytes is None:
        return name
    least_bytes = accelerator.memory_bytes * LEAST_SHARE_SEEN
    return name if least_bytes <= memory_bytes <= accelerator.most_memory_bytes else None


@cache
def _names() -> dict[str, str]:
    return {_spelling(row["reported"]): row["accelerator"] for row in catalogue_rows("reported_names.csv")}


def _spelling(name: str) -> str:
    return " ".join(name.lower().split())
