"""Runs modules on the CPU while the blocks around them run on an accelerator."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from devmap_config.libraries.transformers import (
    attention_of,
    chooses_experts_implementation,
    set_experts_implementation,
    skip_keys,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedModel

TORCH_CPU = torch.device("cpu")
"""A value for a device_map: modules with the string `"cpu"` are streamed; those with this value stay and run there."""

CPU_EXPERTS = "grouped_mm"
"""The product with experts that is fast on the CPU at any number of tokens (`benchmarks/experts.md`).

Plans are measured with it, and it reads only the weights of the chosen experts. `batched_mm` copies them first, for
each token again, which takes several times as long.
"""


class UncallableUnitError(Exception):
    """A unit cannot compute on the CPU, because it is not called through a `forward`."""


def compute_on_cpu(model: PreTrainedModel, units: Iterable[str]) -> None:
    """Make these modules, which were dispatched to `TORCH_CPU`, copy their outputs back to the device of their caller.

    Their inputs are copied to the CPU, and their output to the device of the first input. A cache is not copied: its
    layers are created on the device of their first keys.

    Raises:
        UncallableUnitError: if a unit cannot run there on its own.
    """
    skipped = skip_keys(model)  # in the form that transformers passes to accelerate
    for unit in units:
        module = model.get_submodule(unit)
        if type(module).forward is torch.nn.Module.forward:
            raise UncallableUnitError(f"`{unit}` is a {type(module).__name__}, which the model never calls")
        if attention := next(filter(None, map(_accelerators_attention, module.modules())), None):
            raise UncallableUnitError(f"`{unit}` attends with {attention}, which the CPU does not have")
        # It replaces accelerate's hook on this module; the hooks below, which copy to the CPU, stay.
        add_hook_to_module(module, AlignDevicesHook(TORCH_CPU, io_same_device=True, skip_keys=skipped))


def use_cpu_experts(model: PreTrainedModel, runs_on_cpu: Callable[[str], bool]) -> None:
    """Set the product that is fast on the CPU for experts that run there, and make them keep it.

    While it decodes, `generate` changes the product of the whole model to `batched_mm` if its first parameter is not on
    the CPU, but on an accelerator or the disk. Other experts are left to that.

    Args:
        model: the loaded model.
        runs_on_cpu: returns whether the tensor of a name is used on the CPU.
    """
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(path, recurse=False)]
        if chooses_experts_implementation(module) and names and all(map(runs_on_cpu, names)):
            module.config = copy.copy(module.config)  # the config is shared by the whole model
            set_experts_implementation(module.config, CPU_EXPERTS)


def _accelerators_attention(module: torch.nn.Module) -> str | None:
    """Return the kernel of an attention module, if only accelerators have it."""
    implementation = attention_of(getattr(module, "config", None))
    is_attention = hasattr(module, "is_causal")
    return implementation if is_attention and implementation is not None and "flash" in implementation else None
