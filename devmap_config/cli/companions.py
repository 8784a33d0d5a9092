"""The sentences about a plan's adapter and its draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes, format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.compiler import Compiled


def companion_lines(compiled: Compiled) -> Iterator[str]:
    """Yield sentences about what is loaded with the model: its size, its device, and its part in predicted figures."""
    graph, draft = compiled.model.graph, compiled.plan.draft
    if added := graph.adapter_tensors:
        modules, size = len(graph.adapted_modules), format_bytes(graph.weights_bytes(added))
        yield f"the adapter adds {size} to {modules:,} modules, which stay where these run"
    if draft is None:
        return
    parts = {"weights": draft.weights_bytes, "cache": draft.kv_cache_bytes}
    held = ", ".join(f"{name} {format_bytes(size_bytes)}" for name, size_bytes in parts.items() if size_bytes)
    turns = f"; it computes with {format_bytes(draft.activation_bytes)}, in turns" if draft.activation_bytes else ""
    yield f"beside it the draft model, {draft.class_name} in {draft.dtype}, is on {draft.device}: {held}{turns}"
    nanoseconds = draft.decode_nanoseconds_per_token
    its = "" if nanoseconds is None else f", which takes {format_duration(nanoseconds)} for each token that it proposes"
    if compiled.plan.prediction.decode_nanoseconds_per_token is not None:
        yield (
            f"times are those without it{its}: how many of these the model takes is not known, and so not what"
            " a token takes with it"
        )
    if graph.measurement is not None:
        yield (
            "no longest context is predicted: the draft model's cache grows with it, and is counted for the workload's"
            " context alone"
        )
