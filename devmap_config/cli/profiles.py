"""Finds the profiles that arguments name: files, folders, and wildcards that no shell has expanded."""

from __future__ import annotations

import re
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from devmap_config.profile.document import MappingNode

SUFFIXES = (".yaml", ".yml", ".yaml.j2", ".yml.j2")

TOP_LEVEL_KEY = re.compile(r"""^["']?(version|model|extends)["']?\s*:""", re.MULTILINE)


def profiles_named(arguments: Iterable[Path]) -> tuple[Path, ...]:
    """The profiles that arguments name, each once: files as they are given, of folders those below them by name.

    What names nothing stays, so that it is reported.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        if argument.is_dir():
            found |= dict.fromkeys(_profiles_below(argument))
        elif not argument.exists() and has_magic(str(argument)):
            matched = [Path(name) for name in sorted(glob(str(argument), recursive=True))]  # noqa: PTH207  absolute ones too
            named = [path for path in matched if path.is_file() and path.name.endswith(SUFFIXES)]
            found |= dict.fromkeys(named or [argument])
        else:
            found[argument] = None
    return tuple(found)


def _profiles_below(folder: Path) -> tuple[Path, ...]:
    """The profiles in a folder and those below it, hidden ones left out.

    A YAML file is one where it has a `version` and a model, or extends what has one. What only others extend is none,
    unless it has a lock.
    """
    candidates = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in candidates}
    bases = {base for path, text in texts.items() for base in _bases(path, text)}
    return tuple(
        path for path, text in texts.items() if _is_profile(text) and (path.resolve() not in bases or _has_lock(path))
    )


def _is_profile(text: str) -> bool:
    """Judged by its keys, so that a profile with a mistake in it is not overlooked."""
    keys = set(TOP_LEVEL_KEY.findall(text))
    return "version" in keys and len(keys) > 1


def _has_lock(path: Path) -> bool:
    from devmap_config.plan.lock import lock_path

    return lock_path(path).is_file()


def _bases(path: Path, text: str) -> Iterator[Path]:
    """The files that a profile extends, as far as it can be read."""
    if "extends" not in text:
        return
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.document import parse_document
    from devmap_config.profile.inheritance import base_files

    document: MappingNode | None = parse_document(text, str(path), Sink())
    for base in base_files(document) if document is not None else ():
        yield (path.parent / base.text).resolve()
