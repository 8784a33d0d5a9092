"""GPTQ: integers of 2 to 8 bits in words of int32, as gptqmodel's kernels store them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from devmap_config.quantization.arguments import bits_and_group
from devmap_config.quantization.method import Copies, Format, Method
from devmap_config.quantization.weights import is_plain_linear, matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weight, Weights


BLOCKS = "transformer.h model.decoder.layers gpt_neox.layers model.layers model.language_model.layers".split()
"""The paths of quantised blocks; the first that a model has counts (`optimum.gptq.constants.BLOCK_PATTERNS`)."""


def _format(quantization: Quantization) -> Format | None:
    """Return the format: `qweight`, `qzeros` and `g_idx` in int32, `scales` in float16 (gptqmodel's `GPTQQuantLinear`).

    gptqmodel's torch kernels also store the shifts that unpack a word; other kernels repack, and have a workspace of
    some hundred bytes. These kernels store everything in buffers. Marlin has parameters, and repacks them after
    loading, which is impossible for streamed ones.
    """
    bits, group = bits_and_group(METHOD.name, quantization.arguments, (2, 3, 4, 8))
    form = quantization.arguments.get("checkpoint_format") or quantization.arguments.get("format") or "gptq"
    if not quantization.is_prequantized or form not in ("gptq", "gptq_v2") or bits == 3:
        return None

    def size(weight: Weight) -> int:
        groups = ceil(weight.columns / (group or weight.columns))
        packed = 4 * weight.rows * ceil(weight.columns * bits / 32)
        zeros = 4 * groups * ceil(weight.rows * bits / 32)
        shifts = 4 * (32 // bits)
        return packed + zeros + 2 * groups * weight.rows + 4 * weight.columns + shifts

    return Format("int32", size, size, bias_dtype="float16", in_buffers=True)


def _converted(model: PreTrainedModel, arguments: Arguments) -> Weights:
    names = [name for name, _ in model.named_modules()]
    blocks = arguments.get("block_name_to_quantize") or next(
        (prefix for prefix in BLOCKS if any(name.startswith(prefix) for name in names)), None
    )
    inside = arguments.get("modules_in_block_to_quantize")
    endings = None if inside is None else tuple(ending for group in inside for ending in group)
    if blocks is None:
        return
    for name, weight in matrices(model, is_plain_linear):
        module = name.removesuffix(".weight")
        if module.startswith(blocks) and (endings is None or module.endswith(endings)):
            yield name, weight


METHOD = Method(
    name="gptq",
    format=_format,
    converts=_converted,
    details=lambda arguments: f"{arguments.get('bits', 4)} bit",
    copies=lambda _, itemsize: Copies(multiplying=itemsize),
    source="gptqmodel's `TorchLinear.forward`; Marlin and ExLlama do not",
    loading_arguments=("backend",),
)
