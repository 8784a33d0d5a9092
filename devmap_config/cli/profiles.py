"""Finds the profiles that arguments name: files, folders, and wildcards that no shell has expanded.

A YAML file in a folder looks like a profile if - it has a `model`, `workload` or `placement`, or `hardware` and a
`version`, and at least half of its keys are a profile's; or where all of its keys are, misspelt ones included, and mean
such; - it `extends` YAML files, and has a `version` or builds on what looks like a profile; - a lock lies beside it. A
file that others extend is not a profile by itself, unless it has a lock; nor is a file with only `hardware`. A file
that is not YAML is judged by the keys that can be recognised in it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import ProfileError
from devmap_config.files import PROFILE, FileError, exists, is_folder, read_bytes, real_path
from devmap_config.plan.lock import LOCK_SUFFIX, PROFILE_SUFFIXES, lock_path, profile_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.profile.document import MappingNode

SECTIONS = frozenset({"model", "workload", "placement"})
"""Keys that only profiles have; `hardware` may be in a file of its own, and the other keys occur in many formats."""

KEY = re.compile(r"""^["']?([A-Za-z][\w-]*)["']?\s*:""", re.MULTILINE)
"""Matches a key at the beginning of a line, for a text that is not YAML."""

KEY_IN_BRACES = re.compile(r"""[{,]\s*["']?([A-Za-z][\w-]*)["']?\s*:""")
"""Matches a key within braces, whose depth is then unknown."""

SIMILARITY = 0.75
"""The least similarity of a misspelt key to the intended one: `modle`, `verison`, `hardwear`."""


def profiles_named(arguments: Iterable[Path]) -> tuple[Path, ...]:
    """Return the profiles that arguments name, each once: files as given, and those below folders by name.

    Arguments that name nothing are kept, so that they are reported.
    """
    profiles: dict[Path, None] = {}
    for argument in arguments:
        if is_folder(argument):
            profiles |= dict.fromkeys(_profiles_below(argument))
        elif not exists(argument) and has_magic(str(argument)):
            matched = [Path(name) for name in sorted(glob(str(argument), recursive=True))]  # noqa: PTH207  absolute ones too
            named = [path for path in matched if path.name.endswith(PROFILE_SUFFIXES)]
            profiles |= dict.fromkeys(named or [argument])
        else:
            profiles[_of_lock(argument)] = None
    return tuple(profiles)


def _of_lock(path: Path) -> Path:
    """Return the profile of a path that names a lock; other paths, and locks without a profile, stay and are reported
    later.
    """
    try:
        return profile_of(path) if path.name.endswith(LOCK_SUFFIX) else path
    except ProfileError:
        return path


def _profiles_below(folder: Path) -> tuple[Path, ...]:
    """Return the profiles in a folder and below it, without hidden ones."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(PROFILE_SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    sketches = {real_path(path): sketch for path in files if (sketch := _sketch_of(path)) is not None}
    locked = {real_path(path) for path in files if exists(lock_path(path))}
    profiles = {path for path, sketch in sketches.items() if _looks_like_profile(sketch, sketches)} | locked
    extended = {base for path in profiles if path in sketches for base in sketches[path].bases}
    remaining = {path for path in profiles if path not in extended or path in locked}
    # Files that extend each other in a circle are not left out for being extended.
    remaining |= profiles - _built_on(remaining, sketches)
    return tuple(path for path in files if real_path(path) in remaining)


def _built_on(paths: Iterable[Path], sketches: Mapping[Path, _Sketch]) -> set[Path]:
    """Return these files and all files that they extend."""
    reached: set[Path] = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += sketches[path].bases if path in sketches else ()
    return reached


@dataclass(frozen=True)
class _Sketch:
    """A rough reading of a YAML file, to tell profiles from other files.

    Attributes:
        is_yaml: whether the file can be parsed; otherwise the keys are those at the beginnings of lines.
    """

    keys: tuple[str, ...]
    mappings: frozenset[str] = frozenset()
    bases: tuple[Path, ...] = ()
    is_yaml: bool = True

    @cached_property
    def meanings(self) -> dict[str, str]:
        """The key of a profile that each key equals or resembles."""
        from devmap_config.profile.schema import Profile

        known = list(Profile.model_fields)
        candidates = {key: difflib.get_close_matches(key, known, n=1, cutoff=SIMILARITY) for key in self.keys}
        meanings = {
            key: key if key in known else close[0] for key, close in candidates.items() if key in known or close
        }
        return meanings | {key: "x-" for key in self.keys if key.startswith("x-")}

    @property
    def exact(self) -> frozenset[str]:
        """The keys that are spelt exactly like a profile's."""
        return frozenset(key for key, meant in self.meanings.items() if key == meant)

    @property
    def holds_sections(self) -> bool:
        """True if the file itself has a section that only a profile has."""
        meanings = self.meanings
        if not self.is_yaml:
            return bool(self.exact & {*SECTIONS, "hardware"}) or {"version", "extends"} <= self.exact
        has_version = "version" in meanings.values()
        if 2 * len(meanings) >= len(self.keys) and _are_sections(self.exact, has_version):
            return True
        # A misspelt section alone says little: many files have `models`.
        sections = {meanings[key] for key in meanings if key in self.exact or key in self.mappings}
        return len(meanings) == len(self.keys) and _are_sections(sections, has_version)


def _are_sections(keys: Iterable[str], has_version: bool) -> bool:
    present = set(keys)
    return bool(present & SECTIONS) or ("hardware" in present and has_version)


def _looks_like_profile(sketch: _Sketch, sketches: Mapping[Path, _Sketch]) -> bool:
    if sketch.holds_sections:
        return True
    if not sketch.bases:
        return False
    below = _built_on(sketch.bases, sketches)
    # A file that it extends outside of the folder may hold the rest, or be missing: `check` reports either.
    return "version" in sketch.meanings.values() or any(
        path not in sketches or sketches[path].holds_sections for path in below
    )


def _sketch_of(path: Path) -> _Sketch | None:
    """Return a rough reading of a file, or `None` if it cannot be read."""
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.document import MappingNode, parse_document
    from devmap_config.profile.inheritance import base_files

    try:
        text = read_bytes(path, PROFILE).decode("utf-8", errors="replace")
    except FileError:
        return None
    document: MappingNode | None = parse_document(text, str(path), Sink())
    if document is None:
        pattern = KEY_IN_BRACES if text.lstrip("\ufeff \n-").startswith("{") else KEY
        return _Sketch(tuple(dict.fromkeys(pattern.findall(text))), is_yaml=False)
    bases = (base.text for base in base_files(document))
    return _Sketch(
        keys=tuple(entry.key.text for entry in document.entries),
        mappings=frozenset(entry.key.text for entry in document.entries if isinstance(entry.value, MappingNode)),
        bases=tuple(real_path(path.parent / base) for base in bases if base.endswith(PROFILE_SUFFIXES)),
    )
