"""Keeps graphs between runs: a graph costs seconds of imports to make, and milliseconds to read."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.files import ANYWHERE, PACKAGED, read_text, write_atomically
from devmap_config.graph.digest import digest
from devmap_config.graph.serialization import SCHEMA, graph_from_json, graph_to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.graph.model import ModelGraph

LIBRARIES = ("torch", "transformers", "accelerate")
"""What makes a graph; their versions stand in a lock for information."""


def library_versions() -> dict[str, str | None]:
    """The installed versions of what makes graphs, read without importing it."""
    return {name: _version(name) for name in LIBRARIES}


def cached_graph(
    key: dict[str, object], make: Callable[[], ModelGraph], *, directory: Path | None = None
) -> ModelGraph:
    """The graph under this key, made where it is not kept yet.

    A file that cannot be read or written is never an error: the graph is then made again. What a library or a mistake
    of ours kept from being read or measured is not kept: it is to be measured once that is mended.
    """
    made_by = {"schema": SCHEMA, "libraries": library_versions(), "code": code_digest("graph", "libraries")}
    name = digest({**key, **made_by}).removeprefix("sha256:")
    path = (directory or default_directory()) / f"{name}.json"
    try:
        return graph_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        graph = make()
    if graph.unread is not None or (graph.measurement is not None and graph.measurement.cause != "model"):
        return graph
    keep(path, json.dumps(graph_to_json(graph), separators=(",", ":")))
    return graph


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/devmap-config/graphs`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "devmap-config" / "graphs"


def keep(path: Path, text: str) -> None:
    """Write a file of the cache whole or not at all; where that is not possible, it is not kept."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


@cache
def code_digest(*packages: str) -> str:
    """Return a digest of the code of these packages of ours: what they make may change when it does."""
    root = Path(__file__).parent.parent
    sources = sorted(source for package in packages for source in (root / package).glob("*.py"))
    return digest({source.relative_to(root).as_posix(): read_text(source, PACKAGED, ANYWHERE) for source in sources})


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
