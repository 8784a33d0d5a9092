"""Classifies why a model could not be run without data: its own code, a library that changed, or a mistake of ours.

Formulas may be used only in the first case, which was the same when this package was tested, and which the plan states.
A changed library makes a plan's figures doubtful, and a mistake of ours must not be reported as the model's.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.torch import needs_data
from devmap_config.libraries.versions import TRIED, moved, untried
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

Cause = Literal["model", "library", "own"]
"""The model's code needs data, or takes other inputs than text; a library changed; this package has a mistake."""

OWN_CODE = Path(__file__).parent.parent

LONGEST_REASON = 300


class OtherInputsError(Exception):
    """The model needs other inputs than it is given."""


class NoMediaError(OtherInputsError):
    """The model takes no images, or no sound."""


class MissingSizeError(OtherInputsError):
    """The model takes images of any size, so that their size does not follow from its config."""


class UnfitCacheError(OtherInputsError):
    """transformers does not support the requested cache for this model."""


class PromptTooShortError(OtherInputsError):
    """The prompt has no room for the tokens that stand for images and sound."""

    def __init__(self, placeholders: int) -> None:
        self.placeholders = placeholders
        super().__init__(f"its images and sound take {placeholders:,} tokens of the prompt")


@dataclass(frozen=True)
class MeasurementFailure:
    """The reason why a model could not be run without data, and its cause."""

    cause: Cause
    reason: str


def failure_of(error: Exception) -> MeasurementFailure:
    """Classify why a model could not be run without data, by the error and the place where it was raised.

    An error of torch about missing data is the model's doing under every version of the libraries. Any other error
    counts as the model's only if the installed versions of the libraries were tested; otherwise it is attributed to
    them.
    """
    causes = tuple(_chain(error))
    if (changed := next((cause for cause in causes if isinstance(cause, LibraryChangedError)), None)) is not None:
        return _of_change(changed)
    if (other := next((cause for cause in causes if isinstance(cause, OtherInputsError)), None)) is not None:
        return MeasurementFailure("model", str(other))
    described = _described(error)
    try:
        if any(map(needs_data, causes)):
            return MeasurementFailure("model", described)
    except LibraryChangedError as unknown:  # the errors that torch raises for missing data are no longer known
        return _of_change(unknown)
    frames = _frames(error)
    packages = [_package(frame.filename) for frame in reversed(frames)] or [""]
    if (new := untried()) and (library := next((package for package in packages if package in new), new[0])):
        where = f" ({_raised_at(frames)})" if packages[0] == OWN_CODE.name else ""
        return MeasurementFailure("library", _shortened(f"{moved(library)}: {described}{where}"))
    if packages[0] == OWN_CODE.name:
        return MeasurementFailure("own", _shortened(f"{described} ({_raised_at(frames)})"))
    return MeasurementFailure("model", described)


def _of_change(change: LibraryChangedError) -> MeasurementFailure:
    return MeasurementFailure("library", _shortened(f"{moved(change.library)}: {change.what}"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


HANDED_ON = ("__torch_function__", "__torch_dispatch__")
"""The methods by which a mode passes a model's operations on to torch."""


def _frames(error: Exception) -> list[traceback.FrameSummary]:
    """Return the frames of an error, the innermost last, without those of our modes around torch."""
    frames = list(traceback.extract_tb(error.__traceback__))
    while isinstance(error, RuntimeError) and frames and _hands_on(frames[-1]):
        frames.pop()
    return frames


def _hands_on(frame: traceback.FrameSummary) -> bool:
    return frame.name in HANDED_ON or frame.filename.endswith("known_values.py")


def _package(filename: str) -> str:
    path = Path(filename)
    if OWN_CODE in path.parents:
        return OWN_CODE.name
    return next((part for part in reversed(path.parts) if part in TRIED), path.name)


def _raised_at(frames: list[traceback.FrameSummary]) -> str:
    """Return the line of this package that raised the error."""
    own = [frame for frame in frames if _package(frame.filename) == OWN_CODE.name]
    path = Path(own[-1].filename).relative_to(OWN_CODE.parent)
    return f"{path.as_posix()}:{own[-1].lineno}"


def _described(error: Exception) -> str:
    """Return an exception's type and the first line of its text."""
    return _shortened(": ".join(filter(None, (type(error).__name__, first_line(error)))))


def _shortened(text: str) -> str:
    return text[:LONGEST_REASON]
