"""Checks that prompt and answer fit in the context that the plan has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from devmap_config.profile.schema import Workload


@dataclass(frozen=True, kw_only=True)
class PlannedContext:
    """The most tokens of prompt and answer together, and of the prompt; `None` without a planned context."""

    tokens: int | None = None
    prompt_tokens: int | None = None

    @classmethod
    def of(cls, workload: Workload) -> PlannedContext:
        """Return the context of a profile's workload."""
        tokens = workload.context_length.value
        return cls(tokens=tokens, prompt_tokens=workload.prompt_length or tokens)

    def new_tokens(self, prompt_tokens: int, *, wanted: int | None, default: int) -> int:
        """Return the number of tokens to generate after a prompt: `wanted`, or up to `default` as far as there is room.

        Raises:
            RunnerError: if the plan has no room for the prompt, or for `wanted` tokens after it.

        Example:
            >>> PlannedContext(tokens=100, prompt_tokens=90).new_tokens(80, wanted=None, default=24)
            20
        """
        self.require_room(prompt_tokens)
        room = default if self.tokens is None else self.tokens - prompt_tokens
        if self.tokens is not None and (wanted or 1) > room:
            raise RunnerError(
                "beyond-context",
                f"a prompt of {prompt_tokens:,} tokens and {wanted or 1:,} to be written are more than the context"
                f" holds, {self.tokens:,}",
                PLAN_MORE.format("context_length"),
            )
        return wanted or min(default, room)

    def require_room(self, prompt_tokens: int) -> None:
        """Check that the plan has room for a prompt.

        Raises:
            RunnerError: if it has not.
        """
        if self.prompt_tokens is not None and prompt_tokens > self.prompt_tokens:
            raise RunnerError(
                "beyond-context",
                f"the prompt has {prompt_tokens:,} tokens, and the plan room for {self.prompt_tokens:,}",
                PLAN_MORE.format("prompt_length" if self.prompt_tokens != self.tokens else "context_length"),
            )


PLAN_MORE = "shorten it, or say a larger `workload.{}` and compile again"
