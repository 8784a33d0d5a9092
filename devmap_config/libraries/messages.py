"""What transformers and accelerate say while they work, taken down instead of printed."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = ("transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class Message:
    """A warning of a library: which one, and its text."""

    library: str
    text: str


@contextmanager
def taken_down(messages: list[Message]) -> Iterator[None]:
    """Take down, within, each warning that the libraries log or raise as Python's warnings, in the order they come."""
    from transformers.utils import logging as logging_of_transformers

    logging_of_transformers.get_logger()  # which sets up its handler, as the first that asks
    loggers = [logging.getLogger(library) for library in LIBRARIES]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    scribe = _Scribe(messages)
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
            logger.propagate = False
            logger.handlers = [scribe]
        with warnings.catch_warnings(record=True) as raised:
            yield
    finally:
        messages += [
            Message(_library_of(each.filename), str(each.message))
            for each in raised
            if not issubclass(each.category, (DeprecationWarning, PendingDeprecationWarning))  # for who writes code
        ]
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers = handlers


@contextmanager
def without_retries() -> Iterator[None]:
    """Let the hub's client be silent within of what it tries again: what comes of it is told."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Scribe(logging.Handler):
    def __init__(self, messages: list[Message]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(Message(record.name.partition(".")[0], record.getMessage()))


def _library_of(filename: str) -> str:
    """The library whose file raised a warning."""
    parts = filename.replace("\\", "/").split("/")
    return next((part for part in (*LIBRARIES, "torch") if part in parts), parts[-1])
