"""Folds the devices of tensors into units: the modules and tensors that a plan names, one on each line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from devmap_config.graph.model import ModelGraph, Module, TensorName

Home = TypeVar("Home")
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, slots=True)
class Unit:
    """A module path or tensor name that is placed as a whole, with the tensors it holds."""

    name: str
    tensors: tuple[TensorName, ...]


def united(groups: Iterable[Sequence[Name]]) -> list[list[Name]]:
    """Join overlapping groups; each item is in one group of the result, in order of first appearance.

    >>> united([("a",), ("b",), ("c",), ("a", "c")])
    [['a', 'c'], ['b']]
    """
    leader: dict[Name, Name] = {}

    def find(name: Name) -> Name:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for group in groups:
        for name in group:
            leader[find(name)] = find(group[0])
    members: dict[Name, list[Name]] = {}
    for name in leader:
        members.setdefault(find(name), []).append(name)
    return list(members.values())


def fold(graph: ModelGraph, homes: Mapping[TensorName, Home]) -> tuple[tuple[Unit, Home], ...]:
    """Return the coarsest units whose tensors all have one home, in order of definition.

    A unit is a no-split block, or a module that contains neither such a block nor a list of modules; if its tensors
    have several homes, its parts are units. No unit lies within another, and together they hold every tensor.
    """

    def units(module: Module) -> Iterator[tuple[Unit, Home]]:
        tensors = tuple(tensor.name for tensor in module.tensors())
        if not tensors:
            return
        distinct = list(dict.fromkeys(homes[name] for name in tensors))
        if len(distinct) == 1 and module.path not in graph.composites:
            yield Unit(module.path, tensors), distinct[0]
            return
        for tensor in module.own_tensors:
            yield Unit(tensor.name, (tensor.name,)), homes[tensor.name]
        for child in module.children:
            yield from units(child)

    return tuple(units(graph.root))


def whole_model(graph: ModelGraph, homes: Mapping[TensorName, Home]) -> tuple[tuple[Unit, Home], ...]:
    """Return one unit for everything if everything has one home, else the usual units."""
    if len(set(homes.values())) > 1:
        return fold(graph, homes)
    return ((Unit("", tuple(graph.tensors)), next(iter(homes.values()))),)
