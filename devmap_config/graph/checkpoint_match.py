"""Compares a checkpoint with the model that a config describes, and judges the differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.graph.model import is_within
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Mapping


class TensorMismatch(NamedTuple):
    """A tensor that is stored differently from the model's: its two shapes, or a `reason` if the shapes do not show
    it.
    """

    name: str
    stored: str
    wanted: str
    reason: str = ""

    @property
    def text(self) -> str:
        """The mismatch in a few words."""
        return f"`{self.name}` {self.reason or f'is {self.stored}, and {self.wanted} in the model'}"


@dataclass(frozen=True, kw_only=True)
class CheckpointMatch:
    """The result of comparing a checkpoint's names with a model, as transformers' loader would.

    Attributes:
        class_name: the class that was loaded.
        absent: the largest modules all of whose tensors are missing.
        tensor_count: the number of tensors in the checkpoint.
        missing: tensors of the model that the checkpoint does not hold.
        computed: tensors that the checkpoint does not hold because transformers computes them, by its own lists.
        unexpected: tensors of the checkpoint that the model does not hold, and that transformers' lists do not name.
        mismatched: tensors that are stored in another shape or kind of number.
        unchecked: why the names could not be compared; `None` if they were.
    """

    class_name: str = ""
    tensor_count: int = 0
    absent: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[TensorMismatch, ...] = ()
    unchecked: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckpointMatch:
        """Return the match that `dataclasses.asdict` turned into plain data."""
        names = {field: tuple(value[field]) for field in ("absent", "missing", "computed", "unexpected")}
        mismatched = tuple(TensorMismatch(*mismatch) for mismatch in value["mismatched"])
        return cls(**{**value, **names, "mismatched": mismatched})


@dataclass(frozen=True)
class Judgement:
    """The verdict on a match: an error or a warning, each with advice."""

    error: str | None = None
    error_help: str = ""
    warning: str | None = None
    new: tuple[str, ...] = ()
    """The missing tensors that the profile allows."""


def judge(match: CheckpointMatch, config: Mapping[str, Any], allowed: frozenset[str]) -> Judgement:
    """Return the verdict on a match.

    Args:
        match: the result of the comparison.
        config: the model's config.
        allowed: the tensors that may be missing (`model.allow_new`).
    """
    missing = tuple(name for name in match.missing if name not in allowed)
    mismatched = tuple(mismatch for mismatch in match.mismatched if mismatch.name not in allowed)
    new = tuple(name for name in match.missing if name in allowed)
    unexpected = _listed("is not in the model", "are not in the model", [f"`{name}`" for name in match.unexpected])
    if not missing and not mismatched and 2 * len(new) <= match.tensor_count:
        return Judgement(warning=unexpected or None, new=new)
    count = match.tensor_count
    parts = [
        _listed(f"of {count} tensors is missing", f"of {count} tensors are missing", [f"`{name}`" for name in missing]),
        _listed("is stored differently", "are stored differently", [mismatch.text for mismatch in mismatched]),
        unexpected,
    ]
    if not missing and not mismatched:
        parts[0] = f"{len(new)} of {count} tensors are new, by `allow_new`"
    looks_like, help = _kind_of_mistake(match, missing, mismatched, config)
    warnings = "; ".join(filter(None, parts))
    message = f"the checkpoint does not hold this {match.class_name}, and looks like {looks_like}: {warnings}"
    return Judgement(error=message, error_help=help)


def _listed(one: str, many: str, texts: list[str]) -> str:
    """Return a count, and the first few by name: `2 are not in the model (`a`, `b`)`."""
    if not texts:
        return ""
    return f"{len(texts)} {one if len(texts) == 1 else many} ({first_of(texts)})"


def _kind_of_mistake(
    match: CheckpointMatch, missing: tuple[str, ...], mismatched: tuple[TensorMismatch, ...], config: Mapping[str, Any]
) -> tuple[str, str]:
    """Return the mistake that a mismatch looks like, and the advice for it."""
    saved = next((name for name in config.get("architectures") or () if isinstance(name, str)), None)
    is_other_class = saved not in (None, match.class_name)
    heads = [part for part in match.absent if not any(segment.isdigit() for segment in part.split("."))]
    if missing and not mismatched and all(any(is_within(name, head) for head in heads) for name in missing):
        listed, which = ", ".join(heads), "it is" if len(heads) == 1 else "they are"
        other = f"; to load what was saved, write `class: {saved}`" if is_other_class else ""
        allowing = f"`allow_new: [{listed}]` under `model`"
        advice = f"if {which} to be trained, say so: {allowing}{other}; otherwise download it again"
        return f"one without {' and '.join(f'`{part}`' for part in heads)}", advice
    strange = len(missing) + len(match.unexpected)
    if strange * FEW > match.tensor_count and (match.unexpected or 2 * len(missing) > match.tensor_count):
        which = "another class of it" if is_other_class else "another model"
        return which, "name the checkpoint of this model, or the class that was saved, as `class`"
    if not missing and all(mismatch.stored for mismatch in mismatched) and len(mismatched) != 1:
        return "one of another size", "name the folder whose config.json and weights are of one model"
    if missing and match.unexpected:
        return "one with other names", "see which class and version saved it; otherwise download it again"
    return "a damaged or unfinished one", "download the checkpoint again: files are missing, cut off or changed"


FEW = 5
"""If more than one name in five is wrong, the checkpoint is not damaged, but of another model."""
