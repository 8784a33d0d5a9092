"""The workload that a model is measured under, from the workload of a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.tiles import UnknownTilesError, is_cut, tiles_of_image

if TYPE_CHECKING:
    from devmap_config.graph.source import ModelSource
    from devmap_config.profile.loading import LoadedProfile

VLLM_BATCHED_TOKENS = 2048
"""The tokens of prompts that vLLM computes at once by default: its `max_num_batched_tokens`."""

PROPOSED_TOKENS = 20
"""The most tokens that a draft model proposes at once, which is transformers' default (`num_assistant_tokens`)."""


def workload_of(loaded: LoadedProfile, source: ModelSource, before: WorkloadShape | None) -> WorkloadShape | None:
    """Return the workload to measure, or `None` if the profile names no context.

    Raises:
        UnknownTilesError: if images are cut into tiles, and their number follows neither from the processor's files nor
            from the workload of a measurement `before`.
    """
    workload = loaded.profile.workload
    if (context_length := workload.context_length.value) is None:
        return None
    inputs, size = workload.inputs, workload.inputs.image_size
    proposed = 0 if loaded.profile.model.assistant is None else PROPOSED_TOKENS  # the first forward takes these, too
    prompt_length = workload.prompt_length or context_length
    if loaded.profile.is_for_vllm and workload.prompt_length is None:
        prompt_length = max(min(prompt_length, VLLM_BATCHED_TOKENS // workload.batch_size), 1)
    return WorkloadShape(
        batch_size=workload.batch_size,
        context_length=context_length,
        prompt_length=min(prompt_length + proposed, context_length),
        all_logits=workload.logits == "all",
        cache=workload.cache.implementation,
        cache_backend=workload.cache.backend,
        cache_bits=workload.cache.bits,
        images=inputs.images or 0,
        image_height=size[0] if size else None,
        image_width=size[-1] if size else None,
        audio_seconds=inputs.audio_seconds or 0,
        proposed_tokens=proposed,
        tiles=_tiles(loaded, source, before),
    )


def _tiles(loaded: LoadedProfile, source: ModelSource, before: WorkloadShape | None) -> int:
    """Return the number of tiles of each image: one without a size, and 0 for a model whose processor cuts none."""
    inputs = loaded.profile.workload.inputs
    if not inputs.images or not is_cut(source):
        return 0
    if (size := inputs.image_size) is None:
        return 1
    try:
        return tiles_of_image(source, size[0], size[-1], loaded.boundary)
    except UnknownTilesError:
        if before is None or (before.image_height, before.image_width) != (size[0], size[-1]):
            raise
        return before.tiles
