"""The bytes of each tensor that a quantizer converts, with scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from devmap_config.quantization.arguments import reported_as_error
from devmap_config.quantization.method import UNCHANGED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.quantization.method import Format, Quantization

BIAS_ITEM_BYTES = {"float16": 2, "float32": 4}

PACKED_DTYPES = ("int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2")
"""The dtypes of packed weights, whose shape differs from the graph's."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage of a tensor: its torch dtype, its bytes with companions, and the bytes that transformers' planner
    counts.

    `in_buffer` and `is_dense_where_offloaded` are as in `Format`.
    """

    dtype: str
    size_bytes: int
    planner_bytes: int
    in_buffer: bool = False
    is_dense_where_offloaded: bool = False


def stored_tensors(model: PreTrainedModel, quantization: Quantization | None) -> dict[str, Storage]:
    """Return the storage of the tensors that the quantizer converts, of a model on the meta device.

    The result is empty without a quantization, or if its format is unknown.

    Raises:
        QuantizationError: if its arguments cannot be meant.
    """
    form = None if quantization is None else quantization.format()
    if quantization is None or form is None or form is UNCHANGED:
        return {}
    tensors = dict(model.named_parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    stored: dict[str, Storage] = {}
    with reported_as_error(quantization.method.name):
        converted = quantization.method.converts(model, quantization.arguments)
        sized = [(name, weight, form.size(weight)) for name, weight in converted]
    for name, weight, size_bytes in sized:
        if size_bytes is None:
            continue
        stored[name] = Storage(
            form.dtype or dtype,
            size_bytes * weight.matrices,
            ceil(form.planner(weight) * weight.matrices),
            in_buffer=form.in_buffers,
            is_dense_where_offloaded=form.is_dense_where_offloaded,
        )
        if name in tensors:
            stored.update(_biases(name, form, tensors))
    return stored


def _biases(weight: str, form: Format, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Storage]]:
    """Yield the biases beside a weight, if the quantizer's modules store them in another dtype."""
    if form.bias_dtype is None:
        return
    for name in (weight.removesuffix("weight") + "bias", f"{weight}_bias"):
        if name in tensors:
            size_bytes = tensors[name].numel() * BIAS_ITEM_BYTES[form.bias_dtype]
            yield name, Storage(form.bias_dtype, size_bytes, size_bytes, in_buffer=form.in_buffers)
