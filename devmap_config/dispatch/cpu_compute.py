"""Runs modules on the CPU while the blocks around them run on an accelerator."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from devmap_config.libraries.transformers import (
    attention_of,
    chooses_experts_implementation,
    set_experts_implementation,
    skip_keys,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

TORCH_CPU = torch.device("cpu")
"""As a value of a device_map: modules under the string `"cpu"` are streamed, those under this stay and run there."""

CPU_EXPERTS = "eager"
"""The implementation of fused experts that reads no other weights than those of the experts that are chosen.

For one token on two cores: 6.2 ms, `grouped_mm` 7.6 ms, `batched_mm` 30 ms (one layer of Qwen3-30B-A3B in bfloat16).
"""


class UncallableUnitError(Exception):
    """Nothing of this unit can be sent to the CPU: its place in the model is not entered through a `forward`."""


class CpuComputeHook(AlignDevicesHook):  # type: ignore[misc]
    """Copies a module's inputs to the CPU and its output back to where the first of them came from.

    Fused experts below it are switched to the implementation for the CPU, until the hook is removed.
    """

    def __init__(self, skip_keys: str | list[str] | None, *, switches_experts: bool = True) -> None:
        super().__init__(execution_device=TORCH_CPU, io_same_device=True, skip_keys=skip_keys)
        self._switches_experts = switches_experts
        self._shared_configs: list[tuple[torch.nn.Module, Any]] = []

    def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by accelerate when the hook is added."""
        for part in module.modules():
            if self._switches_experts and chooses_experts_implementation(part):
                self._shared_configs.append((part, part.config))
                part.config = _with_cpu_experts(part.config)
        return super().init_hook(module)

    def detach_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by accelerate when the hook is removed."""
        for part, config in self._shared_configs:
            part.config = config
        self._shared_configs.clear()
        return super().detach_hook(module)


def compute_on_cpu(model: PreTrainedModel, units: Iterable[str], *, switches_experts: bool = True) -> None:
    """Make these modules, which were dispatched to `TORCH_CPU`, return what they compute to where they are called from.

    A cache is not copied: its layers are made where their first keys come from. Without data, experts are not to be
    switched: which of them are chosen is then not known.

    Raises:
        UncallableUnitError: where a unit cannot run there on its own.
    """
    skipped = skip_keys(model)  # as transformers passes it to accelerate
    for unit in units:
        module = model.get_submodule(unit)
        if type(module).forward is torch.nn.Module.forward:
            raise UncallableUnitError(f"`{unit}` is a {type(module).__name__}, which the model never calls")
        if attention := next(filter(None, map(_accelerators_attention, module.modules())), None):
            raise UncallableUnitError(f"`{unit}` attends with {attention}, which the CPU does not have")
        # It takes the place of accelerate's hook on this module; those below, which copy to the CPU, stay.
        add_hook_to_module(module, CpuComputeHook(skipped, switches_experts=switches_experts))


def _with_cpu_experts(config: Any) -> Any:
    """A copy of a config that the whole model shares, in which nothing but the experts' implementation differs."""
    own = copy.copy(config)
    set_experts_implementation(own, CPU_EXPERTS)  # sub-configs, which both have in common, keep theirs
    return own


def _accelerators_attention(module: torch.nn.Module) -> str | None:
    """The kernel of an attention module, if it is one that only accelerators have."""
    implementation = attention_of(getattr(module, "config", None))
    is_attention = hasattr(module, "is_causal")
    return implementation if is_attention and implementation is not None and "flash" in implementation else None
