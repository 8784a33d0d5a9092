"""Checks that prompt and answer fit in the context that the plan has room for, and images and sound in what it was
measured with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.amounts import counted
from devmap_config.runner.inputs import numbers_of_media
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from typing import Any

    from devmap_config.graph.costs import Measurement, WorkloadShape
    from devmap_config.profile.schema import Workload
    from devmap_config.runner.inputs import ModelInputs
    from devmap_config.runner.media import Sound


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

PLAN_MEDIA = "write `workload.inputs` into the profile, and compile again"


def planned_media(measurement: Measurement | None, model_class: Any) -> WorkloadShape | None:
    """Return the workload whose images and sound are the most that the plan has room for in a prompt.

    Return `None` if the plan does not say how much that is: it budgets weights alone, formulas replaced a measurement,
    the model could not be measured with images or sound, or it always hears windows of one length (Whisper).
    """
    if measurement is None or not measurement.measured:
        return None
    if measurement.media is not None:
        return measurement.workload if measurement.media.problem is None else None
    return None if getattr(model_class, "main_input_name", None) == "input_features" else measurement.workload


def require_room_for_media(planned: WorkloadShape, *, images: int = 0, sounds: int = 0) -> None:
    """Check that a plan has room for a number of images and sounds.

    Raises:
        RunnerError: if it has not.
    """
    for what, count, most in (("image", images, planned.images), ("sound", sounds, 1 if planned.audio_seconds else 0)):
        if count > most:
            given = f"there {'is' if count == 1 else 'are'} {counted(count, what)}"
            raise RunnerError("beyond-context", f"{given}, and the plan has room for {most or 'none'}", PLAN_MEDIA)


def require_room_for_sound(planned: WorkloadShape, sound: Sound) -> None:
    """Check that a plan has room for the length of a sound.

    Raises:
        RunnerError: if it has not.
    """
    if sound.seconds > planned.audio_seconds:
        message = f"the sound takes {sound.seconds:,.1f} s, and the plan has room for {planned.audio_seconds:,}"
        raise RunnerError("beyond-context", message, f"shorten it, or {PLAN_MEDIA}")


def require_room_for_inputs(most_numbers: int, inputs: ModelInputs) -> None:
    """Check that the images and sound among a model's inputs have no more elements than those that were planned.

    Raises:
        RunnerError: if they have.
    """
    if (numbers := numbers_of_media(inputs)) > most_numbers:
        raise RunnerError(
            "beyond-context",
            f"as the model is given them, the images and sounds are {numbers / most_numbers:.3g} times as large as"
            " planned",
            "make them smaller, or plan for larger ones",
        )
