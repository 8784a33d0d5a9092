"""Describes in a phrase what takes most of the memory of a device, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes
from devmap_config.graph.model import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Assignment
    from devmap_config.execution.executor import Executor
    from devmap_config.graph.costs import Measurement, ModuleCost
    from devmap_config.graph.model import ModelGraph, Module, TensorName

QUADRATIC = 3
"""If a prompt of twice the length takes more than this factor, growth counts as quadratic rather than linear."""


def heaviest(
    graph: ModelGraph,
    assignments: Iterable[Assignment],
    executor: Executor,
    device: Device,
    parts: Mapping[str, int],
) -> str | None:
    """Return a phrase about what most of the bytes on a device are, and why; `None` if no single thing dominates.

    `parts` are the bytes of `weights`, `cache`, `activations` and `streamed weights` there.
    """
    largest = max(parts, key=lambda part: parts[part])
    if 2 * parts[largest] < sum(parts.values()):
        return None
    placed = tuple(assignments)
    if largest == "weights":
        names = [
            name
            for assignment in placed
            for name in assignment.tensors
            if executor.residence(graph.tensors[name], assignment.location) == device
        ]
        return heaviest_weights(graph, names, parts[largest])
    measurement = graph.measurement
    if measurement is None:
        return None
    if largest == "cache":
        tokens, batch = measurement.workload.context_length, measurement.workload.batch_size
        sequences = f" of {batch} sequences" if batch > 1 else ""
        return f"most of it is the cache{sequences} of {tokens:,} tokens"
    if largest == "activations":
        units = {assignment.unit for assignment in placed if assignment.location.runs_on == device}
        return _heaviest_activation(graph, measurement, units)
    return None


def heaviest_weights(graph: ModelGraph, names: Iterable[TensorName], total_bytes: int) -> str | None:
    """Return a phrase for what most of these weights are, if it is one thing: experts, or the matrices of a
    vocabulary.
    """
    held = dict.fromkeys(graph.storage_of[name] for name in names)
    merged = [name for name in held if name in graph.merged and len(graph.tensors[name].shape) > 2]
    embeddings = [module for module in graph.modules.values() if module.class_name.endswith("Embedding")]
    words = [name for name in held if len(graph.tensors[name].shape) == 2 and _is_of_words(graph, name, embeddings)]
    experts_bytes, words_bytes = graph.weights_bytes(merged), graph.weights_bytes(words)
    if 2 * max(experts_bytes, words_bytes) < total_bytes:
        return None
    if words_bytes > experts_bytes:
        return f"the vocabulary's matrices are {format_bytes(words_bytes)} of {format_bytes(total_bytes)}"
    share = f"{format_bytes(experts_bytes)} of {format_bytes(total_bytes)}"
    method = None if graph.loading is None else graph.loading.method
    dtype = graph.tensors[merged[0]].dtype
    if method is not None and dtype in ITEM_BYTES:
        return f"fused experts stay in {dtype} under {method}: {share}"
    return f"the experts are {share}"


def _is_of_words(graph: ModelGraph, name: TensorName, embeddings: Sequence[Module]) -> bool:
    """Return whether a matrix has a row for each token of the vocabulary: an embedding, or a head as long."""
    rows = graph.tensors[name].shape[0]
    owner = graph.modules[name.rpartition(".")[0]]  # type: ignore[index]
    vocabulary = max((module.parameters[0].shape[0] for module in embeddings if module.parameters), default=0)
    return rows == vocabulary and (owner in embeddings or owner.class_name == "Linear")


def _heaviest_activation(graph: ModelGraph, measurement: Measurement, there: set[str]) -> str | None:
    workload = measurement.workload
    costs = [cost for cost in measurement.modules if _is_within(cost.path, there)]
    if not costs:
        return None
    peaking = max(costs, key=lambda cost: cost.own_peak_bytes)
    tokens, size = f"{workload.prompt_length:,} tokens", format_bytes(peaking.own_peak_bytes)
    if _is_quadratic(peaking):
        return f"attention that is not fused in `{peaking.path}`: {size}, most of it scores, at {tokens}"
    if workload.all_logits and _gives_words(graph, peaking.path):
        return f"the logits of all {tokens} (`logits: all`): {size}"
    return f"`{peaking.path or 'the model'}` takes {size} of it, at {tokens}"


def _is_quadratic(cost: ModuleCost) -> bool:
    return cost.own_peak_bytes > 0 and cost.doubled_own_peak_bytes > QUADRATIC * cost.own_peak_bytes


def _gives_words(graph: ModelGraph, path: str) -> bool:
    """Return whether a module is the model itself, or its head."""
    return not path or ("." not in path and graph.modules[path].class_name == "Linear")  # type: ignore[index]


def _is_within(path: str, units: set[str]) -> bool:
    return "" in units or any(path == unit or path.startswith(f"{unit}.") for unit in units) or not path
