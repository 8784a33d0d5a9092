"""Stores a model's graph beside its profile (`x.graph.json`), so that compiling needs neither the hub nor torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping  # noqa: TC003  pydantic reads the annotations
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from devmap_config.files import GRAPH, FileError, read_json
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.digest import digest
from devmap_config.graph.model import ModelGraph  # noqa: TC001
from devmap_config.graph.serialization import graph_from_json, graph_to_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devmap_config.files import Boundary

SCHEMA = "devmap-vendored-graph/3"
"""Version 2 added a digest over the content, version 3 the host's dispatches."""


KEYS = {"class_name": "class"}
"""The names of fields in the file, if they differ from those of the class."""

LEFT_OUT = ("quantization", "adapter", "stored_dtype", "checkpoint", "dry_runs")
"""The fields that the file leaves out if they are empty."""


NO_NAME = re.compile(r"[\\^$*+?{}()|\[\]]")
"""Characters that no module's name may have, because transformers reads the keys of a map as regular expressions."""


class VendoredGraphError(Exception):
    """A file is not a readable vendored graph; the text says why."""


@dataclass(frozen=True, kw_only=True)
class VendoredGraph:
    """A graph with its inputs: the model's config and the settings of the profile."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, revalidate_instances="always")

    graph: ModelGraph
    config: Mapping[str, Any]
    source: str
    revision: str | None
    commit: str | None
    class_name: str
    dtype: str
    attention: str | None
    workload: WorkloadShape | None
    quantization: Mapping[str, Any] | None = None
    adapter: str | None = None
    """The digest of the config of the adapter, which the graph counts."""
    stored_dtype: str | None = None
    checkpoint: str | None = None
    """The digest of the checkpoint's headers, if they were at hand."""
    dry_runs: Mapping[str, Any] = field(default_factory=dict)
    """The results of dry runs of plans for this model, by the plans' digests."""

    def to_text(self) -> str:
        """Return the text of the file: compact, and the same bytes for the same graph."""
        value: dict[str, Any] = {
            "schema": SCHEMA,
            **{KEYS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)},
        }
        value |= {
            "graph": graph_to_json(self.graph),
            "workload": None if self.workload is None else self.workload.to_json(),
        }
        value = {key: part for key, part in value.items() if part or key not in LEFT_OUT}
        value["digest"] = digest(value)
        return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False) + "\n"


def vendored_path(profile: Path) -> Path:
    """Return `x.graph.json` beside `x.yaml`."""
    return beside(profile, ".graph.json")


def beside(profile: Path, suffix: str) -> Path:
    """Return the path beside a profile with the same name and another suffix.

    >>> from pathlib import Path
    >>> beside(Path("profiles/quickstart.yaml"), ".lock.json").as_posix()
    'profiles/quickstart.lock.json'
    """
    name = profile.name.removesuffix(".yaml").removesuffix(".yml")
    return profile.parent / (name + suffix)  # works even for `.`, a folder without a name


def read_vendored(path: Path, within: Boundary) -> VendoredGraph | None:
    """Return the vendored graph in a file within a boundary; `None` if there is no file.

    Raises:
        VendoredGraphError: if the file is not a usable graph.
    """
    try:
        value = read_json(path, GRAPH, within)
        if value["schema"] != SCHEMA:
            raise VendoredGraphError("another version of devmap-config wrote it")
        if value.pop("digest") != digest(value):
            raise VendoredGraphError("it does not agree with its own digest: it was changed by hand, or is damaged")
        stated = {
            field.name: value[KEYS.get(field.name, field.name)]
            for field in fields(VendoredGraph)
            if field.name not in LEFT_OUT or field.name in value
        }
        workload = None if value["workload"] is None else WorkloadShape(**value["workload"])
        vendored = VendoredGraph(**{**stated, "graph": graph_from_json(value["graph"]), "workload": workload})
        _types().validate_python(vendored)
        _require_consistent(vendored.graph)
    except FileError as error:
        if error.is_absent:
            return None
        raise VendoredGraphError(f"it {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VendoredGraphError(f"it is damaged ({type(error).__name__})") from error
    return vendored


@cache
def _types() -> TypeAdapter[VendoredGraph]:
    return TypeAdapter(VendoredGraph)


def _require_consistent(graph: ModelGraph) -> None:
    """Refuse a graph with references to modules that it lacks, negative sizes, or impossible names.

    Raises:
        ValueError, VendoredGraphError: if it has any.
    """
    modules, tensors = list(graph.root.walk()), list(graph.root.tensors())
    named = {
        *(tensor.alias_of for tensor in tensors if tensor.alias_of is not None),
        *chain(*graph.ties),
        *graph.merged,
    }
    if not named <= graph.tensors.keys() or not set(_measured_paths(graph)) <= graph.modules.keys():
        raise ValueError("it names what is not there")
    if len(modules) != len(graph.modules) or len(tensors) != len(graph.tensors):
        raise ValueError("two of its parts have one name")
    if any(min(tensor.size_bytes, tensor.planner_bytes, tensor.offloaded_bytes or 0) < 0 for tensor in tensors):
        raise ValueError("a size is below nothing")
    if any(NO_NAME.search(name) or not name.isprintable() for name in (*graph.modules, *graph.tensors)):
        raise VendoredGraphError("it names modules as none is called")


def _measured_paths(graph: ModelGraph) -> Iterator[str]:
    if graph.measurement is not None:
        yield from (cost.path for cost in graph.measurement.modules)
        yield from (path for crossing in graph.measurement.crossings for path in (crossing.reader, crossing.maker))
        yield from chain(*graph.measurement.bonds)
