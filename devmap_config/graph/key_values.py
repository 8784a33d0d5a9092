"""The caches of keys and values that `generate` makes before a prefill, by transformers' own classes."""

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
"""The quantised numbers that share a scale and a shift: transformers' default."""


def made_cache(
    model: PreTrainedModel,
    workload: WorkloadShape,
    length: int,
    *,
    offloading: bool,
    offloaded: tuple[str, ...] | None = None,
) -> Any:
    """Return the cache that a model is given which is about to take a prompt of so many tokens; `None` for none.

    Args:
        model: the model.
        workload: what is run; its cache is made here unless it is dynamic, which a model makes by itself.
        length: how many tokens it must have room for at least.
        offloading: whether a cache that is offloaded is to do so. Without, it is as it is on one device.
        offloaded: the modules whose part of it is offloaded; `None` if all of them are.

    Raises:
        UnfitCacheError: if transformers does not give such a model that cache.
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
    # Room for the context and a token, and for more where more is prefilled.
    room = max(workload.context_length, length) + 1
    return StaticCache(config=config, max_cache_len=room, offloading=is_offloaded)


def partly_offloaded_cache(model: PreTrainedModel, offloaded: tuple[str, ...]) -> Any:
    """Return a cache of which the layers are offloaded that these modules fill; `None` if there are none.

    Raises:
        UnfitCacheError: if one of them does not tell which layer it fills.
    """
    from devmap_config.graph.partly_offloaded import PartlyOffloadedCache

    if not offloaded:
        return None
    config = model.config.get_text_config(decoder=True)
    return PartlyOffloadedCache(config, [layer_filled(model, path) for path in offloaded])


def layer_filled(model: PreTrainedModel, path: str) -> int:
    """Return the layer of the cache that a module fills, as it tells the cache itself.

    Raises:
        UnfitCacheError: if it does not tell.
    """
    layer = getattr(model.get_submodule(path), "layer_idx", None)
    if not isinstance(layer, int):
        raise UnfitCacheError(f"`{path}` does not tell which layer of it it fills")
    return layer


def require_fit(model: PreTrainedModel, workload: WorkloadShape) -> None:
    """Check that `generate` gives a model the cache that its workload names.

    Raises:
        UnfitCacheError: if it does not; `generate` would say so, or take another in silence.
    """
    if workload.cache in ("dynamic", "static"):
        return
    if not model.can_generate():
        raise UnfitCacheError("it does not generate")
    if not supports_caches(model):
        raise UnfitCacheError("it keeps a cache of its own")
    if model.config.is_encoder_decoder:
        # An offloaded one is not brought back for what reads the encoder's part of it.
        raise UnfitCacheError("it has an encoder besides")
    cache = made_cache(model, workload, 1, offloading=False)
    del cache


def offloaded_tensors(cache: Any, workload: WorkloadShape) -> list[list[torch.Tensor]]:
    """Return the tensors of each layer of a cache that are on the CPU while the layer does not run.

    Args:
        cache: one that was filled, wherever it is.
        workload: what it was filled under.

    Raises:
        UnfitCacheError: if a layer keeps states besides, for which nothing waits until they are brought back.
    """
    if workload.cache not in OFFLOADED or not hasattr(cache, "layers"):
        return []
    keeps_windows = workload.cache == "offloaded_static"
    found = []
    none = [False] * len(cache.layers)  # transformers 5.14 knows no dummies
    kinds = (cache.is_sliding, getattr(cache, "is_linear", none), getattr(cache, "is_dummy", none))
    for layer, is_sliding, is_linear, is_dummy in zip(cache.layers, *kinds, strict=True):
        if is_linear or is_dummy or (is_sliding and keeps_windows):
            continue
        if any(getattr(layer, name, None) for name in STATES):
            raise UnfitCacheError("its layers keep states besides keys and values")
        tensors = (getattr(layer, name, None) for name in ("keys", "values", "indexer_keys"))
        found.append([tensor for tensor in tensors if tensor is not None and tensor.dim() > 1])
    return [tensors for tensors in found if tensors]


def _require_groups(config: Any, workload: WorkloadShape) -> None:
    """Check that keys and values of any number of tokens are whole groups: else quanto fails, at some token."""
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
    """Return what quanto makes of keys or values: packed numbers, and the scale and the shift of each group.

    It stands in for the package where nothing but shapes are wanted, and does what that does.
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
    """Return the keys or values of which `quantized` made this, in their shape."""
    import torch

    mask = 2**bits - 1
    unpacked = torch.cat([(packed & (mask << bits * place)) >> bits * place for place in range(8 // bits)])
    return (scale * unpacked[: scale.shape[0]] - shift).reshape(shape)
