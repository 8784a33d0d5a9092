"""compressed-tensors: dense from the first forward on, in addition to the scales of the checkpoint."""

from __future__ import annotations

import re
from math import ceil
from typing import TYPE_CHECKING

from devmap_config.quantization.arguments import flag, positive
from devmap_config.quantization.method import UNCHANGED, Format, Method
from devmap_config.quantization.weights import is_linear, matrices

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel

    from devmap_config.quantization.method import Arguments, Quantization
    from devmap_config.quantization.weights import Weight, Weights


FORMATS = {"pack-quantized": 16, "int-quantized": 0, "float-quantized": 0}
"""The supported formats, with the bytes of `weight_shape` (two in int64), which stays beside a weight."""


def _format(quantization: Quantization) -> Format | None:
    """Return the format: dense weights, and the scales of the checkpoint beside them.

    transformers loads the compressed tensors, and the first forward decompresses all of them permanently
    (`ModelCompressor.add_decompress_hook`). The memory from then on must fit.
    """
    arguments = quantization.arguments
    if flag(arguments, "dequantize") or arguments.get("run_compressed") is False:
        return UNCHANGED
    groups = arguments.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1 or flag(arguments, "use_optimized_inference"):
        return None
    if arguments.get("quantization_status") != "compressed" or arguments.get("kv_cache_scheme"):
        return None
    if not quantization.is_prequantized or quantization.is_patched:
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
    if form not in FORMATS or not is_plain or not block or (inputs and inputs.get("dynamic") is not True):
        return None
    bits = positive(weights, "num_bits", 8)

    def beside(weight: Weight) -> int:
        return weight.element_bytes * weight.blocks(*block) + FORMATS[form]

    def planner(weight: Weight) -> int:
        packed = 4 * weight.rows * ceil(weight.columns * bits / 32) if FORMATS[form] else weight.elements
        return packed + beside(weight)

    return Format(None, lambda weight: weight.elements * weight.element_bytes + beside(weight), planner)


def _converted(model: PreTrainedModel, arguments: Arguments) -> Weights:
    group = next(iter(arguments["config_groups"].values()))
    ignored = arguments.get("ignore") or ()
    for name, weight in matrices(model, is_linear):
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if _matches(path, module, group.get("targets") or ()) and not _matches(path, module, ignored):
            yield name, weight


def _matches(name: str, module: torch.nn.Module, targets: Sequence[str]) -> bool:
    """Return whether a module is among targets: names, classes or regular expressions."""
    classes = {class_.__name__ for class_ in type(module).__mro__}
    return any(
        re.match(target[3:], name) if target.startswith("re:") else target == name or target in classes
        for target in targets
    )


METHOD = Method(
    name="compressed-tensors",
    format=_format,
    converts=_converted,
    details=lambda _: "dense from the first forward on",
    source="weights are dense from the first forward on, and counted so",
    loading_arguments=("dequantize", "use_optimized_inference"),
    needs_quantized_checkpoint=True,
)
