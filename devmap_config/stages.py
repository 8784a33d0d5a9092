"""Announces each stage of compiling through the standard library's logging, so that a terminal can show it."""

from __future__ import annotations

import logging
from typing import Literal, get_args

LOGGER = logging.getLogger(__name__)

Stage = Literal["read", "measure", "place", "rehearse"]

STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they run; a stage whose result is cached is skipped."""


def begin(stage: Stage, words: str) -> None:
    """Announce that a stage begins, in words for a line of progress: `placing it by auto`."""
    LOGGER.info(words, extra={"stage": STAGES.index(stage)})
