"""The weights of a model on the meta device that a quantizer converts."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.libraries.transformers import is_conv1d, modules_not_converted, should_convert_module

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj")


class Weight(NamedTuple):
    """A matrix, or several of one shape in one tensor, with elements of `element_bytes` before quantization."""

    rows: int
    columns: int
    element_bytes: int
    matrices: int = 1

    @property
    def elements(self) -> int:
        """The number of elements of one matrix."""
        return self.rows * self.columns

    def blocks(self, rows: int | None = 1, columns: int | None = None) -> int:
        """Return the number of blocks of this many rows and columns in one matrix, counting partial ones; `None`
        means all.
        """
        return ceil(self.rows / (rows or self.rows)) * ceil(self.columns / (columns or self.columns))


Weights = Iterator[tuple[str, Weight]]
"""Pairs of a tensor's name and its weight."""


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is torch's linear module or of a subclass."""
    import torch

    return isinstance(module, torch.nn.Linear)


def is_plain_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is exactly torch's linear module or GPT-2's, and not of a subclass."""
    import torch

    return type(module) is torch.nn.Linear or is_conv1d(module)


def left_as_they_are(
    model: PreTrainedModel,
    arguments: Mapping[str, Any],
    name: str = "modules_to_not_convert",
    *,
    add_default_skips: bool = False,
) -> list[str]:
    """Return the patterns of modules that are not converted, by transformers' own rule.

    Args:
        model: on the meta device.
        arguments: of the quantization.
        name: the argument that lists modules not to convert.
        add_default_skips: whether modules that transformers selects itself are also left, in addition to the listed
            ones.
    """
    return modules_not_converted(model, arguments.get(name), add_default_skips=add_default_skips)


def matrices(
    model: PreTrainedModel, is_converted: Callable[[Any], bool], left: Sequence[str] = (), suffix: str = ""
) -> Weights:
    """Yield the weights of linear modules: `(out, in)`, or the other way round in a `Conv1D`.

    Args:
        model: on the meta device.
        is_converted: returns whether the quantizer replaces a module.
        left: the patterns of modules that are not converted.
        suffix: a text that is appended to a module's name before matching these patterns.
    """
    for name, module in model.named_modules():
        if is_converted(module) and should_convert_module(name + suffix, list(left)):
            rows, columns = reversed(module.weight.shape) if is_conv1d(module) else module.weight.shape
            yield f"{name}.weight", Weight(rows, columns, module.weight.element_size())


def linear_weights(
    model: PreTrainedModel,
    arguments: Mapping[str, Any],
    *,
    is_converted: Callable[[Any], bool] = is_linear,
    skips: str = "modules_to_not_convert",
    add_default_skips: bool = False,
    suffix: str = "",
) -> Weights:
    """Yield the weights of all linear modules except those that an argument lists, like most quantizers.

    The arguments are those of `left_as_they_are` and `matrices`; `skips` is the argument that lists modules.
    """
    left = left_as_they_are(model, arguments, skips, add_default_skips=add_default_skips)
    return matrices(model, is_converted, left, suffix)


def fused_experts(model: PreTrainedModel, left: Sequence[str], is_converted: Callable[[str, Any], bool]) -> Weights:
    """Yield the tensors of fused experts: `(expert, out, in)`, or with the last two swapped."""
    for path, module in model.named_modules():
        if not is_converted(path, module) or not should_convert_module(path, list(left)):
            continue
        for name, value in module.named_parameters(recurse=False):
            if name in EXPERT_TENSORS and value.ndim == 3:
                count, rows, columns = value.shape
                yield f"{path}.{name}", Weight(rows, columns, value.element_size(), count)
