"""Derives the costs of running a model with quantised weights from those measured with dense weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.graph.model import TensorName, ancestors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.graph.costs import Measurement, ModuleCost
    from devmap_config.graph.model import ModelGraph


def quantized(
    measurement: Measurement,
    graph: ModelGraph,
    dense_bytes: Mapping[str, int],
    copy_bytes: Mapping[str, int],
    *,
    copies_for_each_token: bool,
) -> Measurement:
    """Return a measurement with dense weights, converted to the quantised weights of the graph.

    Args:
        measurement: the measurement of the model before quantization.
        graph: the graph, with sizes after quantization.
        dense_bytes: the bytes of each converted tensor in the dtype of the activations.
        copy_bytes: the bytes of the dense copies that modules make of these tensors for their products.
        copies_for_each_token: whether modules make these copies for a single token, too.
    """
    dense: dict[str, int] = {}
    held: dict[str, int] = {}
    copied: dict[str, int] = {}
    written: dict[str, int] = {}
    for name, size_bytes in dense_bytes.items():
        module = name.rpartition(".")[0]
        dense[module] = dense.get(module, 0) + size_bytes
        held[module] = held.get(module, 0) + graph.tensors[TensorName(name)].size_bytes
        written[module] = written.get(module, 0) + copy_bytes.get(name, 0)
        for path in (module, *ancestors(module)):
            copied[path] = max(copied.get(path, 0), copy_bytes.get(name, 0))

    def stored(cost: ModuleCost) -> ModuleCost:
        copied_bytes = copied.get(cost.path, 0)
        peaks = {
            figure: getattr(cost, figure) + copied_bytes
            for figure in ("prefill_peak_bytes", "decode_peak_bytes", "doubled_peak_bytes")
        }
        if cost.path not in dense:
            return replace(cost, **peaks)
        before, after = dense[cost.path], held[cost.path]
        written_bytes = 2 * written.get(cost.path, 0)  # and read again
        token_bytes = after + (written_bytes if copies_for_each_token else 0)
        return replace(
            cost,
            **peaks,
            own_peak_bytes=cost.own_peak_bytes + copied_bytes,
            doubled_own_peak_bytes=cost.doubled_own_peak_bytes + copied_bytes,
            prefill_touched_bytes=max(cost.prefill_touched_bytes - before, 0) + after + written_bytes,
            # For one token, little is read except weights, and only those of active experts.
            decode_touched_bytes=cost.decode_touched_bytes * token_bytes // before,
        )

    return replace(measurement, modules=tuple(map(stored, measurement.modules)))
