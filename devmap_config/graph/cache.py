"""Caches graphs between runs: making one takes seconds of imports, reading one takes milliseconds."""

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
    """Return the installed versions of the libraries that make graphs, without importing them."""
    return {name: build(name) for name in LIBRARIES}


def cached_graph(
    key: dict[str, object], make: Callable[[], ModelGraph], *, directory: Path | None = None
) -> ModelGraph:
    """Return the graph under this key, and make it if it is not cached yet.

    A graph that could not be read or measured because of a library or a mistake of ours is not cached, so that it is
    measured once that is fixed.
    """
    path = _path_of(key, directory)
    if (value := kept(path)) is not None:
        return graph_from_json(value)
    graph = make()
    if graph.unread is not None or (graph.measurement is not None and graph.measurement.cause != "model"):
        return graph
    keep(path, graph_to_json(graph))
    return graph


def graph_if_cached(key: dict[str, object]) -> ModelGraph | None:
    """Return the graph under this key, or `None` if it is not cached."""
    value = kept(_path_of(key, None))
    return None if value is None else graph_from_json(value)


def _path_of(key: dict[str, object], directory: Path | None) -> Path:
    made_by = {
        "schema": SCHEMA,
        "libraries": library_versions(),
        "code": code_digest("graph", "libraries", "quantization"),
    }
    name = digest({**key, **made_by}).removeprefix("sha256:")
    return (directory or default_directory()) / f"{name}.json"


def default_directory() -> Path:
    """Return `$XDG_CACHE_HOME/devmap-config/graphs`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "devmap-config" / "graphs"


def keep(path: Path, value: object) -> None:
    """Write a value to the cache with a digest over it and its name; a failure to write is ignored."""
    text = json.dumps(value, separators=(",", ":"))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{_seal(path, text)}\n{text}")


def kept(path: Path) -> Any:
    """Return the value in the cache, or `None` if there is none or its digest is wrong."""
    try:
        seal, _, text = read_text(path, GRAPH).partition("\n")
        return parse_json(text, GRAPH) if seal == _seal(path, text) else None
    except FileError:
        return None


def _seal(path: Path, text: str) -> str:
    return digest([path.name, text])


@cache
def code_digest(*packages: str) -> str:
    """Return a digest of the code of these packages of ours, whose results may change with the code."""
    root = Path(__file__).parent.parent
    sources = sorted(source for package in packages for source in (root / package).rglob("*.py"))
    return digest({source.relative_to(root).as_posix(): read_text(source, PACKAGED, ANYWHERE) for source in sources})
