"""Says which stage of compiling begins, through the standard library's logging: who has a terminal may show it."""

from __future__ import annotations

import logging
from typing import Literal, get_args

LOGGER = logging.getLogger(__name__)

Stage = Literal["read", "measure", "place", "rehearse"]

STAGES: tuple[Stage, ...] = get_args(Stage)
"""In the order in which they come; those whose results are kept are left out."""


def begin(stage: Stage, words: str) -> None:
    """Announce that a stage begins, in words for a line of progress: `placing it by auto`."""
    LOGGER.info(words, extra={"stage": STAGES.index(stage)})
