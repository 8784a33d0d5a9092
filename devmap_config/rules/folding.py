"""Folds paths into the short patterns that stand for them: `model.layers.[0-39]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Segments: TypeAlias = tuple[str, ...]

MAX_NUMBERS = 4
"""Numbered segments of one path that are folded; real trees have two."""


def fold_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Patterns that match exactly these paths: what differs in one number is folded to a range.

    The order of first appearance is kept.
    """
    folded: list[Segments] = [tuple(path.split(".")) for path in paths]
    for nth in range(MAX_NUMBERS):
        folded = _fold_nth_number(folded, nth)
    return tuple(".".join(segments) for segments in folded)


def _fold_nth_number(paths: list[Segments], nth: int) -> list[Segments]:
    """Paths that are alike but for their `nth` numbered segment, as one with a range there."""
    groups: dict[tuple[Segments, Segments] | Segments, list[int]] = {}
    for segments in paths:
        numbered = [place for place, segment in enumerate(segments) if segment.isdigit() or segment.startswith("[")]
        if len(numbered) <= nth or not segments[numbered[nth]].isdigit():
            groups[segments] = []
            continue
        place = numbered[nth]
        groups.setdefault((segments[:place], segments[place + 1 :]), []).append(int(segments[place]))
    folded: list[Segments] = []
    for key, numbers in groups.items():
        if numbers:
            before, after = key
            folded.append((*before, ranges(sorted(numbers)), *after))
        else:
            folded.append(key)  # type: ignore[arg-type]  # a path of its own
    return folded


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `[0-3,8]`; one alone as itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    items = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"[{','.join(items)}]"
