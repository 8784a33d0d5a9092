"""The pieces of a model: modules whose streamed weights are copied to their device at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.units import united
from devmap_config.graph.model import ModulePath

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Location
    from devmap_config.execution.executor import Executor
    from devmap_config.graph.model import ModelGraph, Module, TensorName


def pieces_of(graph: ModelGraph, executor: Executor, main_device: Device) -> list[tuple[Module, ...]]:
    """Return the modules that hold tensors, grouped into those that are copied together, in order of definition.

    If weights are copied ahead to an accelerator, a module with parameters is copied with everything within it, which
    runs while the module does. Modules that share a parameter are copied together, so that it is copied only once.
    """
    together = [[path] for path, module in graph.modules.items() if module.own_tensors]
    if executor.works_ahead and main_device.is_accelerator:
        together += [_holding(module) for module in _outermost(graph)]
        in_blocks = {path for block in graph.blocks for path in _holding(graph.modules[block])}
        for names in graph.tied_groups:
            together.append([path for path in map(_module_of, names) if path in in_blocks])
    return [tuple(graph.modules[path] for path in paths) for paths in united(filter(None, together))]


def copied_bytes(
    graph: ModelGraph,
    piece: Iterable[Module],
    homes: Mapping[TensorName, Location],
    executor: Executor,
    main_device: Device,
) -> dict[Device, int]:
    """Return the bytes of a piece that are copied to each device; shared tensors count once.

    Weights that are read ahead for an accelerator pass through the CPU's memory.
    """
    sizes: dict[Device, dict[TensorName, int]] = {}
    for tensor in (tensor for module in piece for tensor in module.own_tensors if tensor.name in homes):
        location = homes[tensor.name]
        if executor.is_copied_in(tensor, location):
            held_bytes = executor.held_bytes(tensor, location, main_device)
            through = (CPU,) if executor.is_read_ahead_for_a_card(location) else ()
            for device in (location.runs_on, *through):
                sizes.setdefault(device, {})[graph.storage_of[tensor.name]] = held_bytes
    return {device: sum(by_storage.values()) for device, by_storage in sizes.items()}


def pieces_ahead(
    graph: ModelGraph, homes: Mapping[TensorName, Location], executor: Executor, main_device: Device
) -> tuple[tuple[ModulePath, ...], ...]:
    """Return the modules of each piece that is copied ahead, in the order in which they run, if it is known."""
    measured = () if graph.measurement is None else graph.measurement.modules
    position = {cost.path: place for place, cost in enumerate(measured)}

    def key(path: ModulePath) -> int:
        return position.get(path, len(position))

    def is_ahead(module: Module) -> bool:
        copied = [tensor for tensor in module.own_tensors if executor.is_copied_in(tensor, homes[tensor.name])]
        return bool(copied) and all(executor.is_brought_ahead(homes[tensor.name]) for tensor in copied)

    pieces = (
        [module.path for module in piece if is_ahead(module)] for piece in pieces_of(graph, executor, main_device)
    )
    ordered = (tuple(sorted(paths, key=key)) for paths in pieces if paths)
    return tuple(sorted(ordered, key=lambda paths: key(paths[0])))


def _outermost(graph: ModelGraph) -> list[Module]:
    """Return the outermost modules with parameters within blocks, or the blocks themselves."""
    outermost: list[Module] = []

    def visit(module: Module) -> None:
        if any(not tensor.is_held_in_buffer for tensor in module.own_tensors):
            outermost.append(module)
        else:
            for child in module.children:
                visit(child)

    for path in graph.blocks:
        visit(graph.modules[path])
    return outermost


def _holding(module: Module) -> list[ModulePath]:
    return [inner.path for inner in module.walk() if inner.own_tensors]


def _module_of(name: TensorName) -> ModulePath:
    return ModulePath(name.rpartition(".")[0])
