"""Streams the text of tokens as they are generated, and measures their times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

INCOMPLETE = "\ufffd"
"""The replacement character: a decoder writes it for a character whose last bytes are in the next token."""

PROMPT_CONTEXT = 5
"""The number of tokens at a prompt's end that influence the text of the next one."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The time of a model for a number of tokens.

    The first tokens, one for each text, take the prefill; `None` if their time is not known separately.
    """

    prompt_tokens: int
    tokens: int
    seconds: float
    first_token_seconds: float | None
    first_tokens: int = 1

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second, without the first one if its time is known and there are others."""
        if self.first_token_seconds is None or self.tokens <= self.first_tokens:
            return self.tokens / self.seconds
        return (self.tokens - self.first_tokens) / (self.seconds - self.first_token_seconds)

    def __add__(self, other: Speed) -> Speed:
        first = (self.first_token_seconds, other.first_token_seconds)
        return Speed(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            first_token_seconds=None if None in first else sum(filter(None, first)),
            first_tokens=self.first_tokens + other.first_tokens,
        )


class TextStream:
    """A streamer for transformers' `generate` that passes on the text of tokens once no later token can change it.

    Spaces are not cleaned up, since that would change text that was shown already. So text that is streamed is the same
    as text that is printed at once.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None], *, shows_prompt: bool, goes_on: bool = False
    ) -> None:
        """Begin; with `tokenizer=None`, tokens are shown as numbers at the end.

        With `goes_on`, the text continues a prompt that is not shown, and may begin with a space.
        """
        self._tokenizer = tokenizer
        self._write = write
        self._shows_prompt = shows_prompt
        self._context_tokens = PROMPT_CONTEXT if goes_on else 0
        self._tokens: list[int] = []
        self._begin = 0  # of the shown text
        self._written: list[str] = []
        self._context, self._shown = 0, 0  # decoding begins at the first, and has been shown up to the second
        self._prompt_tokens: int | None = None
        self._start_seconds = time.perf_counter()
        self._first_seconds: float | None = None
        self._first_tokens = 1

    def put(self, tokens: torch.Tensor) -> None:
        """Take tokens: first those of the prompt, then generated ones."""
        self._tokens += tokens.reshape(-1).tolist()
        if self._prompt_tokens is None:
            self._prompt_tokens = len(self._tokens)
            if not self._shows_prompt:
                self._begin = self._shown = self._prompt_tokens
                self._context = max(self._shown - self._context_tokens, 0)
                return
        elif self._first_seconds is None:
            self._first_seconds = time.perf_counter() - self._start_seconds
            self._first_tokens = tokens.numel()
        self._hand_on()

    def flush(self) -> None:
        """Pass on the remaining text."""
        self._hand_on(is_last=True)

    def end(self) -> None:
        """Pass on the remaining text, or the numbers of the tokens without a tokenizer."""
        self.flush()
        if not self.text.strip():
            self._hand_out(f"tokens {self._tokens[self._begin :]}")

    @property
    def text(self) -> str:
        """The text that was passed on."""
        return "".join(self._written)

    def speed(self, *, sees_each: bool) -> Speed:
        """Return the speed since this stream was created; `sees_each` says whether tokens arrived one by one."""
        prompt_tokens = self._prompt_tokens or 0
        return Speed(
            prompt_tokens=prompt_tokens,
            tokens=len(self._tokens) - prompt_tokens,
            seconds=time.perf_counter() - self._start_seconds,
            first_token_seconds=self._first_seconds if sees_each else None,
            first_tokens=self._first_tokens,
        )

    def _hand_on(self, *, is_last: bool = False) -> None:
        if self._tokenizer is None:
            return
        before = self._decoded(self._tokens[self._context : self._shown])
        text = self._decoded(self._tokens[self._context :])
        if len(text) > len(before) and (is_last or not text.endswith(INCOMPLETE)):
            self._hand_out(text[len(before) :])
            self._context, self._shown = self._shown, len(self._tokens)

    def _hand_out(self, text: str) -> None:
        self._written.append(text)
        self._write(text)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
