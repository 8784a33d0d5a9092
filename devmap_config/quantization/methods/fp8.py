"""fp8: transformers' fine-grained method, with a scale for each block of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.devices import STORAGE_DEVICES
from devmap_config.quantization.arguments import QuantizationError, check_names, flag
from devmap_config.quantization.method import FLOAT32_BYTES, UNCHANGED, Copies, Format, Method, Refusal
from devmap_config.quantization.weights import fused_experts, left_as_they_are, matrices

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weight, Weights


def _format(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    if flag(arguments, "dequantize"):
        return UNCHANGED
    block = arguments.get("weight_block_size", (128, 128))
    check_names(arguments, "modules_to_not_convert")
    if block is not None and not _is_block(block):
        raise QuantizationError("`weight_block_size` is not two sizes", "write `weight_block_size: [128, 128]`")
    if arguments.get("modules_to_convert") or arguments.get("expert_dtype", "fp8") != "fp8":
        return None
    scale_bytes = {"float": 4, "ue8m0": 1}.get(arguments.get("scale_fmt", "float"))
    is_static = str(arguments.get("activation_scheme", "dynamic")).lower() == "static"
    if scale_bytes is None or (block is None and not quantization.is_prequantized):
        return None

    def scales(weight: Weight) -> int:
        """Return the number of scales; gate and up projections in one tensor have separate blocks."""
        return 1 if block is None else weight.blocks(*block)

    def size(weight: Weight) -> int | None:
        if not quantization.is_prequantized and block and (weight.rows % block[0] or weight.columns % block[1]):
            # `Fp8Quantize` passes such a weight on, with a scale that is never set.
            return weight.elements * weight.element_bytes + scale_bytes * scales(weight)
        return weight.elements + scale_bytes * scales(weight) + (4 if is_static else 0)

    def planner(weight: Weight) -> int:
        # A checkpoint's scales are counted in their own dtype, scales that loading makes as if they were quantised.
        per_scale = scale_bytes if quantization.is_prequantized else 1
        return weight.elements + per_scale * scales(weight) + (4 if is_static else 0)

    return Format("float8_e4m3fn", size, planner)


def _is_block(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _converted(model: PreTrainedModel, arguments: Arguments) -> Weights:
    import torch

    left = left_as_they_are(model, arguments)

    def is_converted(module: torch.nn.Module) -> bool:
        is_grouped = isinstance(module, torch.nn.Linear) and "GroupedLinear" in type(module).__name__
        return type(module) is torch.nn.Linear or is_grouped

    yield from matrices(model, is_converted, left)
    yield from fused_experts(model, left, lambda name, _: name.endswith(".experts"))


METHOD = Method(
    name="fp8",
    format=_format,
    converts=_converted,
    copies=lambda _, itemsize: Copies(quantising=(itemsize if itemsize < FLOAT32_BYTES else 0) + 3 * FLOAT32_BYTES + 1),
    source="transformers 5.24, `integrations/finegrained_fp8.py`: `Fp8Quantize`; Triton and DeepGEMM multiply in fp8",
    # transformers 5.24, `quantizers/quantizer_finegrained_fp8.py`, `validate_environment`
    refusal=Refusal(devices=STORAGE_DEVICES, prequantized_is_fine=True),
    needs_accelerator=True,
    needs_fp8=True,
    loading_arguments=("dequantize", "modules_to_not_convert"),
)
