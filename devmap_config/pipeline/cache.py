"""vLLM's cache in blocks: what one takes on a stage, and how many a request takes. As vLLM 0.32 counts.

Names of files are of `vllm/v1/core/kv_cache_utils.py` and `vllm/v1/kv_cache_interface.py` there. A block holds so many
tokens of one layer of each member of a group; layers of one kind are one group, of several kinds groups of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_TOKENS = 16
CPU_BLOCK_TOKENS = 128
"""vLLM's defaults (`platforms/cpu.py`); the plan states one, which is handed on."""

NULL_BLOCKS = 1
"""Blocks that vLLM keeps empty: a request has to fit into the others."""

FEW_MORE = (3, 2)
"""Where the commoner kind has at most half as many layers more than the rarer one, groups have the size of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """The bytes that a layer keeps of a token on one rank, and its attention window; `None` without a limit."""

    token_bytes: int
    window: int | None = None


def groups_of(layers: Sequence[LayerCache]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the layers by group (`_get_kv_cache_groups_uniform_page_size`).

    Example:
        >>> window, full = LayerCache(token_bytes=512, window=128), LayerCache(token_bytes=512)
        >>> groups_of([window, window, full])
        ((0,), (1,), (2,))
        >>> groups_of([full, full, full])
        ((0, 1, 2),)
    """
    kinds: dict[LayerCache, list[int]] = {}
    for number, layer in enumerate(layers):
        kinds.setdefault(layer, []).append(number)
    counts = [len(numbers) for numbers in kinds.values()]
    size, most = min(counts), max(counts)
    if most * FEW_MORE[1] < size * FEW_MORE[0]:
        size = most
    groups: list[tuple[int, ...]] = []
    for numbers in kinds.values():
        count = -(-len(numbers) // size)
        groups += (tuple(numbers[start::count]) for start in range(count))
    return tuple(groups)


def blocks_per_request(
    layers: Sequence[LayerCache], *, context_length: int, block_size: int, tokens_in_flight: int
) -> int:
    """Return how many blocks a request of full length takes, over all groups (`max_memory_usage_bytes`).

    Args:
        layers: those of the whole model.
        context_length: tokens of the request.
        block_size: tokens of a block.
        tokens_in_flight: how many tokens may be computed whose batch is not done: of each stage's batch.

    Example:
        >>> window, full = LayerCache(token_bytes=512, window=512), LayerCache(token_bytes=512)
        >>> blocks_per_request([window] * 5 + [full], context_length=8192, block_size=128, tokens_in_flight=512)
        109
    """
    total = 0
    for group in groups_of(layers):
        window = layers[group[0]].window
        if window is None:
            total += -(-context_length // block_size)
        else:
            kept = min(window - 1 + tokens_in_flight, context_length)
            total += -(-kept // block_size) + 1
    return total


def page_bytes(layers: Sequence[LayerCache], first: int, last: int, block_size: int) -> int:
    """Return what a block takes on a stage with these layers: as much as its widest group (`bytes_per_block`).

    Example:
        >>> page_bytes([LayerCache(token_bytes=512)] * 6, 0, 3, 128)
        262144
    """
    widest = 0
    for group in groups_of(layers):
        here = [number for number in group if first <= number <= last]
        widest = max(widest, sum(layers[number].token_bytes for number in here))
    return widest * block_size
