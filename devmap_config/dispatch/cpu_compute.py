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
"""As a value of a device_map: modules under the string `"cpu"` are streamed, those under this stay and run there."""

CPU_EXPERTS = "grouped_mm"
"""The product with experts that is fast on the CPU at any number of tokens (`benchmarks/experts.md`).

It is what plans are measured with, and it reads the weights of the chosen experts alone. `batched_mm` copies these
first, for each token again, which takes several times as long.
"""


class UncallableUnitError(Exception):
    """Nothing of this unit can be sent to the CPU: its place in the model is not entered through a `forward`."""


def compute_on_cpu(model: PreTrainedModel, units: Iterable[str]) -> None:
    """Make these modules, which were dispatched to `TORCH_CPU`, return what they compute to where they are called from.

    Their inputs are copied to the CPU, their output to where the first of these came from. A cache is not copied: its
    layers are made where their first keys come from.

    Raises:
        UncallableUnitError: if a unit cannot run there on its own.
    """
    skipped = skip_keys(model)  # as transformers passes it to accelerate
    for unit in units:
        module = model.get_submodule(unit)
        if type(module).forward is torch.nn.Module.forward:
            raise UncallableUnitError(f"`{unit}` is a {type(module).__name__}, which the model never calls")
        if attention := next(filter(None, map(_accelerators_attention, module.modules())), None):
            raise UncallableUnitError(f"`{unit}` attends with {attention}, which the CPU does not have")
        # It takes the place of accelerate's hook on this module; those below, which copy to the CPU, stay.
        add_hook_to_module(module, AlignDevicesHook(TORCH_CPU, io_same_device=True, skip_keys=skipped))


def use_cpu_experts(model: PreTrainedModel, runs_on_cpu: Callable[[str], bool]) -> None:
    """Give experts that run on the CPU the product that is fast there, and have them keep it.

    While it decodes, `generate` changes the product of the whole model to `batched_mm` where its first parameter is not
    on the CPU: on an accelerator, or away on the disk. Other experts are left to that.

    Args:
        model: the loaded model.
        runs_on_cpu: tells of the name of a tensor whether it is computed with on the CPU.
    """
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(path, recurse=False)]
        if chooses_experts_implementation(module) and names and all(map(runs_on_cpu, names)):
            module.config = copy.copy(module.config)  # it is the whole model's
            set_experts_implementation(module.config, CPU_EXPERTS)


def _accelerators_attention(module: torch.nn.Module) -> str | None:
    """Return the kernel of an attention module, if it is one that only accelerators have."""
    implementation = attention_of(getattr(module, "config", None))
    is_attention = hasattr(module, "is_causal")
    return implementation if is_attention and implementation is not None and "flash" in implementation else None
