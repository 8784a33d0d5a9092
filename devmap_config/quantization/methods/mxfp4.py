"""mxfp4: GPT-OSS's experts in 4 bits, with an exponent for each 32 elements."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from devmap_config.devices import DISK
from devmap_config.quantization.arguments import check_names, flag
from devmap_config.quantization.method import UNCHANGED, Format, Method, Refusal
from devmap_config.quantization.weights import fused_experts, left_as_they_are

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weights


def _format(quantization: Quantization) -> Format | None:
    """Return the format: two values a byte, an exponent of a byte for each 32, biases in float32
    (`Mxfp4GptOssExperts`).
    """
    check_names(quantization.arguments, "modules_to_not_convert")
    if flag(quantization.arguments, "dequantize"):
        return UNCHANGED
    return Format(
        "uint8",
        lambda weight: weight.elements // 2 + ceil(weight.elements / 32),
        lambda weight: weight.elements // 2,
        bias_dtype="float32",
    )


def _converted(model: PreTrainedModel, arguments: Arguments) -> Weights:
    left = left_as_they_are(model, arguments)
    return fused_experts(model, left, lambda _, module: type(module).__name__ == "GptOssExperts")


METHOD = Method(
    name="mxfp4",
    format=_format,
    converts=_converted,
    source="`integrations/mxfp4.py`: `matmul_ogs` multiplies packed weights",
    # transformers 5.24, `quantizers/quantizer_mxfp4.py`, `validate_environment`
    refusal=Refusal(devices=(DISK,), prequantized_is_fine=True),
    needs_accelerator=True,
    loading_arguments=("dequantize",),
)
