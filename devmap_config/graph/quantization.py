"""What transformers holds of a weight that it quantises: bytes with scales and zero points, without the quantizer.

`METHODS` says for each method how a weight of `rows` × `columns` is stored and which weights are converted at all, as
transformers 5.24's `quantizers/quantizer_*.py` and `integrations/*.py` have it. A method or an argument that is not
known here gives `None`, and the caller counts the weights as they are before quantization: an upper bound.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.graph.model import TensorName, ancestors
from devmap_config.libraries.transformers import is_conv1d, modules_not_converted, should_convert_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from devmap_config.graph.costs import Measurement, ModuleCost
    from devmap_config.graph.model import ModelGraph


class QuantizationError(Exception):
    """The arguments of a quantization cannot be meant; the text says which, `help` what to write."""

    def __init__(self, message: str, help: str) -> None:
        self.help = help
        super().__init__(message)


@dataclass(frozen=True)
class Quantization:
    """A quantization as transformers applies it.

    `arguments` are those of transformers' config of that method, without the method. `is_prequantized`: the checkpoint
    holds quantised weights, so that nothing is quantised while loading. `model_type` is the model's.
    """

    method: str
    arguments: Mapping[str, Any]
    is_prequantized: bool = False
    model_type: str = ""

    def to_json(self) -> dict[str, Any]:
        """All that a graph depends on, as plain data."""
        form = format_of(self)
        in_buffers = {"in_buffers": True} if form is not None and form.in_buffers else {}  # older graphs do not say so
        return {
            "method": self.method,
            "arguments": dict(self.arguments),
            "prequantized": self.is_prequantized,
            **in_buffers,
        }


class Weight(NamedTuple):
    """A matrix, or several of one shape in one tensor, whose elements take `element_bytes` before quantization."""

    rows: int
    columns: int
    element_bytes: int
    matrices: int = 1

    @property
    def elements(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns

    def blocks(self, rows: int | None = 1, columns: int | None = None) -> int:
        """Blocks of this many rows and columns in one matrix, begun ones included; `None` for all of them."""
        return ceil(self.rows / (rows or self.rows)) * ceil(self.columns / (columns or self.columns))


@dataclass(frozen=True, slots=True)
class Storage:
    """A tensor as it is held: its torch dtype, its bytes with companions, and what transformers' planner counts.

    `in_buffer` and `is_dense_where_offloaded` are as in `Format`.
    """

    dtype: str
    size_bytes: int
    planner_bytes: int
    in_buffer: bool = False
    is_dense_where_offloaded: bool = False


class Format(NamedTuple):
    """How converted weights are stored.

    `size` gives the bytes of one matrix with all companions, or `None` for a shape that the quantizer leaves as it is;
    `planner` what transformers' planner counts for it (`param_element_size`). `dtype` is torch's name of what is
    packed, `None` where that is the model's own. `bias_dtype` is what the quantizer's modules hold biases in, where
    that is not the model's dtype. `in_buffers`: these modules hold all in buffers, which accelerate treats in another
    way than parameters. `is_dense_where_offloaded`: what a map has on `cpu` or `disk` is left as it is.
    """

    dtype: str | None
    size: Callable[[Weight], int | None]
    planner: Callable[[Weight], float]
    bias_dtype: str | None = None
    in_buffers: bool = False
    is_dense_where_offloaded: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is known of one method of quantization.

    Attributes:
        format: from the arguments to how weights are stored; `None` where they are not known, or leave it to chance.
        converts: the names of the modules or tensors that are converted, of a model on the meta device.
        dequantizes: whether a full copy of a weight, in the dtype of the activations, may live while its module runs.
        source: where `dequantizes` is from.
        lowers_budgets: whether the quantizer's `adjust_max_memory` takes a tenth off every budget of the planner.
        needs_accelerator: whether transformers dequantises the checkpoint while loading where there is none.
    """

    format: Callable[[Quantization], Format | None]
    converts: Callable[[PreTrainedModel, Quantization], Iterator[tuple[str, Weight]]]
    dequantizes: bool
    source: str
    lowers_budgets: bool = False
    needs_accelerator: bool = False


LOADING_ARGUMENTS = {
    "awq": ("backend",),
    "compressed-tensors": ("dequantize", "use_optimized_inference"),
    "fp8": ("dequantize", "modules_to_not_convert"),
    "gptq": ("backend",),
    "mxfp4": ("dequantize",),
}
"""What a profile may change of a checkpoint's own quantization (`get_loading_attributes`); the rest is ignored."""


def effective_quantization(
    own: Mapping[str, Any] | None, config: Mapping[str, Any], *, has_accelerator: bool = True
) -> Quantization | None:
    """The quantization that transformers applies: the checkpoint's, which wins, else the profile's.

    Args:
        own: `model.quantization` of the profile.
        config: the model's config.
        has_accelerator: whether there is any; without one, some methods are dequantised while loading.
    """
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    of_checkpoint = config.get("quantization_config") or nested
    asked = {name: value for name, value in (own or {}).items() if name != "method"}
    if isinstance(of_checkpoint, dict) and isinstance(of_checkpoint.get("quant_method"), str):
        method = of_checkpoint["quant_method"]
        kept = {name: value for name, value in of_checkpoint.items() if name != "quant_method"}
        if own and own["method"] == method:
            kept |= {name: asked[name] for name in LOADING_ARGUMENTS.get(method, ()) if name in asked}
        arguments, is_prequantized = kept, True
    elif own:
        method, arguments, is_prequantized = str(own["method"]), asked, False
    else:
        return None
    known = METHODS.get(method)
    if known is not None and known.needs_accelerator and not has_accelerator:
        arguments = {**arguments, "dequantize": True}
    return Quantization(method, arguments, is_prequantized, str(config.get("model_type", "")))


def format_of(quantization: Quantization) -> Format | None:
    """How its weights are stored, or `None` where that is not known.

    Raises:
        QuantizationError: where its arguments cannot be meant.
    """
    method = METHODS.get(quantization.method)
    if method is None:
        return None
    with _reported(quantization):
        return method.format(quantization)


def described(quantization: Quantization) -> str:
    """A quantization in a few words, as in the heading of a plan: `gptq 4 bit`, `bitsandbytes nf4 4 bit`."""
    arguments = quantization.arguments
    if format_of(quantization) is UNCHANGED:
        return f"{quantization.method} dequantised"
    if quantization.method == "bitsandbytes":
        details = f"{arguments.get('bnb_4bit_quant_type', 'fp4')} 4 bit" if arguments.get("load_in_4bit") else "8 bit"
    elif quantization.method in ("awq", "gptq"):
        details = f"{arguments.get('bits', 4)} bit"
    elif quantization.method == "quanto":
        details = str(arguments.get("weights", "int8"))
    elif quantization.method == "torchao":
        details = str(torchao_type(arguments.get("quant_type"))["_type"])
    elif quantization.method == "compressed-tensors":
        details = "dense from the first forward on"
    else:
        details = ""
    return " ".join(filter(None, (quantization.method, details)))


def stored_tensors(model: PreTrainedModel, quantization: Quantization) -> dict[str, Storage]:
    """How the tensors are held that the quantizer converts, of a model on the meta device; none where it is not known.

    Raises:
        QuantizationError: where its arguments cannot be meant.
    """
    form = format_of(quantization)
    if form is None or form is UNCHANGED:
        return {}
    tensors = dict(model.named_parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    stored: dict[str, Storage] = {}
    with _reported(quantization):
        converted = METHODS[quantization.method].converts(model, quantization)
        sized = [(name, weight, form.size(weight)) for name, weight in converted]
    for name, weight, size in sized:
        if size is None:
            continue
        planner = ceil(form.planner(weight) * weight.matrices)
        stored[name] = Storage(
            form.dtype or dtype,
            size * weight.matrices,
            planner,
            in_buffer=form.in_buffers,
            is_dense_where_offloaded=form.is_dense_where_offloaded,
        )
        for bias in (name.removesuffix("weight") + "bias", f"{name}_bias"):
            if form.bias_dtype is not None and name in tensors and bias in tensors:
                size_bytes = tensors[bias].numel() * ITEM_BYTES[form.bias_dtype]
                stored[bias] = Storage(form.bias_dtype, size_bytes, size_bytes, in_buffer=form.in_buffers)
    return stored


def quantized(
    measurement: Measurement, graph: ModelGraph, dense_bytes: Mapping[str, int], *, dequantizes: bool
) -> Measurement:
    """What was measured with dense weights, as it is with those that the graph holds.

    Args:
        measurement: of the model before quantization.
        graph: with sizes after it.
        dense_bytes: what each converted tensor takes in the dtype of the activations.
        dequantizes: whether that much lives besides while its module runs.
    """
    dense: dict[str, int] = {}
    held: dict[str, int] = {}
    copied: dict[str, int] = {}
    for name, size_bytes in dense_bytes.items():
        module = name.rpartition(".")[0]
        dense[module] = dense.get(module, 0) + size_bytes
        held[module] = held.get(module, 0) + graph.tensors[TensorName(name)].size_bytes
        for path in (module, *ancestors(module)) if dequantizes else ():
            copied[path] = max(copied.get(path, 0), size_bytes)

    def stored(cost: ModuleCost) -> ModuleCost:
        copy_bytes = copied.get(cost.path, 0)
        peaks = {
            figure: getattr(cost, figure) + copy_bytes
            for figure in ("prefill_peak_bytes", "decode_peak_bytes", "doubled_peak_bytes")
        }
        if cost.path not in dense:
            return replace(cost, **peaks)
        before, after = dense[cost.path], held[cost.path]
        written_bytes = 2 * before if dequantizes else 0  # and read again
        return replace(
            cost,
            **peaks,
            own_peak_bytes=cost.own_peak_bytes + copy_bytes,
            doubled_own_peak_bytes=cost.doubled_own_peak_bytes + copy_bytes,
            prefill_touched_bytes=max(cost.prefill_touched_bytes - before, 0) + after + written_bytes,
            # One token reads little but weights, of experts only the active ones.
            decode_touched_bytes=cost.decode_touched_bytes * after // before,
        )

    return replace(measurement, modules=tuple(map(stored, measurement.modules)))


@contextmanager
def _reported(quantization: Quantization) -> Iterator[None]:
    """Turn what comes of arguments of another shape than transformers writes into an error that says so."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        raise QuantizationError(
            f"the arguments of {quantization.method} cannot be read: {error}",
            "write them as transformers does into a checkpoint's `config.json`",
        ) from error


ITEM_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}

UNCHANGED = Format(None, lambda _: None, lambda weight: weight.elements * weight.element_bytes)
"""Of what is dequantised while loading: dense, as the model is without quantization."""


# -- bitsandbytes ------------------------------------------------------------------------------------------------------

BNB_BLOCK = 64
"""Elements that share one absolute maximum (`bitsandbytes.functional.quantize_4bit`, on CUDA and CPU)."""

BNB_CODE_BYTES = 16 * 4
"""The 16 values of nf4 or fp4 in float32, which every weight holds."""

BNB_NESTED_BLOCK = 256
BNB_NESTED_CODE_BYTES = 256 * 4 + 4
"""The 256 values of the quantised maxima in float32, and their offset."""


def _bitsandbytes(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    in_4bit, in_8bit = _flag(arguments, "load_in_4bit"), _flag(arguments, "load_in_8bit")
    if in_4bit == in_8bit:
        wanted = "one of `load_in_4bit: true` and `load_in_8bit: true`"
        raise QuantizationError(f"bitsandbytes takes {wanted}", f"say {wanted}")
    _names(arguments, "llm_int8_skip_modules")
    # What a map has on the CPU is then not converted (`_process_model_before_weight_loading`), and not in fp32 either.
    offloads = _flag(arguments, "llm_int8_enable_fp32_cpu_offload") and not quantization.is_prequantized
    if _flag(arguments, "llm_int8_has_fp16_weight") or _is_patched(quantization):
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
        raise QuantizationError(f"`{kind}` is no type of bitsandbytes", "say `bnb_4bit_quant_type: nf4`, or `fp4`")
    dtype = str(arguments.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    item_bytes = ITEM_BYTES.get(dtype)
    if item_bytes is None:
        return None
    is_nested = _flag(arguments, "bnb_4bit_use_double_quant")

    def size(weight: Weight) -> int:
        packed = (weight.elements + 1) // (2 * item_bytes) * item_bytes
        maxima = ceil(weight.elements / BNB_BLOCK)
        nested = maxima + 4 * ceil(maxima / BNB_NESTED_BLOCK) + BNB_NESTED_CODE_BYTES
        return packed + BNB_CODE_BYTES + (nested if is_nested else 4 * maxima)

    return Format(dtype, size, lambda weight: weight.elements * 0.5, is_dense_where_offloaded=offloads)


def _bitsandbytes_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    kept = _kept(model, quantization.arguments.get("llm_int8_skip_modules"))
    yield from _matrices(
        model, lambda module: type(module) is torch.nn.Linear or is_conv1d(module), kept, lambda name: name
    )


# -- torchao -----------------------------------------------------------------------------------------------------------

TORCHAO_ROUNDING = {"in": 1024, "out": 8}
"""What tinygemm's tiles are padded to (`Int4TilePackedTo4dTensor.from_hp`)."""


def _torchao(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    kind = torchao_type(arguments.get("quant_type"))
    _names(arguments, "modules_to_not_convert")
    if _flag(arguments, "include_input_output_embeddings") or _flag(arguments, "untie_embedding_weights"):
        return None
    if kind.get("_version", 2) != 2:
        return None
    name, data = kind["_type"], kind.get("_data") or {}
    if name == "Int4WeightOnlyConfig":
        return _torchao_int4(data)
    block = _torchao_block(data.get("granularity"))
    if block is None:
        return None
    if name == "Int8WeightOnlyConfig" and data.get("group_size") is None:
        # A scale in float32 and a zero point in int8, though quantization is symmetric.
        return Format("int8", lambda weight: weight.elements + 5 * weight.blocks(*block), lambda each: each.elements)
    dtype = data.get("weight_dtype") or "float8_e4m3fn"
    if isinstance(dtype, dict):
        dtype = dtype.get("_data")
    if name == "Float8WeightOnlyConfig" and dtype in ("float8_e4m3fn", "float8_e5m2"):
        return Format(dtype, lambda weight: weight.elements + 4 * weight.blocks(*block), lambda each: each.elements)
    return None


def torchao_type(value: Any) -> dict[str, Any]:
    """A torchao config as torchao writes it: from that, or from the name of its class alone."""
    if isinstance(value, str):
        return {"_type": value, "_version": 2, "_data": {}}
    if isinstance(value, dict):
        value = value.get("default", value)
        if isinstance(value, dict) and isinstance(value.get("_type"), str):
            return value
    raise QuantizationError("torchao takes `quant_type`", "such as `quant_type: Int8WeightOnlyConfig`")


def _torchao_int4(data: Mapping[str, Any]) -> Format | None:
    group = _positive(data, "group_size", 128)
    packing = data.get("int4_packing_format") or "plain"
    packing = str(packing.get("_data") if isinstance(packing, dict) else packing).lower()

    def plain(weight: Weight) -> int | None:
        if weight.columns % group:
            return None  # torchao leaves it as it is
        return weight.elements // 2 + 2 * weight.element_bytes * weight.blocks(1, group)

    def tiled(weight: Weight) -> int | None:
        if weight.columns % group:
            return None
        columns = ceil(weight.columns / TORCHAO_ROUNDING["in"]) * TORCHAO_ROUNDING["in"]
        rows = ceil(weight.rows / TORCHAO_ROUNDING["out"]) * TORCHAO_ROUNDING["out"]
        return rows * columns // 2 + 4 * rows * ceil(columns / group)

    size = {"plain": plain, "tile_packed_to_4d": tiled}.get(packing)
    dtype = "uint8" if packing == "plain" else "int32"
    return None if size is None else Format(dtype, size, lambda weight: weight.elements * 0.5)


def _torchao_block(granularity: Any) -> tuple[int | None, int | None] | None:
    """Rows and columns that share a scale."""
    if granularity is None:
        return (1, None)
    data = granularity.get("_data") or {}
    kind = (granularity.get("_type"), data.get("dim", -1), data.get("axis"))
    if kind[0] == "PerGroup":
        return (1, _positive(data, "group_size", 0))
    known: dict[Any, tuple[int | None, int | None]] = {
        ("PerRow", -1, None): (1, None),
        ("PerAxis", -1, 0): (1, None),
        ("PerTensor", -1, None): (None, None),
    }
    return known.get(kind)


def _torchao_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    kept = _kept(model, quantization.arguments.get("modules_to_not_convert"))
    # The patterns are held against the parameter's name here, not the module's.
    yield from _matrices(model, lambda module: isinstance(module, torch.nn.Linear), kept, lambda name: f"{name}.weight")


# -- quanto ------------------------------------------------------------------------------------------------------------

QUANTO_BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}
QUANTO_SCALES_BYTES = 8
"""`input_scale` and `output_scale` of a module in float32, which are held though activations are not quantised."""


def _quanto(quantization: Quantization) -> Format | None:
    weights = quantization.arguments.get("weights", "int8")
    _names(quantization.arguments, "modules_to_not_convert")
    if not isinstance(weights, str) or weights not in QUANTO_BITS:
        allowed = ", ".join(QUANTO_BITS)
        raise QuantizationError(f"`{weights}` is no type of quanto's weights", f"say `weights:` with one of {allowed}")
    if quantization.is_prequantized or quantization.arguments.get("activations") is not None:
        return None
    bits = QUANTO_BITS[weights]

    def size(weight: Weight) -> int:
        if bits == 8:
            return weight.elements + weight.element_bytes * weight.rows + QUANTO_SCALES_BYTES
        group = _quanto_group(weight.columns)
        grouped_rows = weight.rows if group is None else weight.elements // group
        packed = ceil(grouped_rows * bits / 8) * (group or weight.columns)
        return packed + 2 * weight.element_bytes * grouped_rows + QUANTO_SCALES_BYTES

    dtype = {"int8": "int8", "float8": "float8_e4m3fn"}.get(weights, "uint8")
    # The planner sees those two scales in the model's dtype.
    return Format(dtype, size, lambda weight: weight.elements * bits / 8 + 2 * weight.element_bytes)


def _quanto_group(columns: int) -> int | None:
    """Columns that share a scale, `None` for whole rows (`optimum.quanto.QModuleMixin.__init__`)."""
    group = 128
    if columns <= group:
        return None
    while columns % group and group > 32:
        group -= 32
    return group if columns % group == 0 else None


def _linear_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    kept = _kept(model, quantization.arguments.get("modules_to_not_convert"))
    yield from _matrices(model, lambda module: isinstance(module, torch.nn.Linear), kept, lambda name: name)


# -- GPTQ and AWQ ------------------------------------------------------------------------------------------------------


def _gptq(quantization: Quantization) -> Format | None:
    """`qweight` and `qzeros` in int32, `scales` in float16, and `g_idx` in int32 (gptqmodel's `GPTQQuantLinear`).

    Beside them stand the shifts that unpack a word, as gptqmodel's torch kernels hold them; other kernels repack, and
    hold a workspace of some hundred bytes. These hold all of it in buffers; Marlin, which holds parameters, repacks
    them once they are loaded, which it cannot where they are streamed.
    """
    bits, group = _bits_and_group(quantization, (2, 3, 4, 8))
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


GPTQ_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
)
"""Where the blocks are that are quantised, the first that a model has (`optimum.gptq.constants.BLOCK_PATTERNS`)."""


def _gptq_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    names = [name for name, _ in model.named_modules()]
    blocks = quantization.arguments.get("block_name_to_quantize") or next(
        (prefix for prefix in GPTQ_BLOCKS if any(name.startswith(prefix) for name in names)), None
    )
    inside = quantization.arguments.get("modules_in_block_to_quantize")
    endings = None if inside is None else tuple(ending for group in inside for ending in group)
    if blocks is None:
        return
    for name, weight in _matrices(
        model, lambda module: type(module) is torch.nn.Linear or is_conv1d(module), [], lambda name: name
    ):
        module = name.removesuffix(".weight")
        if module.startswith(blocks) and (endings is None or module.endswith(endings)):
            yield name, weight


def _awq(quantization: Quantization) -> Format | None:
    """`qweight` and `qzeros` in int32, `scales` in float16 (gptqmodel's `AWQuantLinear`)."""
    bits, group = _bits_and_group(quantization, (4,))
    _names(quantization.arguments, "modules_to_not_convert")
    form = quantization.arguments.get("format") or quantization.arguments.get("version") or "gemm"
    if not quantization.is_prequantized or str(form).lower() != "gemm":
        return None

    def size(weight: Weight) -> int:
        groups = weight.columns // (group or weight.columns)
        packed_row = 4 * ceil(weight.rows * bits / 32)
        return weight.columns * packed_row + groups * packed_row + 2 * groups * weight.rows

    return Format("int32", size, size, bias_dtype="float16", in_buffers=True)


def _awq_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    kept = _kept(model, quantization.arguments.get("modules_to_not_convert"), add_default_skips=True)
    yield from _matrices(model, lambda module: isinstance(module, torch.nn.Linear), kept, lambda name: name)


def _bits_and_group(quantization: Quantization, known: Sequence[int]) -> tuple[int, int | None]:
    """Bits, and columns that share a scale: `None` for all of a row, which is written as -1."""
    arguments = quantization.arguments
    bits = _positive(arguments, "bits", 4)
    if bits not in known:
        allowed = ", ".join(map(str, known))
        raise QuantizationError(f"{quantization.method} has no weights of {bits} bits", f"say `bits:` with {allowed}")
    group = arguments.get("group_size", 128)
    return bits, None if group == -1 else _positive(arguments, "group_size", 128)


# -- fp8 ---------------------------------------------------------------------------------------------------------------


def _fp8(quantization: Quantization) -> Format | None:
    arguments = quantization.arguments
    if _flag(arguments, "dequantize"):
        return UNCHANGED
    block = arguments.get("weight_block_size", (128, 128))
    _names(arguments, "modules_to_not_convert")
    if block is not None and not _is_block(block):
        raise QuantizationError("`weight_block_size` is not two sizes", "say `weight_block_size: [128, 128]`")
    if arguments.get("modules_to_convert") or arguments.get("expert_dtype", "fp8") != "fp8":
        return None
    scale_bytes = {"float": 4, "ue8m0": 1}.get(arguments.get("scale_fmt", "float"))
    is_static = str(arguments.get("activation_scheme", "dynamic")).lower() == "static"
    if scale_bytes is None or (block is None and not quantization.is_prequantized):
        return None

    def scales(weight: Weight) -> int:
        """Scales of the blocks; of gate and up projections in one tensor, each has its own."""
        return 1 if block is None else weight.blocks(*block)

    def size(weight: Weight) -> int | None:
        if not quantization.is_prequantized and block and (weight.rows % block[0] or weight.columns % block[1]):
            # `Fp8Quantize` passes such a weight on, beside a scale that nothing sets.
            return weight.elements * weight.element_bytes + scale_bytes * scales(weight)
        return weight.elements + scale_bytes * scales(weight) + (4 if is_static else 0)

    def planner(weight: Weight) -> int:
        # A checkpoint's scales are counted as they are, those that are made while loading as if quantised themselves.
        per_scale = scale_bytes if quantization.is_prequantized else 1
        return weight.elements + per_scale * scales(weight) + (4 if is_static else 0)

    return Format("float8_e4m3fn", size, planner)


def _is_block(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


FP8_EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj")


def _fp8_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    kept = _kept(model, quantization.arguments.get("modules_to_not_convert"))

    def is_converted(module: torch.nn.Module) -> bool:
        is_grouped = isinstance(module, torch.nn.Linear) and "GroupedLinear" in type(module).__name__
        return type(module) is torch.nn.Linear or is_grouped

    yield from _matrices(model, is_converted, kept, lambda name: name)
    yield from _experts(model, kept, lambda name, _: name.endswith(".experts"))


# -- mxfp4 -------------------------------------------------------------------------------------------------------------


def _mxfp4(quantization: Quantization) -> Format | None:
    """Two values a byte, and an exponent of a byte for each 32; biases in float32 (`Mxfp4GptOssExperts`)."""
    _names(quantization.arguments, "modules_to_not_convert")
    if _flag(quantization.arguments, "dequantize"):
        return UNCHANGED
    return Format(
        "uint8",
        lambda weight: weight.elements // 2 + ceil(weight.elements / 32),
        lambda weight: weight.elements // 2,
        bias_dtype="float32",
    )


def _mxfp4_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    kept = _kept(model, quantization.arguments.get("modules_to_not_convert"))
    yield from _experts(model, kept, lambda _, module: type(module).__name__ == "GptOssExperts")


# -- compressed-tensors ------------------------------------------------------------------------------------------------

COMPRESSED_FORMATS = {"pack-quantized": 16, "int-quantized": 0, "float-quantized": 0}
"""The formats that are known, and the bytes of `weight_shape` (two in int64), which stays beside a weight."""


def _compressed(quantization: Quantization) -> Format | None:
    """Dense weights, and beside them the scales of the checkpoint.

    transformers loads the compressed tensors, and the first forward decompresses all of them for good
    (`ModelCompressor.add_decompress_hook`): what has to fit is what is held from then on.
    """
    arguments = quantization.arguments
    if _flag(arguments, "dequantize") or arguments.get("run_compressed") is False:
        return UNCHANGED
    groups = arguments.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or _flag(arguments, "use_optimized_inference"):
        return None
    if arguments.get("quantization_status") != "compressed" or arguments.get("kv_cache_scheme"):
        return None
    if not quantization.is_prequantized or _is_patched(quantization):
        return None
    group = next(iter(groups.values()))
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    form = group.get("format") or arguments.get("format")
    is_plain = weights.get("symmetric", True) and not weights.get("actorder") and not group.get("output_activations")
    block = {
        "tensor": (None, None),
        "channel": (1, None),
        "group": (1, weights.get("group_size")),
        "block": tuple(weights.get("block_structure") or ()),
    }.get(str(weights.get("strategy")))
    if form not in COMPRESSED_FORMATS or not is_plain or not block or (inputs and inputs.get("dynamic") is not True):
        return None
    bits = _positive(weights, "num_bits", 8)

    def beside(weight: Weight) -> int:
        return weight.element_bytes * weight.blocks(*block) + COMPRESSED_FORMATS[form]

    def planner(weight: Weight) -> int:
        packed = 4 * weight.rows * ceil(weight.columns * bits / 32) if COMPRESSED_FORMATS[form] else weight.elements
        return packed + beside(weight)

    return Format(None, lambda weight: weight.elements * weight.element_bytes + beside(weight), planner)


def _compressed_modules(model: PreTrainedModel, quantization: Quantization) -> Iterator[tuple[str, Weight]]:
    import torch

    group = next(iter(quantization.arguments["config_groups"].values()))
    ignored = quantization.arguments.get("ignore") or ()

    def matches(name: str, module: torch.nn.Module, targets: Sequence[str]) -> bool:
        classes = {each.__name__ for each in type(module).__mro__}
        return any(
            re.match(target[3:], name) if target.startswith("re:") else target == name or target in classes
            for target in targets
        )

    for name, weight in _matrices(model, lambda module: isinstance(module, torch.nn.Linear), [], lambda name: name):
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if matches(path, module, group.get("targets") or ()) and not matches(path, module, ignored):
            yield name, weight


# -- what the methods share --------------------------------------------------------------------------------------------

PATCHED_MODEL_TYPES = ("llama4", "llama4_text")
"""Whose experts become other modules in a quantised checkpoint (`MODULES_TO_PATCH_FOR_QUANTIZATION`)."""


def _is_patched(quantization: Quantization) -> bool:
    return quantization.is_prequantized and quantization.model_type in PATCHED_MODEL_TYPES


def _kept(model: PreTrainedModel, skipped: list[str] | None, *, add_default_skips: bool = False) -> list[str]:
    """The patterns of modules that stay as they are, by transformers' own rule."""
    return modules_not_converted(model, skipped, add_default_skips=add_default_skips)


def _matrices(
    model: PreTrainedModel,
    is_converted: Callable[[Any], bool],
    kept: Sequence[str],
    matched_name: Callable[[str], str],
) -> Iterator[tuple[str, Weight]]:
    """The weights of linear modules: `(out, in)`, or the other way round in a `Conv1D`."""
    for name, module in model.named_modules():
        if is_converted(module) and should_convert_module(matched_name(name), list(kept)):
            rows, columns = reversed(module.weight.shape) if is_conv1d(module) else module.weight.shape
            yield f"{name}.weight", Weight(rows, columns, module.weight.element_size())


def _experts(
    model: PreTrainedModel, kept: Sequence[str], is_converted: Callable[[str, Any], bool]
) -> Iterator[tuple[str, Weight]]:
    """The tensors of experts that are kept as one: `(expert, out, in)`, or the last two the other way round."""
    for path, module in model.named_modules():
        if not is_converted(path, module) or not should_convert_module(path, list(kept)):
            continue
        for name, value in module.named_parameters(recurse=False):
            if name in FP8_EXPERT_TENSORS and value.ndim == 3:
                count, rows, columns = value.shape
                yield f"{path}.{name}", Weight(rows, columns, value.element_size(), count)


def _flag(arguments: Mapping[str, Any], name: str) -> bool:
    value = arguments.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise QuantizationError(f"`{name}` is neither true nor false", f"say `{name}: true`, or leave it out")


def _positive(arguments: Mapping[str, Any], name: str, default: int) -> int:
    value = arguments.get(name, default)
    if type(value) is not int or value <= 0:
        raise QuantizationError(f"`{name}` is no positive whole number", f"such as `{name}: {default}`")
    return value


def _names(arguments: Mapping[str, Any], name: str) -> None:
    value = arguments.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise QuantizationError(f"`{name}` is no list of names", f"such as `{name}: [lm_head]`")


METHODS = {
    "awq": Method(
        format=_awq,
        converts=_awq_modules,
        dequantizes=True,
        source="gptqmodel's torch kernel and its GEMM kernel in prefill; Marlin and ExLlama do not",
    ),
    "bitsandbytes": Method(
        format=_bitsandbytes,
        converts=_bitsandbytes_modules,
        dequantizes=True,
        source="4 bit: bitsandbytes' `gemm_4bit` beyond a few tokens; 8 bit multiplies in int8 and does not",
        lowers_budgets=True,
    ),
    "compressed-tensors": Method(
        format=_compressed,
        converts=_compressed_modules,
        dequantizes=False,
        source="weights are dense from the first forward on, and counted so",
    ),
    "fp8": Method(
        format=_fp8,
        converts=_fp8_modules,
        dequantizes=False,
        source="`integrations/finegrained_fp8.py`: Triton and DeepGEMM multiply in fp8",
        needs_accelerator=True,
    ),
    "gptq": Method(
        format=_gptq,
        converts=_gptq_modules,
        dequantizes=True,
        source="gptqmodel's `TorchLinear.forward`; Marlin and ExLlama do not",
    ),
    "mxfp4": Method(
        format=_mxfp4,
        converts=_mxfp4_modules,
        dequantizes=False,
        source="`integrations/mxfp4.py`: `matmul_ogs` multiplies packed weights",
        needs_accelerator=True,
    ),
    "quanto": Method(
        format=_quanto,
        converts=_linear_modules,
        dequantizes=True,
        source="optimum-quanto's `qbytes_mm` and `QTensor` fall back to dense weights where no kernel fits",
        lowers_budgets=True,
    ),
    "torchao": Method(
        format=_torchao,
        converts=_torchao_modules,
        dequantizes=True,
        source="`Int8Tensor` and `Float8Tensor` convert a weight in `linear`; `Int4Tensor` has a kernel and does not",
        lowers_budgets=True,
    ),
}
"""By method. HQQ is left out: transformers 5.24 loads no such model (`HqqHfQuantizer` has no `get_quantize_ops`)."""
