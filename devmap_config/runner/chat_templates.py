"""Renders a chat with a checkpoint's template, an untrusted program, in a process with limits."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from devmap_config.runner.loading import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MAX_CPU_SECONDS = 3
MAX_SECONDS = 10
"""The most seconds of a template, including waits, for instance for a lock that another thread held at the fork."""

MAX_BYTES = 2**29
"""The most memory that a template may take beyond that of the process."""

MAX_CHARACTERS = 1_000_000
"""The most characters that a template may add to the messages; a tokenizer takes seconds for as many."""

BEYOND = (
    f"it takes more than {MAX_CPU_SECONDS} s, {MAX_BYTES // 2**20} MiB or {MAX_CHARACTERS:,} characters"
    " besides the chat"
)

RENDERED, FAILED, ENDED = range(3)
"""The ways in which the process of a template ends by itself."""


class TemplateFailedError(Exception):
    """A chat template raised an error, or took too much."""


def chat_text(writer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a chat, rendered by the template of a tokenizer or a processor.

    On Linux, the time, memory and output of the template are limited.

    Raises:
        TemplateFailedError: if it fails or exceeds its limits.
    """
    most = MAX_CHARACTERS + sum(len(str(message)) for message in messages)
    render = partial(writer.apply_chat_template, list(messages), add_generation_prompt=True, tokenize=False)
    text, reason = _apart(render, most) if sys.platform == "linux" else _rendered(render, most)
    if reason:
        raise TemplateFailedError(reason)
    return text


def _rendered(render: Callable[[], str], most: int) -> tuple[str, str]:
    """Return the status and the text, or the reason why there is none."""
    try:
        text = render()
    except MemoryError:
        return "", BEYOND
    except Exception as error:  # a template may raise anything
        return "", f"{type(error).__name__}: {first_line(error)}"
    return (text, "") if len(text) <= most else ("", BEYOND)


def _apart(render: Callable[[], str], most: int) -> tuple[str, str]:
    """Render in a process of its own, which the system ends at the limits."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, whose locks are not needed
        child = os.fork()
    if child == 0:
        try:
            _limit()
            text, reason = _rendered(render, most)
            with os.fdopen(writer, "wb") as answer:
                answer.write((reason or text).encode("utf-8", "surrogatepass"))
            os._exit(FAILED if reason else RENDERED)
        finally:
            os._exit(ENDED)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read().decode("utf-8", "surrogatepass")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (said, "") if code == RENDERED else ("", said if code == FAILED else BEYOND)


def _limit() -> None:
    """Limit this process, but never above its present limits."""
    import resource
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MAX_SECONDS)
    used_bytes = psutil.Process().memory_info().vms
    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_AS, used_bytes + MAX_BYTES),
    ):
        _, allowed = resource.getrlimit(what)
        resource.setrlimit(what, (most if allowed == resource.RLIM_INFINITY else min(most, allowed), allowed))
