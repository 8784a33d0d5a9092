"""The inputs of a plan as digests of parsed values: what makes a lock stale, and nothing else."""

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
"""Keys of a profile that change nothing by themselves: variables and bases count by what they lead to."""

MEASURED = ("measurement", "skip_keys", "merged")
"""Of a graph, what tells how the model runs and not what it is: it differs between versions of transformers."""


def inputs_of(prepared: Prepared) -> InputDigests:
    """Return the digests, and the parsed values, of everything from which a plan is made."""
    loaded, model, inventory = prepared.loaded, prepared.model, prepared.inventory
    profile = loaded.profile.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(INCIDENTAL))
    graph = _as_digested(model.graph)
    profile_digest = digest(profile)
    if loaded.profile.hardware.hosts:
        del profile["hardware"]["devices"]  # in whose place they are
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
    """Return the digest that early locks hold: of the module tree and its measurement together."""
    return digest({key: part for key, part in _as_digested(graph).items() if key not in ("schema", "merged", "unread")})


def _as_digested(graph: ModelGraph) -> dict[str, Any]:
    """Return a graph as plain data without the end of positions, which follows from the config and is missing in early
    locks.
    """
    value = graph_to_json(graph)
    if value["measurement"] is not None:
        del value["measurement"]["positions"]
    return value
