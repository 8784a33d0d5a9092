"""Converts a `ModelGraph` to one compact JSON value, for the cache and for files beside a profile."""

from __future__ import annotations

from typing import Any

from devmap_config.graph.costs import Measurement
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName

SCHEMA = "devmap-graph/6"
"""Changes whenever the format below changes."""


def graph_to_json(graph: ModelGraph) -> dict[str, Any]:
    """Return the graph as plain data, from which `graph_from_json` makes an equal one."""
    no_placement = graph.no_placement_parameters
    return {
        "schema": SCHEMA,
        "root": _module_to_json(graph.root),
        "ties": [list(tie) for tie in graph.ties],
        "no_split_classes": list(graph.no_split_classes),
        "no_placement_parameters": None if no_placement is None else list(no_placement),
        "skip_keys": list(graph.skip_keys),
        **({"merged": list(graph.merged)} if graph.merged else {}),
        **({} if graph.unread is None else {"unread": graph.unread}),
        "measurement": None if graph.measurement is None else graph.measurement.to_json(),
    }


def graph_from_json(value: dict[str, Any]) -> ModelGraph:
    """Return the graph that `graph_to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: if the value is not one.
    """
    if value["schema"] != SCHEMA:
        raise ValueError(f"unknown graph schema {value['schema']!r}")
    no_placement = value["no_placement_parameters"]
    return ModelGraph(
        root=_module_from_json(value["root"], ""),
        ties=tuple((TensorName(target), TensorName(source)) for target, source in value["ties"]),
        no_split_classes=tuple(value["no_split_classes"]),
        no_placement_parameters=None if no_placement is None else tuple(no_placement),
        skip_keys=tuple(value["skip_keys"]),
        merged=tuple(map(TensorName, value.get("merged", []))),
        unread=value.get("unread"),
        measurement=None if value["measurement"] is None else Measurement.from_json(value["measurement"]),
    )


def _module_to_json(module: Module) -> list[Any]:
    """Return `[last segment, class, parameters, buffers, children]`, which is short because there may be tens of
    thousands.
    """
    return [
        module.path.rpartition(".")[2],
        module.class_name,
        [_tensor_to_json(tensor) for tensor in module.parameters],
        [_tensor_to_json(tensor) for tensor in module.buffers],
        [_module_to_json(child) for child in module.children],
    ]


def _tensor_to_json(tensor: Tensor) -> list[Any]:
    of_quantizer = [tensor.in_buffer, tensor.offloaded_bytes]  # left out if empty, as for most models
    return [
        tensor.name.rpartition(".")[2],
        list(tensor.shape),
        tensor.dtype,
        tensor.size_bytes,
        tensor.planner_bytes,
        tensor.persistent,
        tensor.alias_of,
        *(of_quantizer if of_quantizer != [False, None] else ()),
    ]


def _module_from_json(value: list[Any], parent: str) -> Module:
    segment, class_name, parameters, buffers, children = value
    path = f"{parent}.{segment}" if parent else segment
    prefix = f"{path}." if path else ""

    def tensor(kind: Any, fields: list[Any]) -> Tensor:
        name, shape, dtype, size_bytes, planner_bytes, *rest = fields
        return Tensor(TensorName(prefix + name), tuple(shape), dtype, size_bytes, planner_bytes, kind, *rest)

    return Module(
        path=ModulePath(path),
        class_name=class_name,
        parameters=tuple(tensor("parameter", fields) for fields in parameters),
        buffers=tuple(tensor("buffer", fields) for fields in buffers),
        children=tuple(_module_from_json(child, path) for child in children),
    )
