"""Turns a `device_map` into a device for every tensor, and reports differences from what transformers does with the
map.

The effects of a map were observed with transformers 5.24 and accelerate 1.15, and tests compare them. accelerate
refuses a map with several devices unless its keys cover every tensor that a checkpoint may hold. Other tensors that no
key covers stay on the CPU, and no hook copies them to the device that uses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.profile.document import whole_file
from devmap_config.rules.folding import fold_paths
from devmap_config.rules.map_reading import read_as_transformers
from devmap_config.rules.matching import match
from devmap_config.rules.pattern import PatternError, parse_pattern
from devmap_config.rules.suggestion import nearest_to

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.graph.model import ModelGraph, Module, TensorName
    from devmap_config.rules.map_reading import MapReading
    from devmap_config.rules.written_map import MapEntry

NUMBER = re.compile(r"\d+")

MOST_EXPLAINED = 100
"""The most unknown keys for which the nearest name is searched, as a search takes a millisecond and no more are
shown.
"""


def adopted_homes(
    entries: Mapping[str, MapEntry], graph: ModelGraph, file: str, sink: Sink
) -> dict[TensorName, Device]:
    """Return the device of every tensor under a map.

    Args:
        entries: the map by its keys.
        graph: the model.
        file: where the map comes from.
        sink: takes the diagnostics: errors of transformers, and deviations from the map.

    Returns:
        The devices; empty if transformers refuses the map, or fails on it.
    """
    adoption = _Adoption(entries, graph, whole_file(file), sink)
    adoption.report_fatal_keys()
    if adoption.reading.fatal:
        return {}
    adoption.report_unknown_keys()
    homes = {name: entries[key].device for name, key in adoption.reading.taken_by.items()}
    homes |= adoption.homes_of_left_out(homes)
    if sink.has_errors:
        return {}
    homes |= adoption.homes_of_torn(homes)
    return {name: homes[name] for name in graph.tensors}


@dataclass(frozen=True)
class _Adoption:
    entries: Mapping[str, MapEntry]
    graph: ModelGraph
    file: Span
    sink: Sink

    @cached_property
    def reading(self) -> MapReading:
        return read_as_transformers(self.entries.keys(), self.graph)

    @property
    def is_dispatched(self) -> bool:
        """True if accelerate gets the map, checks it and attaches hooks."""
        values = {entry.value for entry in self.entries.values()}
        return len(values) > 1 or DISK.kind in values

    @cached_property
    def main_device(self) -> Device:
        return min((entry.device for entry in self.entries.values() if entry.device.is_accelerator), default=CPU)

    def report_fatal_keys(self) -> None:
        for key in self.reading.fatal:
            self.sink.error(
                "misread-map",
                f"transformers fails at the key `{key}`, which it reads as a regular expression",
                self.entries[key].span,
                help="name each module; patterns are for the `device_map` of a profile with `strategy: manual`",
            )

    def report_unknown_keys(self) -> None:
        alike: dict[str, list[str]] = {}
        for key in self.reading.unknown:
            alike.setdefault(NUMBER.sub("0", key), []).append(key)
        for number, keys in enumerate(alike.values()):
            self.sink.warning(
                "ignored-key",
                f"{self.graph.class_name} has no {_quoted(fold_paths(keys))}: transformers ignores such keys",
                self.entries[keys[0]].span,
                label=self._nearest(keys[0]) if number < MOST_EXPLAINED else None,
                help="the profile leaves it out; correct the name if it was meant to place something",
            )

    def _nearest(self, key: str) -> str | None:
        try:
            pattern = parse_pattern(key)
            failure = match(pattern, self.graph).failure
        except PatternError:
            return None
        return nearest_to(pattern, failure, self.graph).label

    def homes_of_left_out(self, homes: Mapping[TensorName, Device]) -> dict[TensorName, Device]:
        """Report tensors that no key names, and return a device for those that get none from the map."""
        stored = [name for name in self.reading.left_out if self.graph.tensors[name].persistent]
        buffers = [name for name in self.reading.left_out if not self.graph.tensors[name].persistent]
        if self.is_dispatched and self.graph.no_placement_parameters is None:
            self._report_refused(stored)
        else:
            self._report_alone([name for name in stored if not self._follows_tie(name, homes)], homes)
        self._report_buffers(buffers, homes)
        return {name: self.main_device for name in self.graph.tensors if name not in homes}

    def _follows_tie(self, name: TensorName, homes: Mapping[TensorName, Device]) -> bool:
        """Return whether a tensor is tied to another that has a device."""
        return any(name in group and any(other in homes for other in group) for group in self.graph.tied_groups)

    def _report_refused(self, names: Collection[TensorName]) -> None:
        for key, modules in self._modules_by_key(names):
            taken = (
                f"; while loading, `{key}` takes it, as transformers compares only the beginning of names"
                if key
                else ""
            )
            self.sink.error(
                "uncovered-tensor",
                f"no key names {_quoted(modules)}: transformers refuses to load by this map{taken}",
                self.entries[key].span if key else self.file,
                help=f'add `"{modules[0]}": …` with its device to the map',
            )

    def _report_alone(self, names: Collection[TensorName], homes: Mapping[TensorName, Device]) -> None:
        """Report the mistakes of a map with one device, which accelerate does not check."""
        for key, modules in self._modules_by_key(names):
            if key:
                what = f"transformers puts it where `{key}` is, as it compares only the beginning of names"
            elif self.main_device == CPU:
                continue
            else:
                what = "transformers leaves it on the CPU, without hooks, and fails at the forward"
            self.sink.warning(
                "uncovered-tensor",
                f"no key names {_quoted(modules)}: {what}",
                self.entries[key].span if key else self.file,
                help=f"the profile has it on {self.main_device}",
            )

    def _report_buffers(self, names: Collection[TensorName], homes: Mapping[TensorName, Device]) -> None:
        for key, modules in self._modules_by_key(names):
            if key or self.main_device == CPU:
                continue
            self.sink.warning(
                "uncovered-tensor",
                f"no key names {_quoted(modules)}, which no checkpoint holds: transformers leaves it on the CPU, and"
                " fails at the forward unless the model's own code copies it to where it is used",
                self.file,
                help=f'the profile has it on {self.main_device}; in the map, add `"{modules[0]}": '
                f"{self.main_device.in_device_map}`",
            )

    def _modules_by_key(self, names: Collection[TensorName]) -> Iterator[tuple[str | None, tuple[str, ...]]]:
        """Yield the modules or tensors that hold exactly these tensors, by the key that matches them by accident."""
        selected = set(names)
        alike: dict[str | None, list[str]] = {}
        for path, first in _holding(self.graph.root, selected):
            alike.setdefault(self.reading.taken_by.get(first), []).append(path)
        yield from ((key, fold_paths(paths)) for key, paths in alike.items())

    def homes_of_torn(self, homes: Mapping[TensorName, Device]) -> dict[TensorName, Device]:
        """Report tied tensors that the map puts on several devices, and return the one device to use for each."""
        together: dict[TensorName, Device] = {}
        for group in self.graph.tied_groups:
            devices = list(dict.fromkeys(homes[name] for name in group))
            accelerators = [device for device in devices if device.is_accelerator]
            together |= dict.fromkeys(group, (accelerators or devices)[0])
            if len(devices) > 1:
                self._report_torn(group, homes, fails=len(accelerators) > 1, device=together[group[0]])
        return together

    def _report_torn(
        self, group: tuple[TensorName, ...], homes: Mapping[TensorName, Device], *, fails: bool, device: Device
    ) -> None:
        other = next(name for name in group if homes[name] != homes[group[0]])
        what = "plain transformers fails at the forward" if fails else f"transformers has both on {device}"
        key = self.reading.taken_by.get(other)
        self.sink.warning(
            "split-tie",
            f"the map has `{group[0]}` on {homes[group[0]]} and `{other}` on {homes[other]}, but they are one tensor:"
            f" {what}",
            self.file if key is None else self.entries[key].span,
            help=f"the profile has both on {device}; give them one device in the map",
        )


def _holding(module: Module, wanted: Collection[TensorName]) -> Iterator[tuple[str, TensorName]]:
    """Yield the outermost modules all of whose tensors are selected, and the other selected tensors, each with its
    first tensor.
    """
    names = [tensor.name for tensor in module.tensors()]
    if names and module.path and all(name in wanted for name in names):
        yield module.path, names[0]
        return
    yield from ((tensor.name, tensor.name) for tensor in module.own_tensors if tensor.name in wanted)
    for child in module.children:
        yield from _holding(child, wanted)


def _quoted(patterns: Collection[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)
