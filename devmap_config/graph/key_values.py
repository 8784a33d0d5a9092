"""Makes the caches of keys and values that `generate` makes before a prefill, with transformers' own classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devmap_config.graph.costs import OFFLOADED, PARTLY
from devmap_config.graph.failures import UnfitCacheError
from devmap_config.libraries.transformers import STATES, quantizing_layers, supports_caches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from devmap_config.graph.costs import WorkloadShape

GROUP_LENGTH = 64
"""The number of quantised elements that share a scale and a shift: transformers' default."""


def made_cache(
    model: PreTrainedModel,
    workload: WorkloadShape,
    length: int,
    *,
    offloading: bool,
    offloaded: tuple[str, ...] | None = None,
) -> Any:
    """Return the cache that a model is given with a prompt; `None` if it makes its own.

    Args:
        model: the model.
        workload: the workload, whose cache is made here unless it is dynamic; a model makes that by itself.
        length: the number of tokens that it must have room for at least.
        offloading: whether an offloaded cache is really offloaded; otherwise it stays on one device.
        offloaded: the modules whose part of the cache is offloaded; `None` if all are.

    Raises:
        UnfitCacheError: if transformers does not support that cache for this model.
    """
    from transformers import DynamicCache, QuantizedCache, StaticCache

    if workload.cache == "dynamic":
        return None
    config = model.config.get_text_config(decoder=True)
    is_offloaded = offloading and workload.cache in OFFLOADED
    if workload.cache == PARTLY and is_offloaded and offloaded is not None:
        return partly_offloaded_cache(model, offloaded)
    if workload.cache in ("offloaded", PARTLY):
        return DynamicCache(config=config, offloading=True) if is_offloaded else None
    if workload.cache == "quantized":
        _require_groups(config, workload)
        with quantizing_layers(quantized, dequantized):
            try:
                bits = {} if workload.cache_bits is None else {"nbits": workload.cache_bits}
                return QuantizedCache(backend=workload.cache_backend or "quanto", config=config, **bits)
            except ValueError as error:
                raise UnfitCacheError(_reason(error)) from error
    # Room for the context and one token, or for a longer prefill.
    room = max(workload.context_length, length) + 1
    return StaticCache(config=config, max_cache_len=room, offloading=is_offloaded)


def partly_offloaded_cache(model: PreTrainedModel, offloaded: tuple[str, ...]) -> Any:
    """Return a cache whose layers are offloaded if these modules fill them; `None` without modules.

    Raises:
        UnfitCacheError: if the layer that a module fills is unknown.
    """
    from devmap_config.graph.partly_offloaded import PartlyOffloadedCache

    if not offloaded:
        return None
    config = model.config.get_text_config(decoder=True)
    return PartlyOffloadedCache(config, [layer_filled(model, path) for path in offloaded])


def layer_filled(model: PreTrainedModel, path: str) -> int:
    """Return the layer of the cache that a module fills: the one that it names when it updates the cache.

    Raises:
        UnfitCacheError: if the layer is unknown.
    """
    layer = getattr(model.get_submodule(path), "layer_idx", None)
    if not isinstance(layer, int):
        raise UnfitCacheError(f"`{path}` does not say which layer of the cache it fills")
    return layer


def require_fit(model: PreTrainedModel, workload: WorkloadShape) -> None:
    """Check that `generate` supports the workload's cache for a model.

    Raises:
        UnfitCacheError: if it does not; `generate` would fail, or silently use another cache.
    """
    if workload.cache in ("dynamic", "static"):
        return
    if not model.can_generate():
        raise UnfitCacheError("it does not generate")
    if not supports_caches(model):
        raise UnfitCacheError("it keeps a cache of its own")
    if model.config.is_encoder_decoder:
        # The encoder's part of an offloaded cache is not copied back before it is read.
        raise UnfitCacheError("it has an encoder besides")
    cache = made_cache(model, workload, 1, offloading=False)
    del cache


def offloaded_tensors(cache: Any, workload: WorkloadShape) -> list[list[torch.Tensor]]:
    """Return the tensors of each layer of a cache that are on the CPU while the layer does not run.

    Args:
        cache: a filled cache, on any device.
        workload: the workload that filled it.

    Raises:
        UnfitCacheError: if a layer has other states as well, as nothing waits until these are copied back.
    """
    if workload.cache not in OFFLOADED or not hasattr(cache, "layers"):
        return []
    keeps_windows = workload.cache == "offloaded_static"
    layers = []
    none = [False] * len(cache.layers)  # transformers 5.14 has no dummy layers
    kinds = (cache.is_sliding, getattr(cache, "is_linear", none), getattr(cache, "is_dummy", none))
    for layer, is_sliding, is_linear, is_dummy in zip(cache.layers, *kinds, strict=True):
        if is_linear or is_dummy or (is_sliding and keeps_windows):
            continue
        if any(getattr(layer, name, None) for name in STATES):
            raise UnfitCacheError("its layers keep states besides keys and values")
        tensors = (getattr(layer, name, None) for name in ("keys", "values", "indexer_keys"))
        layers.append([tensor for tensor in tensors if tensor is not None and tensor.dim() > 1])
    return [tensors for tensors in layers if tensors]


def _require_groups(config: Any, workload: WorkloadShape) -> None:
    """Check that keys and values are whole groups for any number of tokens; otherwise quanto fails at some token."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or _divided(config)
    if workload.cache_backend != "fp8" and heads and width and heads * width % GROUP_LENGTH:
        raise UnfitCacheError(
            f"a token has {heads * width} numbers of keys in a layer, and quanto takes {GROUP_LENGTH} at a time"
        )


def _divided(config: Any) -> int | None:
    size, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return size // heads if size and heads else None


def _reason(error: ValueError) -> str:
    text = str(error).partition("\n")[0]
    if "full attention" in text:
        return "not all of its layers attend to the whole context, and transformers quantises the cache of no others"
    return text


def quantized(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise keys or values like quanto: return packed numbers, and the scale and the shift of each group.

    It replaces the package where only shapes and costs matter, with the same operations.
    """
    import torch

    grouped = tensor.reshape(-1, GROUP_LENGTH)
    least, most = torch.amin(grouped, dim=1, keepdim=True), torch.amax(grouped, dim=1, keepdim=True)
    scale, shift = (most - least) / (2**bits - 1), -least
    numbers = torch.clamp(torch.round((grouped + shift) / scale), min=0, max=2**bits - 1).to(torch.uint8)
    together = 8 // bits
    rows = -(-numbers.shape[0] // together)
    packed = torch.zeros((rows, GROUP_LENGTH), dtype=torch.uint8, device=tensor.device)
    for place in range(together):
        part = numbers[place * rows : (place + 1) * rows]
        packed[: part.shape[0]] |= part << bits * place
    return packed, scale, shift


def dequantized(
    packed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, bits: int, shape: torch.Size
) -> torch.Tensor:
    """Return the keys or values from which `quantized` made these tensors, in their shape."""
    import torch

    mask = 2**bits - 1
    unpacked = torch.cat([(packed & (mask << bits * place)) >> bits * place for place in range(8 // bits)])
    return (scale * unpacked[: scale.shape[0]] - shift).reshape(shape)
