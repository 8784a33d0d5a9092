"""Estimates the costs of running a model by formulas, if its code cannot be run without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.graph.costs import Measurement, ModuleCost, WorkloadShape
from devmap_config.graph.model import ModelGraph, ModulePath

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.graph.failures import MeasurementFailure

BYTES_PER_ELEMENT = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

LIVE_HIDDEN_STATES = 8
"""Copies of the hidden states that live at once in a block: residual, norm in fp32, queries, output, a spare."""

LIVE_INTERMEDIATE_STATES = 3
"""Copies of the widened states in a gated feed-forward: gate, its activation, up."""


def estimate(
    graph: ModelGraph, config: Mapping[str, Any], workload: WorkloadShape, failure: MeasurementFailure
) -> Measurement:
    """Return the costs of a plain decoder of this size, spread over the blocks, and marked as not measured.

    `config` is the text part of the model's config; missing values are those of a plain decoder.
    """
    hidden = _number(config, "hidden_size", "d_model", "n_embd")
    heads = _number(config, "num_attention_heads", "n_head") or 1
    key_value_heads = _number(config, "num_key_value_heads") or heads
    head_size = _number(config, "head_dim") or hidden // heads
    intermediate = _number(config, "intermediate_size", "d_ff") or 4 * hidden
    layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    weights = next((tensor for tensor in graph.tensors.values() if tensor.kind == "parameter"), None)
    element_bytes = BYTES_PER_ELEMENT.get(weights.dtype if weights else "", 4)
    token_bytes = 2 * key_value_heads * head_size * element_bytes * workload.batch_size
    blocks = [path for path, module in graph.modules.items() if graph.is_no_split(module)] or [ModulePath("")]
    per_block = token_bytes * max(layers, 1) // len(blocks)
    state_bytes = (LIVE_HIDDEN_STATES * hidden + LIVE_INTERMEDIATE_STATES * intermediate) * element_bytes
    peak_bytes = state_bytes * workload.batch_size * workload.prompt_length
    costs = [
        ModuleCost(
            path=path,
            cache_bytes=per_block * workload.context_length,
            cache_bytes_per_token=per_block,
            prefill_peak_bytes=peak_bytes,
            doubled_cache_bytes=2 * per_block * workload.context_length,
            doubled_peak_bytes=2 * peak_bytes,
            decode_peak_bytes=state_bytes * workload.batch_size,
        )
        for path in blocks
    ]
    return Measurement(workload, tuple(costs), measured=False, reason=failure.reason, cause=failure.cause)


def _number(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of these entries of a config that is a positive number, else 0."""
    numbers = (config.get(name) for name in names)
    return next((value for value in numbers if isinstance(value, int) and value > 0), 0)
