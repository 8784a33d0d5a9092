"""Finds the graph that is vendored beside a profile, and checks that it is of the model that the profile names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.graph.source import ModelSource, cached_checkpoint, cached_hub_config, is_hub_id, is_local
from devmap_config.graph.vendoring import VendoredGraph, VendoredGraphError, read_vendored, vendored_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.loading import LoadedProfile


def graph_beside(loaded: LoadedProfile, sink: Sink) -> VendoredGraph | None:
    """Return the graph beside the profile, if there is one of exactly this model and revision."""
    path = vendored_path(loaded.path)
    try:
        vendored = read_vendored(path, loaded.boundary)
    except VendoredGraphError as error:
        sink.warning(
            "stale-graph",
            f"the graph in `{path.name}` cannot be used: {error}",
            loaded.profile.model.source.span,
            help="run `devmap compile --vendor` again",
        )
        return None
    if vendored is None:
        return None
    wanted = (loaded.profile.model.source.value, loaded.profile.model.revision)
    if (vendored.source, vendored.revision) != wanted or _differs_from_cache(vendored, loaded):
        warn_of_stale_graph(loaded, sink)
        return None
    return vendored


def _differs_from_cache(vendored: VendoredGraph, loaded: LoadedProfile) -> bool:
    """Return whether the config in a graph differs from the one in the hub's cache for the same commit."""
    if vendored.commit is None or is_local(loaded):
        return False
    source = source_beside(vendored, loaded)
    config = cached_hub_config(vendored.source, vendored.commit)
    return config is not None and replace(source, config=config).config_digest != source.config_digest


def source_beside(vendored: VendoredGraph, loaded: LoadedProfile) -> ModelSource:
    """Return the source of a vendored graph, with the config that is stored in it."""
    is_hub = is_hub_id(vendored.source) and not vendored.source.endswith(".json")
    return ModelSource(
        location=vendored_path(loaded.path),
        config=vendored.config,
        weights=vendored.source if is_hub else None,
        commit=vendored.commit,
        stored_dtype=vendored.stored_dtype,
        known_checkpoint=vendored.checkpoint,
    )


def with_checkpoint(source: ModelSource) -> ModelSource:
    """Return a source with the headers of its checkpoint, if they were read before."""
    if source.weights is None or source.commit is None:
        return source
    return replace(source, checkpoint=cached_checkpoint(source.weights, source.commit, source.config))


def inputs_beside(vendored: VendoredGraph, loaded: LoadedProfile) -> Mapping[str, object]:
    """Return the inputs of a vendored graph, as `GraphInputs.compared` gives them."""
    return {
        "config": source_beside(vendored, loaded).config_digest,
        "class": vendored.class_name,
        "dtype": vendored.dtype,
        "attention": vendored.attention,
        "workload": vendored.workload,
        "quantization": vendored.quantization,
        "adapter": vendored.adapter,
    }


def warn_of_stale_graph(loaded: LoadedProfile, sink: Sink, differing: str = "model or revision") -> None:
    """Report that the graph beside a profile is stale; `differing` names the input that differs."""
    sink.warning(
        "stale-graph",
        f"the graph in `{vendored_path(loaded.path).name}` was made from another {differing}, and is made anew",
        loaded.profile.model.source.span,
        help="run `devmap compile --vendor` again",
    )
