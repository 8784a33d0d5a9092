"""quanto: int8 and fp8 with a scale for each row, int4 and int2 with one for each group."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from devmap_config.devices import STORAGE_DEVICES
from devmap_config.quantization.arguments import QuantizationError, check_names
from devmap_config.quantization.method import Copies, Format, Method, Refusal

if TYPE_CHECKING:
    from devmap_config.quantization.method import Quantization
    from devmap_config.quantization.weights import Weight


BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}
SCALES_BYTES = 8
"""The bytes of a module's `input_scale` and `output_scale` in float32, which exist even if activations are not
quantised.
"""


def _format(quantization: Quantization) -> Format | None:
    weights = quantization.arguments.get("weights", "int8")
    check_names(quantization.arguments, "modules_to_not_convert")
    if not isinstance(weights, str) or weights not in BITS:
        allowed = ", ".join(BITS)
        raise QuantizationError(
            f"`{weights}` is not a type of quanto's weights", f"write `weights:` with one of {allowed}"
        )
    if quantization.is_prequantized or quantization.arguments.get("activations") is not None:
        return None
    bits = BITS[weights]

    def size(weight: Weight) -> int:
        if bits == 8:
            return weight.elements + weight.element_bytes * weight.rows + SCALES_BYTES
        group = _group(weight.columns)
        grouped_rows = weight.rows if group is None else weight.elements // group
        packed = ceil(grouped_rows * bits / 8) * (group or weight.columns)
        return packed + 2 * weight.element_bytes * grouped_rows + SCALES_BYTES

    dtype = {"int8": "int8", "float8": "float8_e4m3fn"}.get(weights, "uint8")
    # The planner counts those two scales in the model's dtype.
    return Format(dtype, size, lambda weight: weight.elements * bits / 8 + 2 * weight.element_bytes)


def _group(columns: int) -> int | None:
    """Return the columns that share a scale, `None` for whole rows (`optimum.quanto.QModuleMixin.__init__`)."""
    group = 128
    if columns <= group:
        return None
    while columns % group and group > 32:
        group -= 32
    return group if columns % group == 0 else None


def _copies(quantization: Quantization, itemsize: int) -> Copies:
    """Return the copies that quanto makes: `abs`, `div` and `round` while quantising; for products, an 8-bit weight
    times its scales (fp8 is first cast to their dtype), and a dense copy of a 4-bit or 2-bit weight without a kernel.

    The CPU has a kernel for int8 with activations in bfloat16, and first converts int8 if they are wider.
    """
    weights = quantization.arguments.get("weights", "int8")
    multiplying, for_each_token = itemsize, weights != "int4"
    if weights == "float8" or (quantization.is_on_cpu and itemsize > 2):
        multiplying = 2 * itemsize
    elif weights == "int8" and quantization.is_on_cpu:
        multiplying, for_each_token = 0, False
    quantising = 5 * itemsize + 1 if weights in ("int8", "float8") else 3 * itemsize + 2
    return Copies(multiplying=multiplying, for_each_token=for_each_token, quantising=quantising)


METHOD = Method(
    name="quanto",
    format=_format,
    details=lambda arguments: str(arguments.get("weights", "int8")),
    copies=_copies,
    source="optimum-quanto 0.2.7: `qbytes_mm`, and `QTensor`, which falls back to dense weights if no kernel fits",
    # transformers 5.24, `quantizers/quantizer_quanto.py`, `validate_environment`: `len(device_map) > 1`
    refusal=Refusal(devices=STORAGE_DEVICES, whole_is_fine=True),
    lowers_budgets=True,
)
