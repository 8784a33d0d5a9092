"""torchao: int8, fp8 or int4, by its configs."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from devmap_config.devices import DISK
from devmap_config.quantization.arguments import QuantizationError, check_names, flag, positive
from devmap_config.quantization.method import FLOAT32_BYTES, Copies, Format, Method, Refusal
from devmap_config.quantization.weights import linear_weights

if TYPE_CHECKING:
    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weight


TILE_ROWS, TILE_COLUMNS = 8, 1024
"""The sizes that tinygemm's tiles are padded to (`Int4TilePackedTo4dTensor.from_hp`)."""


def _format(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    kind = _config(arguments.get("quant_type"))
    check_names(arguments, "modules_to_not_convert")
    if flag(arguments, "include_input_output_embeddings") or flag(arguments, "untie_embedding_weights"):
        return None
    if kind.get("_version", 2) != 2:
        return None
    name, data = kind["_type"], kind.get("_data") or {}
    if name == "Int4WeightOnlyConfig":
        return _int4(data)
    block = _block(data.get("granularity"))
    if block is None:
        return None
    if name == "Int8WeightOnlyConfig" and data.get("group_size") is None:
        # A scale in float32 and a zero point in int8, even though quantization is symmetric.
        return Format(
            "int8", lambda weight: weight.elements + 5 * weight.blocks(*block), lambda weight: weight.elements
        )
    dtype = data.get("weight_dtype") or "float8_e4m3fn"
    if isinstance(dtype, dict):
        dtype = dtype.get("_data")
    if name == "Float8WeightOnlyConfig" and dtype in ("float8_e4m3fn", "float8_e5m2"):
        return Format(dtype, lambda weight: weight.elements + 4 * weight.blocks(*block), lambda weight: weight.elements)
    return None


def _config(value: Any) -> dict[str, Any]:
    """Return a torchao config in torchao's form, from that form, in which `_data` and `_version` may be left out, or
    from only the name of its class.
    """
    if isinstance(value, dict):
        value = value.get("default", value)
    if isinstance(value, str):
        value = {"_type": value}
    if isinstance(value, dict) and isinstance(name := value.get("_type"), str):
        if name.endswith("Config"):
            return {"_version": 2, "_data": {}, **value}
        class_name = "".join(word[:1].upper() + word[1:] for word in name.split("_")) + "Config"
        raise QuantizationError(f"`{name}` is not the name of a class of torchao", f"write `quant_type: {class_name}`")
    raise QuantizationError("torchao takes `quant_type`", "such as `quant_type: Int8WeightOnlyConfig`")


def _int4(data: Arguments) -> Format | None:
    group = positive(data, "group_size", 128)
    packing = data.get("int4_packing_format") or "plain"
    packing = str(packing.get("_data") if isinstance(packing, dict) else packing).lower()

    def plain(weight: Weight) -> int:
        return weight.elements // 2 + 2 * weight.element_bytes * weight.blocks(1, group)

    def tiled(weight: Weight) -> int:
        columns = ceil(weight.columns / TILE_COLUMNS) * TILE_COLUMNS
        rows = ceil(weight.rows / TILE_ROWS) * TILE_ROWS
        return rows * columns // 2 + 4 * rows * ceil(columns / group)

    if packing not in ("plain", "tile_packed_to_4d"):
        return None
    dtype, size = ("uint8", plain) if packing == "plain" else ("int32", tiled)
    # torchao does not convert matrices that groups do not divide.
    return Format(
        dtype, lambda weight: None if weight.columns % group else size(weight), lambda weight: weight.elements * 0.5
    )


def _block(granularity: Any) -> tuple[int | None, int | None] | None:
    """Return the rows and columns that share a scale."""
    if granularity is None:
        return (1, None)
    data = granularity.get("_data") or {}
    match granularity.get("_type"), data.get("dim", -1), data.get("axis"):
        case "PerGroup", _, _:
            return (1, positive(data, "group_size", 0))
        case ("PerRow", -1, None) | ("PerAxis", -1, 0):
            return (1, None)
        case "PerTensor", -1, None:
            return (None, None)
    return None


def _copies(quantization: Quantization, itemsize: int) -> Copies:
    """Return the copies that torchao makes, some of them in float32: `to`, `mul` and `clamp` each make one.

    int8 converts the weight before a product, even for one token. fp8 multiplies it by its scales in float32, and
    converts the result unless it computes in float32. For int4, the copies are unknown.
    """
    kind = _config(quantization.arguments.get("quant_type"))["_type"]
    converted = itemsize if itemsize < FLOAT32_BYTES else 0
    if kind == "Int8WeightOnlyConfig":
        return Copies(multiplying=itemsize, for_each_token=True, quantising=itemsize + 2 * FLOAT32_BYTES)
    if kind == "Float8WeightOnlyConfig":
        return Copies(
            multiplying=2 * FLOAT32_BYTES + converted, for_each_token=True, quantising=converted + 3 * FLOAT32_BYTES + 1
        )
    return Copies(multiplying=itemsize)


METHOD = Method(
    name="torchao",
    format=_format,
    converts=partial(linear_weights, suffix=".weight"),  # patterns are matched with the parameter here, not the module,
    details=lambda arguments: str(_config(arguments.get("quant_type"))["_type"]),
    copies=_copies,
    source="torchao 0.18: `linear` of `Int8Tensor` and `Float8Tensor`, and their `from_hp`; `Int4Tensor` has a kernel",
    # transformers 5.24, `quantizers/quantizer_torchao.py`, `validate_environment`
    refusal=Refusal(devices=(DISK,), quantizing_is_fine=True),
    lowers_budgets=True,
    completed=lambda arguments: {**arguments, "quant_type": {"default": _config(arguments.get("quant_type"))}},
)
