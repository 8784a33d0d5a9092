"""Passes on warnings of libraries while a model is built, loaded and run, except those that need no attention."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from devmap_config.libraries.messages import LibraryMessage, taken_down

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.diagnostics.diagnostic import Sink

ANSWERED = {
    r"Some parameters are on the meta device because": "the plan has them there, and they were seen there",
    r".*LOAD REPORT": "missing, unexpected and mismatched names are held to the checkpoint, before and after loading",
    r"Current model requires \d+ bytes of buffer for offloaded layers": "the plan has room for what is streamed",
    r"The following device_map keys do not match any submodules": (
        "a map may name a tensor of a module that is split, and of every tensor it was seen that it has a place"
    ),
    r"You are calling \.generate\(\) with the `input_ids` being on a device type different": (
        "tokens are given where the embedding runs, which is verified; while it is streamed, it looks to be elsewhere"
    ),
    r"`\w+` requires torchvision \(not installed\)": "Pillow makes of an image what the processor says as well",
    r"Passing `generation_config` together with generation-related arguments": (
        "transformers itself gives both to a draft model"
    ),
    r"Both `(max|min)_new_tokens` \(=\d+\) and `(max|min)_length`": "what is asked for takes precedence, as meant",
    r"The following generation flags are not valid and may be ignored": (
        "`run` writes the likeliest tokens, whatever the checkpoint's generation config samples"
    ),
}
"""The reasons why nobody needs a warning, by its beginning. All others are passed on."""

LONGEST = 300
"""The most characters of a warning that are passed on."""


@contextmanager
def passing_on(sink: Sink) -> Iterator[None]:
    """Report warnings of transformers and accelerate as diagnostics while the context lasts, except those in
    `ANSWERED`.
    """
    messages: list[LibraryMessage] = []
    try:
        with taken_down(messages):
            yield
    finally:
        for message in messages:
            if not any(re.match(beginning, message.text.strip(), re.DOTALL) for beginning in ANSWERED):
                sink.warning(
                    "library-warning",
                    f"{message.library} says: {_in_one_line(message.text)}",
                    help="this is the library's own message",
                )


def _in_one_line(text: str) -> str:
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
