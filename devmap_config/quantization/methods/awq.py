"""AWQ: 4-bit integers in words of int32, as gptqmodel's kernels store them."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from devmap_config.quantization.arguments import bits_and_group, check_names
from devmap_config.quantization.method import Copies, Format, Method
from devmap_config.quantization.weights import linear_weights

if TYPE_CHECKING:
    from devmap_config.quantization.method import Quantization
    from devmap_config.quantization.weights import Weight


def _format(quantization: Quantization) -> Format | None:
    """Return the format: `qweight` and `qzeros` in int32, `scales` in float16 (gptqmodel's `AWQuantLinear`)."""
    bits, group = bits_and_group(METHOD.name, quantization.arguments, (4,))
    check_names(quantization.arguments, "modules_to_not_convert")
    form = quantization.arguments.get("format") or quantization.arguments.get("version") or "gemm"
    if not quantization.is_prequantized or str(form).lower() != "gemm":
        return None

    def size(weight: Weight) -> int:
        groups = weight.columns // (group or weight.columns)
        packed_row = 4 * ceil(weight.rows * bits / 32)
        return weight.columns * packed_row + groups * packed_row + 2 * groups * weight.rows

    return Format("int32", size, size, bias_dtype="float16", in_buffers=True)


METHOD = Method(
    name="awq",
    format=_format,
    converts=partial(linear_weights, add_default_skips=True),
    details=lambda arguments: f"{arguments.get('bits', 4)} bit",
    copies=lambda _, itemsize: Copies(multiplying=itemsize),
    source="gptqmodel's torch kernel and its GEMM kernel in prefill; Marlin and ExLlama do not",
    loading_arguments=("backend",),
    needs_quantized_checkpoint=True,
)
