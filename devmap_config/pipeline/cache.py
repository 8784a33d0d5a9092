"""vLLM's cache in blocks: the bytes of a block on a stage, and the blocks of a request, as vLLM 0.32 counts them.

Names in parentheses are from `vllm/v1/core/kv_cache_utils.py` and `vllm/v1/kv_cache_interface.py`. A block holds a
number of tokens for every layer of a group. Layers of one kind form one group; several kinds form groups of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_TOKENS = 16
CPU_BLOCK_TOKENS = 128
"""vLLM's defaults (`platforms/cpu.py`); the plan states one of them, which is passed on to vLLM."""

NULL_BLOCKS = 1
"""The blocks that vLLM keeps empty: requests must fit into the others."""

FEW_MORE = (3, 2)
"""If the more frequent kind has at most this many times the layers of the rarer one, groups have its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """The bytes that a layer caches for a token on one rank, and its attention window; `None` without a limit."""

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
    """Return the number of blocks of a request of full length, over all groups (`max_memory_usage_bytes`).

    Args:
        layers: the layers of the whole model.
        context_length: the tokens of the request.
        block_size: the tokens of a block.
        tokens_in_flight: the tokens of all unfinished batches, one for each stage.

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
            tokens = min(window - 1 + tokens_in_flight, context_length)
            total += -(-tokens // block_size) + 1
    return total


def page_bytes(layers: Sequence[LayerCache], first: int, last: int, block_size: int) -> int:
    """Return the bytes of a block on a stage with these layers: those of its widest group (`bytes_per_block`).

    Example:
        >>> page_bytes([LayerCache(token_bytes=512)] * 6, 0, 3, 128)
        262144
    """
    widest = 0
    for group in groups_of(layers):
        here = [number for number in group if first <= number <= last]
        widest = max(widest, sum(layers[number].token_bytes for number in here))
    return widest * block_size
