"""Tracks the values of tensors that depend on no weight and no pixel, among tensors without data.

What a model does with an image depends on data in places: the number of patches, their positions in the prompt. All of
these are computed from literals and from inputs with known values: token ids, grids, masks, positions. So the value of
every tensor that is computed from nothing else is tracked, and used when the model's code asks for data.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from devmap_config.libraries.torch import (
    FAKE_TENSOR,
    dispatch_mode,
    has_data_dependent_shape,
    is_view,
    operation_name,
    storage_identity,
    telling_values,
    tree_leaves,
    tree_map,
    with_data,
    writes_to,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_ELEMENTS = 2**22
"""The values of larger tensors are not tracked."""

RANDOM = ("rand", "randn", "normal_", "uniform_", "rand_like", "randn_like", "randint", "bernoulli")
"""Operations whose result differs each time."""

INDEXING = ("index", "_unsafe_index")


@contextmanager
def knowing_values() -> Iterator[None]:
    """Track values while the context lasts; to be entered within a context of tensors without data, before
    recorders.
    """
    mode = _KnownValues()
    with telling_values(mode.value_of), mode:
        yield


class _KnownValues(dispatch_mode()):  # type: ignore[misc]  # torch is not read by the type checker
    """Computes, for every operation on tensors without data, the value of its result, if it is known."""

    def __init__(self) -> None:
        super().__init__()
        self._class = FAKE_TENSOR.find()
        self._spoiled: dict[
            int, Any
        ] = {}  # storages of outdated values, kept alive so that no other gets their address

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the value of a tensor, if it is known."""
        if not isinstance(tensor, self._class):
            has_value = not tensor.is_meta and type(tensor) is torch.Tensor and tensor.numel() <= MOST_ELEMENTS
            return tensor if has_value else None
        value: torch.Tensor | None = getattr(tensor, "known_value", None)
        if value is None:
            return tensor.constant  # a number that became a tensor
        return None if storage_identity(value.untyped_storage()) in self._spoiled else value

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        del types
        options = options or {}
        name = operation_name(function).rpartition("::")[2]
        values = [self.value_of(leaf) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
        is_known = all(value is not None for value in values) and name not in RANDOM and not _is_unset(name, options)
        size = sum(value.numel() for value in values if value is not None)
        if is_known and (size <= MOST_ELEMENTS or is_view(function)):
            return self._computed(function, arguments, options)
        self._spoil(function, arguments)
        return self._shaped(function, name, arguments, options)

    def _computed(self, function: Any, arguments: Any, options: Any) -> Any:
        """Run an operation with known inputs, once without data and once with it."""
        if has_data_dependent_shape(function):
            return tree_map(self._without_data, self._real(function, arguments, options))
        result = function(*arguments, **options)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, self._class)]
        if not is_view(function) and sum(tensor.numel() for tensor in made) > MOST_ELEMENTS:
            return result
        try:
            real = self._real(function, arguments, options)
        except (NotImplementedError, RuntimeError):  # the CPU does not have this operation
            self._spoil(function, arguments)
            return result
        known = [leaf for leaf in tree_leaves(real) if isinstance(leaf, torch.Tensor)]
        for tensor, value in zip(made, known, strict=False):
            if tensor.shape == value.shape and not (
                writes_to(function, arguments) and self.value_of(tensor) is not None
            ):
                tensor.known_value = value
        return result

    def _shaped(self, function: Any, name: str, arguments: Any, options: Any) -> Any:
        """Run an operation with some unknown inputs; the shape of its result may follow from the known ones."""
        first: Any = arguments[0] if arguments else None
        if name in INDEXING and len(arguments[1]) == 1 and _is_mask(arguments[1][0]):
            mask = arguments[1][0]
            if (count := self._sum(mask)) is not None:
                return first.new_empty((count, *first.shape[mask.dim() :]))
        if name in INDEXING:
            return function(first, self._plain_indices(arguments[1]), *arguments[2:], **options)
        if (
            name == "masked_select"
            and first.shape == arguments[1].shape
            and (count := self._sum(arguments[1])) is not None
        ):
            return first.new_empty((count,))
        if name == "repeat_interleave" and len(arguments) > 1 and isinstance(arguments[1], torch.Tensor):
            dimension = (arguments[2] if len(arguments) > 2 else options.get("dim")) or 0
            if (count := self._sum(arguments[1])) is not None:
                return first.new_empty((*first.shape[:dimension], count, *first.shape[dimension + 1 :]))
        return function(*arguments, **options)

    def _sum(self, tensor: torch.Tensor) -> int | None:
        value = self.value_of(tensor)
        if value is None:
            return None
        with with_data():
            return int(value.sum())

    def _plain_indices(self, indices: Any) -> list[Any]:
        """Return indices with masks replaced by the positions that they select."""
        plain: list[Any] = []
        for index in indices:
            value = self.value_of(index) if _is_mask(index) else None
            if value is None:
                plain.append(index)
            else:
                with with_data():
                    positions = value.nonzero(as_tuple=True)
                plain += map(self._without_data, positions)
        return plain

    def _real(self, function: Any, arguments: Any, options: Any) -> Any:
        def real(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self.value_of(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        with with_data():
            return function(*tree_map(real, arguments), **tree_map(real, options))

    def _without_data(self, value: Any) -> Any:
        """Return a tensor without data, and record its value."""
        if not isinstance(value, torch.Tensor):
            return value
        tensor = torch.empty(value.shape, dtype=value.dtype)
        tensor.known_value = value
        return tensor

    def _spoil(self, function: Any, arguments: Any) -> None:
        """Forget the values of tensors that an operation overwrites with unknown data."""
        for tensor in writes_to(function, arguments):
            if (value := getattr(tensor, "known_value", None)) is not None:
                storage = value.untyped_storage()
                self._spoiled[storage_identity(storage)] = storage


def _is_unset(name: str, options: Any) -> bool:
    """Return whether an operation makes uninitialised floating-point numbers; integers are soon overwritten, and
    then read.
    """
    return "empty" in name and options.get("dtype") in (None, torch.bfloat16, torch.float16, torch.float32)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
