"""Finds the end of a model's positions: the number of tokens after which a table has no row for the next position.

Models read their tables in many ways (with an offset, by a mask's sum, as slices), so no key of the config is trusted.
The model's own code is run without data at about the length of each table that it reads by position. Positions do not
depend on weights: they are computed from shapes and the prompt alone, so their real values are tracked.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.graph.recording import storage_key
from devmap_config.libraries.torch import (
    dispatch_mode,
    is_nondeterministic,
    operation_name,
    operation_packet,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    without_modes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from transformers import PreTrainedConfig

SHORT_LENGTH = 8
"""The tokens of the prompt that shows which tables are read; no table of positions is as short."""

MOST_NUMBERS = 2**22
"""The values of tensors with more elements are not tracked."""

LARGEST_OFFSET = 8
"""The most rows of a table that may stay unused: OPT begins at its third, RoBERTa after that of its padding."""


class PositionsEndError(Exception):
    """The model read a position that a table does not have."""


def end_of_positions(run: Callable[[int, PositionReads], object], reads: Callable[[], PositionReads]) -> int | None:
    """Return the most tokens that a model takes at once; `None` if its positions do not end.

    Args:
        run: runs the model on a prompt of this many tokens, under a `PositionReads`.
        reads: makes a new `PositionReads`.
    """

    def runs(length: int) -> bool:
        with suppress(Exception):  # a model's own code may raise anything at the end of a table
            run(length, reads())
            return True
        return False

    seen = reads()
    run(SHORT_LENGTH, seen)
    sizes = sorted(seen.sizes)
    if not sizes or runs(sizes[-1] + 1):
        return None
    size = next(size for size in sizes if size == sizes[-1] or not runs(size + 1))
    end = next((length for length in range(size, max(size - LARGEST_OFFSET, SHORT_LENGTH), -1) if runs(length)), None)
    # If longer prompts run, the model only requires multiples of some length.
    return None if end is None or any(map(runs, (end + 1, end + 2, 2 * end))) else end


class PositionReads(dispatch_mode()):  # type: ignore[misc]  # torch is not read by the type checker
    """Notes the sizes of tables that are read by position, and refuses a position that a table does not have.

    Attributes:
        sizes: the sizes of possible tables, along the dimension that is read.
    """

    def __init__(self, weights: Iterable[torch.Tensor], stated: Collection[int]) -> None:
        """A table is one of the model's `weights`, or has one of the lengths that its config has `stated`."""
        super().__init__()
        self.sizes: set[int] = set()
        self._weights = {storage_key(weight) for weight in weights}
        self._stated = stated

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = options or {}
        with without_modes():
            for table, dimension, positions in _reads(function, arguments):
                self._note(table, table.shape[dimension], positions)
        result = function(*arguments, **options)
        with without_modes():
            _compute(function, arguments, options, result)
        return result

    def _note(self, table: torch.Tensor, size: int, positions: torch.Tensor | None) -> None:
        numbers = None if positions is None else _numbers(positions)
        if numbers is not None and numbers.numel():
            last = int(numbers.max())
            if last >= size:
                raise PositionsEndError(f"position {last} of {size}")
            if last == int(numbers.min()):
                return  # the tokens of the prompt, which are all the same
        if size > SHORT_LENGTH and (size in self._stated or storage_key(table) in self._weights):
            self.sizes.add(size)


def _reads(function: Any, arguments: Any) -> Iterator[tuple[torch.Tensor, int, torch.Tensor | None]]:
    """Yield the reads by position of an operation: the table, its dimension, and the positions if they are a tensor."""
    aten, operation = torch.ops.aten, operation_packet(function)
    if operation is aten.embedding:
        yield arguments[0], 0, arguments[1]
    elif operation in (aten.index_select, aten.gather):
        yield arguments[:3]
    elif operation is aten.index:
        for dimension, positions in enumerate(arguments[1]):
            if positions is not None and positions.dtype != torch.bool:
                yield arguments[0], dimension, positions
    elif operation is aten.slice:
        yield arguments[0], arguments[1] if len(arguments) > 1 else 0, None


def _numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the values of a tensor without data, if they are known."""
    return getattr(tensor, "known_numbers", None)


def _compute(function: Any, arguments: Any, options: Any, result: Any) -> None:
    """Repeat on known values an operation that was run without data."""
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if not outputs:
        return
    leaves, structure = tree_flatten((arguments, options))
    known = [_numbers(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    is_known = not any(number is None and leaf is not None for number, leaf in zip(known, leaves, strict=True))
    is_small = sum(output.numel() for output in outputs) <= MOST_NUMBERS
    numbers: list[Any] = [None] * len(outputs)
    if is_known and is_small and not is_nondeterministic(function) and "empty" not in operation_name(function):
        known_arguments, known_options = tree_unflatten(known, structure)
        computed = tree_leaves(function(*known_arguments, **known_options))
        numbers = [leaf for leaf in computed if isinstance(leaf, torch.Tensor)]
    for output, value in zip(outputs, numbers, strict=True):
        output.known_numbers = value


LENGTHS = ("ctx", "max", "pos", "seq")
"""Parts of the keys that state a greatest length in configs."""


def stated_lengths(config: PreTrainedConfig) -> frozenset[int]:
    """Return the numbers of a config that may be the end of positions, as some tables are only made when they are
    read.
    """
    stated = config.get_text_config(decoder=True).to_dict()
    return frozenset(
        value for name, value in stated.items() if isinstance(value, int) and any(part in name for part in LENGTHS)
    )


def trained_length(config: PreTrainedConfig) -> int | None:
    """Return the longest context that a model was trained for, including rotary embeddings that are scaled to a
    longer one.
    """
    text_config = config.get_text_config(decoder=True)
    stated = getattr(text_config, "max_position_embeddings", None)
    rotations = getattr(text_config, "rope_parameters", None) or {}
    factor, original = rotations.get("factor"), rotations.get("original_max_position_embeddings")
    if not isinstance(stated, int) or stated <= 0:  # -1 of XLNet stands for no limit
        return None
    return max(stated, int(factor * original)) if factor and original else stated
