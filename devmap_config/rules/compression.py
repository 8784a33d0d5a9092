"""Finds the fewest patterns that give every tensor its device: defaults for subtrees, and exceptions below them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from devmap_config.graph.model import Module
from devmap_config.rules.folding import ranges
from devmap_config.rules.matching import children_of
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph, Tensor, TensorName

Node: TypeAlias = "Module | Tensor"
Segment: TypeAlias = "str | tuple[int, ...]"
"""A name, or the numbers of several children with the same rules."""
Rules: TypeAlias = "tuple[tuple[tuple[Segment, ...], Device], ...]"
"""Relative paths and their devices, in order of definition."""


def compress(graph: ModelGraph, homes: Mapping[TensorName, Device]) -> dict[str, Device]:
    """Return as few patterns as possible, with their devices; a deeper pattern outranks a shallower one.

    A default for the whole model is used only if everything is on one device.
    """
    search = _RuleCompression(homes)
    if len(search.devices(graph.root)) == 1:
        return {"": next(iter(search.devices(graph.root)))}
    fewest = search.below(graph.root, None)
    return {_pattern(segments): device for segments, device in fewest}


def _pattern(segments: tuple[Segment, ...]) -> str:
    return ".".join(segment if isinstance(segment, str) else ranges(segment) for segment in segments)


@dataclass
class _RuleCompression:
    """Dynamic programming over the tree: the fewest rules below a node, given what it inherits."""

    homes: Mapping[TensorName, Device]
    _devices: dict[str, tuple[Device, ...]] = field(default_factory=dict)
    _best: dict[tuple[str, Device | None], Rules] = field(default_factory=dict)

    def devices(self, node: Node) -> tuple[Device, ...]:
        """Return the devices of a node's tensors, in order of definition."""
        if not isinstance(node, Module):
            return (self.homes[node.name],)
        if node.path not in self._devices:
            below = [self.devices(child) for child in children_of(node).values()]
            self._devices[node.path] = tuple(dict.fromkeys(device for devices in below for device in devices))
        return self._devices[node.path]

    def best(self, node: Node, inherited: Device | None) -> Rules:
        """Return the fewest rules for a node and what is below it; their paths are relative to it."""
        devices = self.devices(node)
        if len(devices) <= 1:
            return () if devices in ((), (inherited,)) else (((), devices[0]),)
        assert isinstance(node, Module)  # noqa: S101 - a tensor has one device
        key = (node.path, inherited)
        if key not in self._best:
            ways = [self.below(node, inherited)]
            ways += [(((), device), *self.below(node, device)) for device in devices if device != inherited]
            self._best[key] = min(ways, key=len)  # the first of equally many, so that there is no needless default
        return self._best[key]

    def below(self, node: Node, inherited: Device | None) -> Rules:
        """Return the fewest rules for the children of a node; numbered children with the same rules share them."""
        entries: dict[tuple[Segment | None, tuple[Segment, ...], Device], list[int]] = {}
        for name, child in children_of(node).items():
            for rest, device in self.best(child, inherited):
                number = number_in(name)
                entries.setdefault((name if number is None else None, rest, device), []).extend(
                    [] if number is None else [number]
                )
        return tuple(
            ((tuple(numbers) if name is None else name, *rest), device)
            for (name, rest, device), numbers in entries.items()
        )
