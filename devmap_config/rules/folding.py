"""Folds paths into short patterns: `model.layers.[0-39]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Segments: TypeAlias = tuple[str, ...]

MAX_NUMBERS = 4
"""The most numbered segments of one path that are folded; real trees have two."""


def fold_paths(paths: Iterable[str], *, with_steps: bool = True) -> tuple[str, ...]:
    """Return patterns that match exactly these paths: paths that differ in one number are folded to a range.

    The order of first appearance is kept. Names of devices are folded without steps, which their ranges lack.
    """
    folded: list[Segments] = [tuple(path.split(".")) for path in paths]
    for nth in range(MAX_NUMBERS):
        folded = _fold_nth_number(folded, nth, with_steps=with_steps)
    return tuple(".".join(segments) for segments in folded)


def _fold_nth_number(paths: list[Segments], nth: int, *, with_steps: bool) -> list[Segments]:
    """Fold paths that differ only in their `nth` numbered segment into one with a range."""
    groups: dict[tuple[Segments, Segments] | Segments, list[int]] = {}
    for segments in paths:
        numbered = [
            place for place, segment in enumerate(segments) if number_in(segment) is not None or segment.startswith("[")
        ]
        number = number_in(segments[numbered[nth]]) if len(numbered) > nth else None
        if number is None:
            groups[segments] = []
            continue
        place = numbered[nth]
        groups.setdefault((segments[:place], segments[place + 1 :]), []).append(number)
    folded: list[Segments] = []
    for key, numbers in groups.items():
        if numbers:
            before, after = key
            folded.append((*before, ranges(sorted(numbers), with_steps=with_steps), *after))
        else:
            folded.append(key)  # type: ignore[arg-type]  # a path of its own
    return folded


STEPS = 3
"""The least count of equally spaced numbers that are written as a range with a step: `[1-5/2]`."""


def ranges(numbers: Sequence[int], *, with_steps: bool = True) -> str:
    """Return ascending numbers as a range of the pattern language; one number as itself.

    >>> ranges([1, 3, 5, 7]), ranges([0, 1, 4]), ranges([7])
    ('[1-7/2]', '[0-1,4]', '7')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    items: list[str] = []
    rest = list(numbers)
    while rest:
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        count = next((place for place, number in enumerate(rest) if number != rest[0] + place * step), len(rest))
        if step > 1 and (count < STEPS or not with_steps):
            count = 1
        stepped = f"/{step}" if step > 1 else ""
        items.append(str(rest[0]) if count == 1 else f"{rest[0]}-{rest[count - 1]}{stepped}")
        del rest[:count]
    return f"[{','.join(items)}]"
