"""The messages of transformers and accelerate while they work, recorded instead of printed."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = ("transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class LibraryMessage:
    """A warning of a library: which one, and its text."""

    library: str
    text: str


@contextmanager
def taken_down(messages: list[LibraryMessage]) -> Iterator[None]:
    """Record the warnings that the libraries log or raise while the context lasts, in order.

    This imports no library: code that imports transformers within the context must call `take_down_from_here`.
    """
    scribe = _Scribe(messages)
    token = _SCRIBE.set(scribe)
    with warnings.catch_warnings(record=True) as raised:
        try:
            take_down_from_here()
            yield
        finally:
            _SCRIBE.reset(token)
            scribe.leave()
            messages += [
                LibraryMessage(_library_of(warning.filename), str(warning.message))
                for warning in raised
                if not issubclass(warning.category, (DeprecationWarning, PendingDeprecationWarning))  # for developers
            ]


def take_down_from_here() -> None:
    """Record the logs of transformers and accelerate from now on, if recording is on and transformers is imported.

    transformers installs its own handler when it is first imported.
    """
    if (scribe := _SCRIBE.get()) is not None:
        scribe.enter()


@contextmanager
def without_retries() -> Iterator[None]:
    """Silence the hub client's messages about retries while the context lasts, as their outcome is reported."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Scribe(logging.Handler):
    """Records the logs of the libraries, instead of their own handlers."""

    def __init__(self, messages: list[LibraryMessage]) -> None:
        super().__init__()
        self.messages = messages
        self.before: dict[logging.Logger, tuple[int, bool, list[logging.Handler]]] = {}

    def enter(self) -> None:
        logging_of_transformers = sys.modules.get("transformers.utils.logging")
        if self.before or logging_of_transformers is None:
            return
        logging_of_transformers.get_logger()  # the first call installs its handler
        for logger in map(logging.getLogger, LIBRARIES):
            self.before[logger] = (logger.level, logger.propagate, list(logger.handlers))
            logger.setLevel(logging.WARNING)
            logger.propagate = False
            logger.handlers = [self]

    def leave(self) -> None:
        for logger, (level, propagate, handlers) in self.before.items():
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(LibraryMessage(record.name.partition(".")[0], record.getMessage()))


_SCRIBE: ContextVar[_Scribe | None] = ContextVar("scribe", default=None)


def _library_of(filename: str) -> str:
    """Return the library whose file raised a warning."""
    parts = filename.replace("\\", "/").split("/")
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    return next((part for part in (*LIBRARIES, "torch") if part in parts), parts[-1])
