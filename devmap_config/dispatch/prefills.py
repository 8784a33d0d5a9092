"""Runs long prompts on an accelerator, and everything else on the CPU, which stores the weights.

For one token, computing on the CPU is faster than copying the weights. A long prompt has enough work to make the copy
worthwhile, and its weights are then copied like those that are always streamed (`dispatch/streamed_weights.py`).
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from devmap_config.dispatch.cpu_compute import TORCH_CPU
from devmap_config.libraries.accelerate import found_device, sent
from devmap_config.libraries.torch import own_parameters
from devmap_config.libraries.transformers import skip_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedModel


class Weights(Protocol):
    """Provides the weights of a module on an accelerator while it runs there; `lock` is held meanwhile."""

    lock: Any

    def begin(self, module: torch.nn.Module) -> dict[str, torch.Tensor] | None:
        """Return the weights by their names; `None` if the module's weights have been replaced."""

    def end(self, module: torch.nn.Module) -> None:
        """End the module after it has run or failed."""


class PrefillHook(AlignDevicesHook):  # type: ignore[misc]
    """Copies a module's inputs to the CPU or, for many tokens, to the accelerator, and its output back."""

    def __init__(self, device: torch.device, tokens: int, weights: Weights, skip_keys: str | list[str] | None) -> None:
        super().__init__(TORCH_CPU, io_same_device=True, skip_keys=skip_keys)
        self._device = device
        self._tokens = tokens
        self._weights = weights
        self._own: dict[str, torch.nn.Parameter | None] = {}

    def around(self, module: torch.nn.Module) -> Callable[..., Any]:
        """Return a forward during which other threads wait, and after which the module has its own weights again,
        even on errors.
        """
        forward = module.forward

        @wraps(forward)
        def run(*arguments: Any, **options: Any) -> Any:
            with self._weights.lock:
                try:
                    return forward(*arguments, **options)
                finally:
                    self._weights.end(module)
                    own_parameters(module).update(self._own)
                    self._own = {}

        return run

    def pre_forward(self, module: torch.nn.Module, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Move the inputs; accelerate calls this before the module runs."""
        is_long = _number_of_tokens((*arguments, *options.values())) >= self._tokens
        brought = self._weights.begin(module) if is_long else None
        if brought is None:
            given: tuple[Any, Any] = super().pre_forward(module, *arguments, **options)
            return given
        self.input_device = found_device([arguments, options])
        own = own_parameters(module)
        self._own = dict(own)
        own.update({name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in brought.items()})
        return sent(arguments, self._device), sent(options, self._device, self.skip_keys)


def _number_of_tokens(given: Iterable[Any]) -> int:
    states = next((value for value in given if isinstance(value, torch.Tensor)), None)
    return 0 if states is None else states.shape[:-1].numel()


def prefill_on(model: PreTrainedModel, units: Mapping[str, int], device: torch.device, weights: Weights) -> None:
    """Have modules that were dispatched to `TORCH_CPU` run on an accelerator when they get at least this many
    tokens.
    """
    skipped = skip_keys(model)
    for unit, tokens in units.items():
        module = model.get_submodule(unit)
        hook = PrefillHook(device, tokens, weights, skipped)
        add_hook_to_module(module, hook)
        module.forward = hook.around(module)
