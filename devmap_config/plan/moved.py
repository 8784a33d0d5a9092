"""The figures of a plan that follow from measurement, and may change with the versions of libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MEASURED_BYTES = {"kv_cache_bytes": "cache", "activation_bytes": "activations", "overhead_bytes": "streamed weights"}
"""The bytes that a device holds besides weights, with their names in messages."""

PREDICTED: Mapping[str, tuple[str, Callable[[int], str]]] = {
    "decode_nanoseconds_per_token": ("predicted token", format_duration),
    "prefill_nanoseconds": ("predicted prefill", format_duration),
    "streamed_bytes_per_token": ("copied at every forward", format_bytes),
    "hops": ("hops between devices", "{:,}".format),
    "longest_context": ("longest context", "{:,} tokens".format),
}

LOADING = frozenset({"loading_bytes", "loading_ram_bytes"})
"""Keys of a plan for the memory of loading, which early locks lack."""

FOLLOW_FROM_MEASUREMENT = frozenset({"measured", "free_bytes", *LOADING, *MEASURED_BYTES, *PREDICTED})
"""Keys of a plan that may change with the libraries; all others follow from the module tree, profile and hardware."""


def moved_figures(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the figures that changed from the locked plan to the present measurement: `activations on cuda:0 1 → 2
    GiB`.
    """
    return (*_moved_bytes(before, after), *_moved_predictions(before["prediction"], after["prediction"]))


def _moved_bytes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for then, now in zip(before["devices"], after["devices"], strict=False):
        for key, words in MEASURED_BYTES.items():
            if then[key] != now[key]:
                yield f"{words} on {now['id']} {_arrow(then[key], now[key], format_bytes)}"


def _moved_predictions(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key, (words, show) in PREDICTED.items():
        if before[key] != after[key]:
            yield f"{words} {_arrow(before[key], after[key], show)}"


def _arrow(before: int | None, after: int | None, show: Callable[[int], str]) -> str:
    """Return `529.0 MiB → 545.0 MiB`; with all digits if rounding would hide the difference."""
    texts = ["unknown" if value is None else show(value) for value in (before, after)]
    if texts[0] == texts[1]:
        texts = [f"{value:,}" for value in (before, after) if value is not None]
    return " → ".join(texts)
