"""Computes digests of the inputs of a plan, from parsed values: exactly those that make a lock stale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.graph.digest import digest
from devmap_config.graph.serialization import graph_to_json
from devmap_config.plan.lock import InputDigests
from devmap_config.plan.values import values_of, values_of_hardware

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph
    from devmap_config.prepared import Prepared

INCIDENTAL = frozenset({"name", "description", "variables", "extends"})
"""Keys of a profile without an effect of their own: variables and base files count by the values that they result
in.
"""

MEASURED = ("measurement", "skip_keys", "merged")
"""The parts of a graph that describe how the model runs rather than what it is, and differ between versions of
transformers.
"""


def inputs_of(prepared: Prepared) -> InputDigests:
    """Return the digests, and the parsed values, of everything that a plan is made from."""
    loaded, model, inventory = prepared.loaded, prepared.model, prepared.inventory
    profile = loaded.profile.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(INCIDENTAL))
    graph = _as_digested(model.graph)
    profile_digest = digest(profile)
    if loaded.profile.hardware.hosts:
        del profile["hardware"]["devices"]  # the hosts replace them
    return InputDigests(
        profile=profile_digest,
        config=model.source.config_digest,
        graph=digest({key: part for key, part in graph.items() if key not in (*MEASURED, "schema", "unread")}),
        measurement=digest({key: graph[key] for key in MEASURED if key in graph}),
        hardware=digest(inventory.to_json()),
        commit=model.source.commit,
        checkpoint=model.source.checkpoint_digest,
        adapter=None if model.adapter is None else model.adapter.config.digest,
        assistant=None if prepared.draft is None else prepared.draft.digest,
        values={
            "config": values_of(model.source.counted_config),
            "hardware": values_of_hardware(inventory),
            "profile": values_of(profile),
        },
    )


def early_graph_digest(graph: ModelGraph) -> str:
    """Return the digest of early locks, which covers the module tree and its measurement together."""
    return digest({key: part for key, part in _as_digested(graph).items() if key not in ("schema", "merged", "unread")})


def _as_digested(graph: ModelGraph) -> dict[str, Any]:
    """Return a graph as plain data without the end of positions, which early locks lack and which follows from the
    config.
    """
    value = graph_to_json(graph)
    if value["measurement"] is not None:
        del value["measurement"]["positions"]
    return value
