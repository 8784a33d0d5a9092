"""Runs transformers' own loader on tensors without data, made from a checkpoint's headers, to compare names."""

from __future__ import annotations

import re
from contextlib import contextmanager
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from devmap_config.graph.checkpoint_match import CheckpointMatch, TensorMismatch
from devmap_config.graph.introspection import config_and_class
from devmap_config.graph.model import ancestors
from devmap_config.libraries.remote_code import code_of_models
from devmap_config.libraries.transformers import merged_names, noting_what_is_lacking, taking_loading_reports

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from devmap_config.graph.checkpoint import Checkpoint, StoredTensor

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""torch's names for the dtypes of a header."""


def load_over_meta(
    config_path: Path,
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    class_name: str,
    dtype: str,
    trust_remote_code: bool = False,
    repository: tuple[str, str] | None = None,
) -> CheckpointMatch:
    """Load a model from a checkpoint's headers with transformers' own loader, and return how the names match.

    Tensors are renamed, fused, split and tied as in real loading. Only the config is read.

    Args:
        config_path: the model's folder, or its `config.json`.
        checkpoint: the headers of the checkpoint.
        shapes: the shapes of the model's tensors, before any quantization.
        class_name: the class to load.
        dtype: torch's name of the dtype to load it in.
        trust_remote_code: whether code that comes with the model may run.
        repository: the hub id and commit of the config, from which its code is fetched.

    Raises:
        UntrustedCodeError: if its class is defined only by code that comes with the model, and that code may not run.
        Exception: whatever transformers raises if it does not get as far as comparing names, e.g. without a quantizer's
            package.
    """
    config, model_class = config_and_class(
        config_path, class_name, trust_remote_code=trust_remote_code, repository=repository
    )
    return match_names(
        model_class, config, checkpoint, getattr(torch, dtype), shapes, trust_remote_code=trust_remote_code
    )


def match_names(
    model_class: Any,
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    trust_remote_code: bool = False,
) -> CheckpointMatch:
    """Return how the names in a checkpoint match a class and a config, by transformers' loader.

    `shapes` holds the shapes of the model's tensors, before any quantization.
    """
    stored = {name: _empty(tensor) for name, tensor in checkpoint.tensors.items()}
    with (
        _without_progress_bars(),
        taking_loading_reports(passes_on=False) as reports,
        code_of_models(allowed=trust_remote_code),
        noting_what_is_lacking(model_class) as lacking,
    ):
        model = model_class.from_pretrained(
            None, config=config, state_dict=stored, device_map={"": "meta"}, dtype=dtype, ignore_mismatched_sizes=True
        )
    info = reports[0]
    expected_tensors = model.state_dict()
    reshaped = [
        TensorMismatch(name, _shape_in_words(stored_shape), _shape_in_words(expected))
        for name, stored_shape, expected in info.mismatched_keys
    ]
    unconverted = [TensorMismatch(name, "", "", _last_line(reason)) for name, reason in info.conversion_errors.items()]
    is_quantized = getattr(config, "quantization_config", None) is not None
    other_kinds = _of_quantized(checkpoint, shapes) if is_quantized else _of_other_kinds(checkpoint, expected_tensors)
    mismatches = [*_gaps(checkpoint, model), *other_kinds, *unconverted, *reshaped]
    mismatched = {mismatch.name: mismatch for mismatch in mismatches}
    missing = tuple(sorted(set(info.missing_keys) - mismatched.keys()))
    return CheckpointMatch(
        class_name=type(model).__name__,
        tensor_count=len(expected_tensors),
        absent=_absent_modules(expected_tensors, missing),
        missing=missing,
        computed=tuple(sorted(lacking & expected_tensors.keys() - set(info.missing_keys) - mismatched.keys())),
        unexpected=tuple(sorted(info.unexpected_keys)),
        mismatched=tuple(sorted(mismatched.values())),
    )


def _absent_modules(names: Iterable[str], missing: tuple[str, ...]) -> tuple[str, ...]:
    """Return the largest modules all of whose tensors are missing; a tensor of the root module counts by itself."""
    present = {module for name in set(names) - set(missing) for module in (name, *ancestors(name))}
    absent = {
        next(path for path in (*reversed([*ancestors(name)]), name) if path not in present)
        for name in missing
        if "" in present
    }
    return tuple(sorted(absent))


def _empty(tensor: StoredTensor) -> torch.Tensor:
    dtype = getattr(torch, TORCH_DTYPES.get(tensor.dtype, ""), None)
    if dtype is None:  # elements of less than a byte: transformers sees the packed bytes
        return torch.empty(tensor.end - tensor.start, dtype=torch.uint8, device="meta")
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def _of_other_kinds(checkpoint: Checkpoint, wanted: Mapping[str, torch.Tensor]) -> Iterator[TensorMismatch]:
    """Yield tensors whose stored kind of number cannot be cast to the model's.

    Integers or 8-bit floats in place of weights come from a quantised model, whose scales are stored separately.
    """
    for name, tensor in checkpoint.tensors.items():
        held = wanted.get(name)
        dtype = getattr(torch, TORCH_DTYPES.get(tensor.dtype, ""), None)
        if held is None or dtype is None or tuple(held.shape) != tensor.shape or dtype == held.dtype:
            continue
        if held.is_floating_point() and (not dtype.is_floating_point or dtype.itemsize == 1):
            shape, name_of_dtype = _shape_in_words(tensor.shape), str(held.dtype).removeprefix("torch.")
            yield TensorMismatch(name, f"{shape} of {TORCH_DTYPES[tensor.dtype]}", f"{shape} of {name_of_dtype}")


def _of_quantized(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[TensorMismatch]:
    """Yield 8-bit floats that transformers would load unchecked: without a scale or, in older versions, in any
    shape.
    """
    for name, tensor in checkpoint.tensors.items():
        stem = name.removesuffix("weight")
        scales = (f"{name}_scale_inv", f"{name}_scale", f"{stem}scale", f"{stem}weight_scale")
        if tensor.dtype.startswith("F8_E4") and not any(scale in checkpoint.tensors for scale in scales):
            yield TensorMismatch(name, "", "", f"is of {tensor.dtype}, and its scale is missing")
        if tensor.dtype.startswith("F8_E4") and shapes.get(name, tensor.shape) != tensor.shape:
            yield TensorMismatch(name, _shape_in_words(tensor.shape), _shape_in_words(shapes[name]))


def _gaps(checkpoint: Checkpoint, model: PreTrainedModel) -> Iterator[TensorMismatch]:
    """Yield lists that are merged into one tensor, and whose numbers in the checkpoint have gaps.

    transformers merges them in order, so that every item after a gap would move up by one.
    """
    if all(name in checkpoint.tensors for name, _ in model.named_parameters()):
        return  # nothing is merged, as a merged tensor is not in the checkpoint under its own name
    patterns = [re.compile(re.escape(name).replace(r"\*", r"([0-9]{1,9})(?![0-9])")) for name in merged_names(model)]
    numbers: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        for match in filter(None, (pattern.search(name) for pattern in patterns)):
            start, end = match.span(1)
            numbers.setdefault(f"{name[:start]}*{name[end:]}", set()).add(int(match[1]))
    for name, indices in numbers.items():
        absent = next(number for number in count() if number not in indices)
        if absent < max(indices):
            yield TensorMismatch(
                name.replace("*", str(absent)), "", "", f"is missing between others, up to {max(indices)}"
            )


def _shape_in_words(shape: Any) -> str:
    return " × ".join(map(str, shape)) if prod(shape) != 1 or len(shape) > 0 else "a number"


def _last_line(text: str) -> str:
    """Return the line of a traceback with torch's or transformers' own message."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith(("Traceback", "File", "^", "Error:"))]
    return f"cannot be put together: {messages[-1] if messages else 'its conversion fails'}".rstrip(".")
