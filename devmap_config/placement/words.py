"""Bytes in words."""

from __future__ import annotations

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def amount(size_bytes: int) -> str:
    """Bytes for people and for machines: `1.4 GiB (1,503,238,553 bytes)`."""
    return f"{rounded(size_bytes)} ({size_bytes:,} bytes)" if size_bytes >= UNITS[-1][0] else f"{size_bytes:,} bytes"


def unit_of(size_bytes: int) -> tuple[int, str]:
    """The largest unit of which there is at least one, in bytes and by its name."""
    return next((unit for unit in UNITS if size_bytes >= unit[0]), UNITS[-1])


def rounded(size_bytes: int) -> str:
    """Bytes in the largest unit of which there is one: `1.4 GiB`."""
    for unit_bytes, unit in UNITS:
        if abs(size_bytes) >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes} B"
