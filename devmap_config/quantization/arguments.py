"""Reads the arguments of a quantization from a profile or a checkpoint's config."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class QuantizationError(Exception):
    """The arguments of a quantization are invalid; the text says which, `help` what to write."""

    def __init__(self, message: str, help: str) -> None:
        self.help = help
        super().__init__(message)


@contextmanager
def reported_as_error(method: str) -> Iterator[None]:
    """Turn errors into `QuantizationError` that arguments of an unexpected shape cause."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        raise QuantizationError(
            f"the arguments of {method} cannot be read: {error}",
            "write them as transformers does into a checkpoint's `config.json`",
        ) from error


def flag(arguments: Mapping[str, Any], name: str) -> bool:
    """Return an argument that is true or false; false if it is left out."""
    value = arguments.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise QuantizationError(f"`{name}` is neither true nor false", f"write `{name}: true`, or leave it out")


def positive(arguments: Mapping[str, Any], name: str, default: int) -> int:
    """Return an argument that is a positive whole number."""
    value = arguments.get(name, default)
    if type(value) is not int or value <= 0:
        raise QuantizationError(f"`{name}` is not a positive whole number", f"such as `{name}: {default}`")
    return value


def check_names(arguments: Mapping[str, Any], name: str) -> None:
    """Raise if an argument is given and is not a list of names."""
    value = arguments.get(name)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise QuantizationError(f"`{name}` is not a list of names", f"such as `{name}: [lm_head]`")


def bits_and_group(method: str, arguments: Mapping[str, Any], known: Sequence[int]) -> tuple[int, int | None]:
    """Return `bits`, and the number of columns that share a scale: `None` for whole rows, which is written as -1."""
    bits = positive(arguments, "bits", 4)
    if bits not in known:
        allowed = ", ".join(map(str, known))
        raise QuantizationError(f"{method} has no weights of {bits} bits", f"write `bits:` with {allowed}")
    group = arguments.get("group_size", 128)
    return bits, None if group == -1 else positive(arguments, "group_size", 128)
