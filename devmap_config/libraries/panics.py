"""Converts panics of Rust code, such as the tokenizers', whose exception is not an `Exception`, and so is not caught
otherwise.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def panics_raised() -> Iterator[None]:
    """Turn panics of Rust code into `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 has no module to import it from
            raise
        raise RuntimeError(str(error)) from error
