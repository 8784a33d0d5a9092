"""Adds an adapter's tensors to a model without data, so that they are counted, measured and dry-run with it.

A module keeps its name, its class's name and its parameters. LoRA's tensors become non-persistent buffers, which
accelerate leaves on the device that the module runs on. The forward computes what PEFT's does, kernel by kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.adapter import AdapterError, changes_of, saved_modules
from devmap_config.graph.model import SAVED
from devmap_config.libraries.torch import own_parameters
from devmap_config.libraries.transformers import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.graph.adapter import AdapterConfig, LowRankUpdate


def adapt(model: PreTrainedModel, config: AdapterConfig) -> None:
    """Add an adapter's tensors and computation to a model on the meta device.

    Raises:
        AdapterError: if it adapts nothing of this model, or a kind of module that is not supported.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    for path, change in changes_of(config, modules, all_linear(model, config)).items():
        _add_lora(modules[path], path, change, config)
    leaves = [leaf for path in saved_modules(config, modules) for leaf in modules[path].modules()]
    for leaf in dict.fromkeys(leaves):
        _bring_whole(leaf)


def all_linear(model: PreTrainedModel, config: AdapterConfig) -> frozenset[str]:
    """Return the modules that `all-linear` means: all linear ones except the head."""
    head = model.get_output_embeddings()
    if head is None and config.task == "SEQ_CLS":
        head = next(
            (tower for name in ("score", "classifier") if (tower := getattr(model, name, None)) is not None), None
        )
    return frozenset(path for path, module in model.named_modules() if _is_linear(module) and module is not head)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or is_conv1d(module)


def _add_lora(module: torch.nn.Module, path: str, change: LowRankUpdate, config: AdapterConfig) -> None:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Embedding):
        if config.uses_dora or config.has_lora_bias:
            what = "use_dora" if config.uses_dora else "lora_bias"
            raise AdapterError(f"`{path}` is an embedding, for which `{what}` is not known here", "leave it out")
        shapes: dict[str, tuple[int, ...]] = {
            "lora_embedding_A": (change.rank, weight.shape[0]),
            "lora_embedding_B": (weight.shape[1], change.rank),
        }
        kind: type = _LoraEmbedding
    elif _is_linear(module):
        outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else reversed(weight.shape)
        shapes = {"lora_A": (change.rank, inputs), "lora_B": (outputs, change.rank)}
        shapes |= {"lora_B_bias": (outputs,)} if config.has_lora_bias else {}
        shapes |= {"lora_magnitude_vector": (outputs,)} if config.uses_dora else {}
        kind = _Dora if config.uses_dora else _Lora
    else:
        message = (
            f"`{path}`, which the adapter adapts, is a {type(module).__name__}: linear modules and embeddings are known"
        )
        raise AdapterError(message, "merge it into the checkpoint by `merge_and_unload()` of peft")
    for name, shape in shapes.items():
        module.register_buffer(name, weight.new_empty(tuple(shape)), persistent=False)
    module.lora_scaling = change.scaling
    module.__class__ = _mixed(kind, type(module))


def _bring_whole(module: torch.nn.Module) -> None:
    """Have a module compute with the adapter's copies of its parameters; its own parameters stay beside them."""
    own = {name: tensor for name, tensor in own_parameters(module).items() if tensor is not None}
    for name, tensor in own.items():
        module.register_buffer(f"{SAVED}{name}", torch.empty_like(tensor).detach(), persistent=False)
    if own:
        module.__class__ = _mixed(_Whole, type(module))


MIXED: dict[tuple[type, type], type] = {}


def _mixed(kind: type, own: type) -> type:
    """Return the adapted class of a module's class, under the same name; always the same one, so that alike blocks are
    recognised.
    """
    return MIXED.setdefault((kind, own), type(own.__name__, (kind, own), {}))


class _Lora(torch.nn.Module):  # type: ignore[misc]
    """A linear module with LoRA, computed like `peft.tuners.lora.layer.Linear`."""

    lora_A: torch.Tensor  # noqa: N815  as PEFT calls it
    lora_B: torch.Tensor  # noqa: N815
    lora_scaling: float

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Add the product of the two matrices to the output of the module."""
        result: torch.Tensor = super().forward(x, *arguments, **options)
        added = self.added(x.to(self.lora_A.dtype), result)
        return (result + added).to(result.dtype)

    def added(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return what is added to a result."""
        del result
        return self.product(x) * self.lora_scaling

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of an input with the two matrices."""
        linear = torch.nn.functional.linear
        return linear(linear(x, self.lora_A), self.lora_B, getattr(self, "lora_B_bias", None))


class _Dora(_Lora):
    """A linear module with DoRA, computed like `peft.tuners.lora.dora.DoraLinearLayer`, which reads the module's own
    weight.
    """

    lora_magnitude_vector: torch.Tensor

    def added(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Return what is added to a result."""
        identity = torch.eye(self.lora_A.shape[1], device=self.lora_A.device, dtype=self.lora_A.dtype)
        own: Any = self
        weight = own.weight.T if is_conv1d(self) else own.weight
        product = self.product(identity).T.to(x.dtype)
        norm = torch.linalg.norm(weight.to(x.dtype) + self.lora_scaling * product.detach(), dim=1).to(x.dtype)
        scale = (self.lora_magnitude_vector / norm.detach()).view(1, -1)
        product = self.product(x)
        if own.bias is not None:
            result = result - own.bias
        return (scale - 1) * result + scale * product * self.lora_scaling


class _LoraEmbedding(torch.nn.Module):  # type: ignore[misc]
    """An embedding with LoRA, computed like `peft.tuners.lora.layer.Embedding`."""

    lora_embedding_A: torch.Tensor  # noqa: N815
    lora_embedding_B: torch.Tensor  # noqa: N815
    lora_scaling: float

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Add the product of the two matrices for the input tokens to the output of the embedding."""
        result: torch.Tensor = super().forward(x, *arguments, **options)
        rows = torch.nn.functional.embedding(x, self.lora_embedding_A.T)
        return (result + (rows @ self.lora_embedding_B.T) * self.lora_scaling).to(result.dtype)


class _Whole(torch.nn.Module):  # type: ignore[misc]
    """Computes with parameters that an adapter brings."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the module with the adapter's parameters in place of its own."""
        own = own_parameters(self)
        before = dict(own)
        brought = {name: getattr(self, f"{SAVED}{name}", None) for name in before}
        try:
            own.update(brought)
            return super().forward(*arguments, **options)
        finally:
            own.update(before)
