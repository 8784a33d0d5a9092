"""A cache with some layers on the CPU while they do not run; transformers' own caches offload all layers or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PretrainedConfig


class PartlyOffloadedCache(DynamicCache):  # type: ignore[misc]  # transformers' classes have no types
    """Offloads some layers as transformers offloads all: while one of them runs, the next of them is copied back."""

    def __init__(self, config: PretrainedConfig, offloaded: Iterable[int]) -> None:
        """Args: the model's config, and the numbers of the layers that are offloaded."""
        super().__init__(config=config, offloading=True)
        self.offloaded = tuple(sorted(offloaded))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to a layer, return all of them, and offload the layer again if it is to be."""
        if layer_idx not in self.offloaded:
            return self.layers[layer_idx].update(key_states, value_states, *args, **options)  # type: ignore[no-any-return]
        return super().update(key_states, value_states, layer_idx, *args, **options)  # type: ignore[no-any-return]

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Copy back the next offloaded layer from this number on; after the last one, the first."""
        following = next((number for number in self.offloaded if number >= layer_idx), self.offloaded[0])
        layer = self.layers[following]
        if len(self.offloaded) == 1:  # it is about to run, so a copy on another stream is of no use
            layer.prefetch()
            return
        if layer.is_initialized:  # with few layers, its copy to the CPU may still be running
            self.prefetch_stream.wait_stream(torch.cuda.default_stream(layer.device))
        super().prefetch(following, only_non_sliding)
