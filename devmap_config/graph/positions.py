"""Finds where a model's positions end: how many tokens it takes before a table has no row for the next position.

Models read their tables in many ways (with an offset, by a mask's sum, as slices), so no key of the config is believed.
The model's own code is run without data at about the length of each table that it reads by position. What it reads
there hangs on no data: numbers that are made of nothing but shapes and the prompt are computed for real beside.
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
"""Tokens of the prompt by which is seen which tables are read; no table of positions is as short."""

MOST_NUMBERS = 2**22
"""Tensors with more elements are not computed for real."""

LARGEST_OFFSET = 8
"""The most rows of a table that may stay unused: OPT begins at its third, RoBERTa after that of its padding."""


class PositionsEndError(Exception):
    """A position was looked up that a table does not have."""


def end_of_positions(run: Callable[[int, PositionReads], object], reads: Callable[[], PositionReads]) -> int | None:
    """Return the most tokens that a model can be given at once; `None` if its positions do not end.

    Args:
        run: runs the model on a prompt of so many tokens, within what sees the tables that are read.
        reads: makes the latter.
    """

    def runs(length: int) -> bool:
        with suppress(Exception):  # whatever a model's own code raises where a table has come to its end
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
    # A model that wants its prompt to be a multiple of something does not end there.
    return None if end is None or any(map(runs, (end + 1, end + 2, 2 * end))) else end


class PositionReads(dispatch_mode()):  # type: ignore[misc]  # torch is not read by the type checker
    """Notes the sizes of tables that are read by position, and refuses a position that a table does not have.

    Attributes:
        sizes: of what may be such a table, along the dimension that is read.
    """

    def __init__(self, weights: Iterable[torch.Tensor], stated: Collection[int]) -> None:
        """A table is one of the model's `weights`, or as long as a length that its config has `stated`."""
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
                return  # the words of the prompt, which are all the same
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
    """Return the numbers of a tensor without data, where they are known."""
    return getattr(tensor, "known_numbers", None)


def _compute(function: Any, arguments: Any, options: Any, result: Any) -> None:
    """Do with the numbers that are known what was done without data."""
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
"""Parts of the keys by which configs state a greatest length."""


def stated_lengths(config: PreTrainedConfig) -> frozenset[int]:
    """Return the numbers by which a config may say where positions end: some tables are made when they are read."""
    stated = config.get_text_config(decoder=True).to_dict()
    return frozenset(
        value for name, value in stated.items() if isinstance(value, int) and any(part in name for part in LENGTHS)
    )


def trained_length(config: PreTrainedConfig) -> int | None:
    """Return the longest context that a model is meant for, rotations that are stretched for a longer one included."""
    text_config = config.get_text_config(decoder=True)
    stated = getattr(text_config, "max_position_embeddings", None)
    rotations = getattr(text_config, "rope_parameters", None) or {}
    factor, original = rotations.get("factor"), rotations.get("original_max_position_embeddings")
    if not isinstance(stated, int) or stated <= 0:  # XLNet says -1: there is no limit
        return None
    return max(stated, int(factor * original)) if factor and original else stated
