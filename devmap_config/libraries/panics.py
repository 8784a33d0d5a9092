"""Code in Rust, such as the tokenizers', fails by an exception that is no `Exception`: nobody else would catch it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def panics_raised() -> Iterator[None]:
    """Raise what code in Rust panics with as a `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pyo3, which has no module to import it from
            raise
        raise RuntimeError(str(error)) from error
