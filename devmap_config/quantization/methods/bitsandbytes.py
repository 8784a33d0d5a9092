"""bitsandbytes: 8 bits with a scale a row, or 4 bits with one for each 64 elements."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from devmap_config.devices import STORAGE_DEVICES
from devmap_config.quantization.arguments import QuantizationError, check_names, flag
from devmap_config.quantization.method import FLOAT32_BYTES, Copies, Format, Method, Refusal
from devmap_config.quantization.weights import is_plain_linear, linear_weights
from devmap_config.wording import closest

if TYPE_CHECKING:
    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weight


BLOCK = 64
"""Elements that share one absolute maximum (`bitsandbytes.functional.quantize_4bit`, on CUDA and CPU)."""

CODE_BYTES = 16 * 4
"""The 16 values of nf4 or fp4 in float32, which every weight holds."""

NESTED_BLOCK = 256
NESTED_CODE_BYTES = 256 * 4 + 4
"""The 256 values of the quantised maxima in float32, and their offset."""

STORAGE_ITEM_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}
"""The dtypes that 4-bit values may be packed into (`bnb_4bit_quant_storage`)."""

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")

ACCEPT_OFFLOADING = "llm_int8_enable_fp32_cpu_offload"


def _format(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    in_4bit, in_8bit = flag(arguments, "load_in_4bit"), flag(arguments, "load_in_8bit")
    if in_4bit == in_8bit:
        choices = "one of `load_in_4bit: true` and `load_in_8bit: true`"
        misspelt = {name: closest(name, ("load_in_4bit", "load_in_8bit")) for name in arguments}
        hint = next((f"`{name}` by `{close}`" for name, close in misspelt.items() if close not in (None, name)), None)
        raise QuantizationError(f"bitsandbytes takes {choices}", f"replace {hint}" if hint else f"say {choices}")
    check_names(arguments, "llm_int8_skip_modules")
    # Modules that a map puts on the CPU are then not converted (`_process_model_before_weight_loading`), nor are they
    # in fp32.
    offloads = flag(arguments, ACCEPT_OFFLOADING) and not quantization.is_prequantized
    if flag(arguments, "llm_int8_has_fp16_weight") or quantization.is_patched:
        return None
    if in_8bit:
        return Format(
            "int8",
            lambda weight: weight.elements + 4 * weight.rows,
            lambda weight: weight.elements,
            is_dense_where_offloaded=offloads,
        )
    kind = arguments.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise QuantizationError(f"`{kind}` is not a type of bitsandbytes", "write `bnb_4bit_quant_type: nf4`, or `fp4`")
    if (computes_in := _computes_in(arguments)) not in COMPUTE_DTYPES:
        raise QuantizationError(
            f"bitsandbytes does not compute in `{computes_in}`", f"say one of {', '.join(COMPUTE_DTYPES)}"
        )
    dtype = str(arguments.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    item_bytes = STORAGE_ITEM_BYTES.get(dtype)
    if item_bytes is None:
        return None
    is_nested = flag(arguments, "bnb_4bit_use_double_quant")

    def size(weight: Weight) -> int:
        packed = (weight.elements + 1) // (2 * item_bytes) * item_bytes
        maxima = ceil(weight.elements / BLOCK)
        nested = maxima + 4 * ceil(maxima / NESTED_BLOCK) + NESTED_CODE_BYTES
        return packed + CODE_BYTES + (nested if is_nested else 4 * maxima)

    return Format(dtype, size, lambda weight: weight.elements * 0.5, is_dense_where_offloaded=offloads)


def _details(arguments: Arguments) -> str:
    return f"{arguments.get('bnb_4bit_quant_type', 'fp4')} 4 bit" if arguments.get("load_in_4bit") else "8 bit"


def _computes_in(arguments: Arguments) -> str | None:
    """Return the dtype to which `Linear4bit` casts inputs and weights: the one that transformers passes to it, else
    float32.
    """
    if not arguments.get("load_in_4bit"):
        return None
    return str(arguments.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")


def _copies(quantization: Quantization, itemsize: int) -> Copies:
    """Return the copies that bitsandbytes makes: a dense one on accelerators for more than a few tokens. The CPU's code
    uses torch, mostly in float32, and repacks 4-bit weights at their first use.
    """
    if not quantization.is_on_cpu:
        return Copies(multiplying=itemsize)
    converted = itemsize if itemsize < FLOAT32_BYTES else 0
    if not quantization.arguments.get("load_in_4bit"):
        return Copies(multiplying=itemsize, quantising=itemsize + 2 * FLOAT32_BYTES + 2)
    is_nf4 = quantization.arguments.get("bnb_4bit_quant_type") == "nf4"  # otherwise fp4
    return Copies(multiplying=7, quantising=converted + (15 if is_nf4 else 29))


METHOD = Method(
    name="bitsandbytes",
    format=_format,
    converts=partial(linear_weights, is_converted=is_plain_linear, skips="llm_int8_skip_modules"),
    details=_details,
    copies=_copies,
    computes_in=_computes_in,
    source="bitsandbytes 0.50: `gemm_4bit` beyond a few tokens, `backends/default/ops.py` on a CPU",
    # transformers 5.24, `quantizers/quantizer_bnb_4bit.py` and `…_bnb_8bit.py`, `validate_environment`
    refusal=Refusal(devices=STORAGE_DEVICES, alone_is_fine=True, unless=ACCEPT_OFFLOADING),
    lowers_budgets=True,
)
