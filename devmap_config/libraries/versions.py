"""The versions of libraries that this package was tested with, and the installed ones. Imports no library."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

TRIED: dict[str, tuple[str, ...]] = {
    "torch": ("2.13.0",),
    "transformers": ("5.20.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0"),
    "accelerate": ("1.15.0",),
}
"""The versions with which models were measured and dry-run, the oldest first. docs/libraries.md lists what was run."""


@cache  # parsing the metadata takes longer than reading a profile
def build(library: str) -> str | None:
    """Return the installed version of a library with its build, such as `2.13.0+cpu`; `None` if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def installed(library: str) -> str | None:
    """Return the installed version of a library without its build; `None` if it is not installed."""
    version = build(library)
    return version and version.partition("+")[0]


def release(text: str) -> tuple[int, ...]:
    """Return the numbers of a version.

    >>> release("5.24.0"), release("5.24.0rc1")
    ((5, 24, 0), (5, 24, 0))
    """
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()


def is_tried(library: str) -> bool:
    """Return whether this package was tested with the installed version of a library."""
    return installed(library) in TRIED[library]


def untried() -> tuple[str, ...]:
    """Return the libraries whose installed version was never tested."""
    return tuple(library for library in TRIED if installed(library) is not None and not is_tried(library))


def moved(library: str) -> str:
    """Return a phrase about a library whose version was never tested: `transformers 5.24.0 → 5.25.0`.

    The first is the nearest version that was tested: the newest that is no newer, else the oldest.
    """
    present = installed(library)
    if present is None or is_tried(library):
        return f"{library} {present or ''}".rstrip()
    older = [version for version in TRIED[library] if release(version) < release(present)]
    return f"{library} {older[-1] if older else TRIED[library][0]} → {present}"


def never_tried(library: str) -> str:
    """Return a sentence that the installed version of a library was never tested."""
    tried, own = ", ".join(TRIED[library]), version("devmap-config")
    sentence = f"{library} {installed(library)} was never tried with devmap-config {own} (tried: {tried})"
    return f"{sentence}: install one of these if something is off"
