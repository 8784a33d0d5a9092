"""Keeps graphs between runs: a graph costs seconds of imports to make, and milliseconds to read."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.files import ANYWHERE, GRAPH, PACKAGED, FileError, parse_json, read_text, write_atomically
from devmap_config.graph.digest import digest
from devmap_config.graph.serialization import SCHEMA, graph_from_json, graph_to_json
from devmap_config.libraries.versions import build

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.graph.model import ModelGraph

LIBRARIES = ("torch", "transformers", "accelerate")
"""The libraries that make a graph; a lock holds their versions for information."""


def library_versions() -> dict[str, str | None]:
    """Return the installed versions of what makes graphs, read without importing it."""
    return {name: build(name) for name in LIBRARIES}


def cached_graph(
    key: dict[str, object], make: Callable[[], ModelGraph], *, directory: Path | None = None
) -> ModelGraph:
    """Return the graph under this key, made where it is not kept yet.

    What a library or a mistake of ours kept from being read or measured is not kept: it is to be measured once that is
    mended.
    """
    made_by = {
        "schema": SCHEMA,
        "libraries": library_versions(),
        "code": code_digest("graph", "libraries", "quantization"),
    }
    name = digest({**key, **made_by}).removeprefix("sha256:")
    path = (directory or default_directory()) / f"{name}.json"
    if (value := kept(path)) is not None:
        return graph_from_json(value)
    graph = make()
    if graph.unread is not None or (graph.measurement is not None and graph.measurement.cause != "model"):
        return graph
    keep(path, graph_to_json(graph))
    return graph


def default_directory() -> Path:
    """Return `$XDG_CACHE_HOME/devmap-config/graphs`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "devmap-config" / "graphs"


def keep(path: Path, value: object) -> None:
    """Write a value to the cache under a digest over it and its name; where it cannot be written, it is not kept."""
    text = json.dumps(value, separators=(",", ":"))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{_seal(path, text)}\n{text}")


def kept(path: Path) -> Any:
    """Return the value that was kept, or `None` if there is none or it is not what was written under this name."""
    try:
        seal, _, text = read_text(path, GRAPH).partition("\n")
        return parse_json(text, GRAPH) if seal == _seal(path, text) else None
    except FileError:
        return None


def _seal(path: Path, text: str) -> str:
    return digest([path.name, text])


@cache
def code_digest(*packages: str) -> str:
    """Return a digest of the code of these packages of ours: what they make may change when it does."""
    root = Path(__file__).parent.parent
    sources = sorted(source for package in packages for source in (root / package).rglob("*.py"))
    return digest({source.relative_to(root).as_posix(): read_text(source, PACKAGED, ANYWHERE) for source in sources})
