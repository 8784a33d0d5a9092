"""Recognises a card of the catalogue by the name that its driver reports, and only if its memory agrees.

`reported_names.csv` holds the names, each exactly as it is reported: a `NVIDIA GeForce RTX 4090 Laptop GPU` is no
`rtx-4090`. One name may be that of cards with different memory, which are then not in the catalogue.
"""

from __future__ import annotations

from functools import cache

from devmap_config.hardware.catalogue import catalogue_rows, load_catalogue

LEAST_SHARE_SEEN = 0.9
"""torch reports some 1.5 % less than the driver does, which keeps it for itself; error correction takes up to 6 %."""


def recognised(reported_name: str, memory_bytes: int | None, kind: str) -> str | None:
    """Return the catalogue's name of a card, if it has it; `memory_bytes` is what the card reports, if it does."""
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
