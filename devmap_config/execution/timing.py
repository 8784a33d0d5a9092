"""Predicts the time of a forward: every block on its device, the copies before it, and transfers between devices.

The devices of a plan run one after another, so times add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from devmap_config.devices import CPU
from devmap_config.execution.segments import Copy, MachineRates, ModuleWork, Segment
from devmap_config.graph.costs import WORK
from devmap_config.graph.model import ModulePath
from devmap_config.hardware.constants import GENERATION_DISPATCHES, HOOK_DISPATCHES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Location
    from devmap_config.execution.executor import Executor
    from devmap_config.execution.segments import Phase, SegmentTime
    from devmap_config.graph.costs import Crossing, ModuleCost
    from devmap_config.graph.model import ModelGraph, Module, Tensor, TensorName
    from devmap_config.hardware.inventory import Inventory

KEYS_AND_VALUES = 2
"""The number of tensors in a layer of a cache, each copied separately."""

PREFILL_WORK = attrgetter(*(f"prefill_{figure}" for figure in WORK))
DECODE_WORK = attrgetter(*(f"decode_{figure}" for figure in WORK))


@dataclass(frozen=True)
class Timing:
    """The times of one phase on one machine, in nanoseconds, for the whole batch.

    `executor` runs the plan, with streamed modules on the `main_device`. A missing rate of a device or a link raises
    `MissingFigureError`.
    """

    graph: ModelGraph
    inventory: Inventory
    phase: Phase
    executor: Executor
    main_device: Device

    @property
    def least_nanoseconds(self) -> int:
        """A lower bound of a forward's time under any placement: every module at the highest rates of all devices."""
        steps = (ModuleWork(*self._work(cost)[:2]) for cost in self._costs.values())
        return max(sum(map(self.rates.least_nanoseconds, steps)), 1)

    def outside_nanoseconds(self, paths: Iterable[str]) -> int:
        """Return the time of everything outside of the placed blocks: these modules, and `generate` for each token."""
        return self.rates.nanoseconds(self.outside(paths))

    def outside(self, paths: Iterable[str]) -> Segment:
        """Return the amounts of everything outside of the placed blocks."""
        segment = Segment()
        segment.dispatches[self.main_device] = GENERATION_DISPATCHES if self.phase == "decode" else 0
        for path in paths:
            self._do(segment, path, self.main_device)
        return segment

    def _do(self, segment: Segment, path: str, device: Device, added_bytes: int = 0) -> None:
        """Add the work of a module without its children.

        `added_bytes` is the extra size of its weights on this device.
        """
        if self.graph.measurement is None:  # without it, only the reading of its weights is known
            module = self.graph.modules.get(ModulePath(path))
            weights_bytes = sum(tensor.size_bytes for tensor in module.parameters) if module is not None else 0
            segment.steps[device, ModuleWork(weights_bytes + added_bytes)] += 1
            return
        if (cost := self._costs.get(path)) is None:
            return
        touched_bytes, operations, attention_operations, launches, dispatches = self._work(cost)
        touched_bytes += added_bytes if launches else 0
        experts = self._experts(path)
        chosen_bytes = touched_bytes if self.phase == "decode" and experts else 0
        products = self._products(experts, operations)
        step = ModuleWork(
            touched_bytes - chosen_bytes, operations, attention_operations, launches, chosen_bytes, products
        )
        segment.steps[device, step] += 1
        segment.dispatches[device] += dispatches

    def _experts(self, path: str) -> tuple[Tensor, ...]:
        module = self.graph.modules.get(ModulePath(path))
        return () if module is None else module.experts

    def _products(self, experts: Sequence[Tensor], operations: int) -> int:
        """Return the number of products that a module starts on a CPU's threads: one, or one for each matrix of a
        chosen expert.

        It is 0 for the experts of a prompt, which run within one operation, so that no thread waits for Python.
        """
        if not experts:
            return int(operations > 0)
        if self.phase == "prefill":
            return 0
        count, elements = experts[0].shape[0], sum(tensor.element_count for tensor in experts)
        choices = operations * count // (2 * max(elements, 1))  # two operations for each weight of a chosen expert
        return len(experts) * min(count, choices)

    def crossing_nanoseconds(self, crossing: Crossing, maker: Device, reader: Device) -> int:
        """Return the time of a transfer between two blocks."""
        return self.rates.copy_nanoseconds(self.crossing(crossing, maker, reader))

    def crossing(self, crossing: Crossing, maker: Device, reader: Device) -> Copy:
        """Return the amounts of a transfer between two blocks."""
        prefills = self.phase == "prefill"
        size_bytes = crossing.prefill_bytes if prefills else crossing.decode_bytes
        return Copy(maker, reader, size_bytes, crossing.prefill_tensors if prefills else crossing.decode_tensors)

    def module_time(self, module: Module, homes: Mapping[TensorName, Location]) -> SegmentTime:
        """Return the time of a block with everything in it, including copies of streamed weights and of inputs to parts
        elsewhere.
        """
        return self.rates.time(self.module(module, homes))

    def module(self, module: Module, homes: Mapping[TensorName, Location]) -> Segment:
        """Return the amounts of a block with everything in it."""
        if self.phase == "prefill":
            homes = while_prefilled(module, homes, self.executor, self.main_device)
        home = home_of(homes[tensor.name].runs_on for tensor in module.tensors())
        segment = Segment()
        self._below(module, homes, home, segment)
        segment.dispatches[home] += HOOK_DISPATCHES * self._stream(module, homes, segment)
        return segment

    def _below(self, module: Module, homes: Mapping[TensorName, Location], around: Device, segment: Segment) -> None:
        running = {homes[tensor.name].runs_on for tensor in module.tensors()}
        here = next(iter(running)) if len(running) == 1 else around
        self._do(segment, module.path, here, self._added_bytes(module, homes))
        cost = self._costs.get(module.path)
        offloads = self.executor.offloads_cache(module.path)
        if cost is not None and cost.offloaded_bytes and here.is_accelerator and offloads:
            self._exchange_cache(cost, here, segment)
        if here != around and cost is not None:
            prefills = self.phase == "prefill"
            given, given_back = (
                (cost.prefill_input_bytes, cost.prefill_output_bytes)
                if prefills
                else (cost.decode_input_bytes, cost.decode_output_bytes)
            )
            segment.copies += (Copy(around, here, given), Copy(here, around, given_back))
        for child in module.children:
            self._below(child, homes, here, segment)

    def _exchange_cache(self, cost: ModuleCost, card: Device, segment: Segment) -> None:
        """Add the copies of an offloaded cache to the CPU, which the card waits for, and from the CPU.

        The copies from the CPU overlap with computing only on the first card, where transformers creates the stream for
        them.
        """
        if self.graph.measurement is None:
            return
        size_bytes = cost.exchanged_bytes(self.phase, self.graph.measurement.workload)
        segment.copies.append(Copy(card, CPU, size_bytes, KEYS_AND_VALUES, is_pinned=True))
        if self.phase == "decode":
            coming = Copy(CPU, card, size_bytes, KEYS_AND_VALUES, is_pinned=True)
            if card.index == 0:
                segment.ahead.append((coming,))
            else:
                segment.copies.append(coming)

    def _added_bytes(self, module: Module, homes: Mapping[TensorName, Location]) -> int:
        """Return the bytes by which the module's own weights are larger if a map offloads them."""
        return sum(
            self.executor.held_bytes(tensor, homes[tensor.name], self.main_device) - tensor.size_bytes
            for tensor in module.parameters
            if tensor.offloaded_bytes is not None
        )

    def _stream(self, module: Module, homes: Mapping[TensorName, Location], segment: Segment) -> int:
        """Add the copies that modules wait for and those ahead, and return the number of such modules. Weights of
        idle modules are not copied.
        """
        brought = 0
        ahead: dict[TensorName, tuple[Copy, ...]] = {}
        for inner in module.walk():
            if not self._runs(inner.path):
                continue
            brought += any(self.executor.is_copied_in(tensor, homes[tensor.name]) for tensor in inner.own_tensors)
            for tensor in inner.own_tensors:
                location = homes[tensor.name]
                if self.executor.is_copied_in(tensor, location):
                    copies = self._bringing(location, self.executor.held_bytes(tensor, location, self.main_device))
                    if not self.executor.is_brought_ahead(location):
                        segment.copies += copies
                    elif not (location.runs_on.is_accelerator and tensor.name in self._left_there):
                        ahead[self.graph.storage_of[tensor.name]] = copies
        segment.ahead += ahead.values()
        return brought

    def _bringing(self, location: Location, size_bytes: int) -> tuple[Copy, ...]:
        """Return the copies that bring weights to their device; reading ahead overlaps with copying."""
        source, target = location.stored_on, location.runs_on
        if not self.executor.is_read_ahead_for_a_card(location):
            return (Copy(source, target, size_bytes, is_pinned=self.executor.is_brought_ahead(location)),)
        return Copy(source, CPU, size_bytes), Copy(CPU, target, size_bytes, is_pinned=True)

    @cached_property
    def _left_there(self) -> frozenset[TensorName]:
        """The tensors that the last module shares with the first, which are still on the accelerator in the next
        forward.
        """
        modules, storage_of = self.graph.modules, self.graph.storage_of
        running = [modules[ModulePath(path)] for path in self._costs if path in modules and self._runs(path)]
        holding = [module for module in running if module.parameters]
        first = {storage_of[tensor.name] for module in holding[:1] for tensor in module.parameters}
        last = (tensor.name for module in holding[1:][-1:] for tensor in module.parameters)
        return frozenset(name for name in last if storage_of[name] in first)

    def _runs(self, path: str) -> bool:
        """Return whether a module runs in this phase; an encoder does not run in decoding."""
        if self.graph.measurement is None or not self.graph.measurement.measured:
            return True
        cost = self._costs.get(path)
        return cost is not None and self._work(cost)[3] > 0

    def _work(self, cost: ModuleCost) -> tuple[int, int, int, int, int]:
        """Return a module's work in this phase, in the order of `WORK`."""
        return PREFILL_WORK(cost) if self.phase == "prefill" else DECODE_WORK(cost)

    @cached_property
    def _costs(self) -> Mapping[str, ModuleCost]:
        measurement = self.graph.measurement
        return {} if measurement is None else measurement.by_path

    @cached_property
    def rates(self) -> MachineRates:
        """The times that amounts take on this machine in this phase."""
        return MachineRates(self.inventory, self.phase)


def while_prefilled(
    module: Module, homes: Mapping[TensorName, Location], executor: Executor, main_device: Device
) -> Mapping[TensorName, Location]:
    """Return the locations of a block's tensors during the prefill of a prompt of the planned length."""
    if not executor.prefilled_from:
        return homes
    locations = {homes[tensor.name] for tensor in module.tensors()}
    if len(locations) == 1:
        location = executor.prefill_location(module.path, next(iter(locations)), main_device)
        return homes if location in locations else {**homes, **{tensor.name: location for tensor in module.tensors()}}
    for child in module.children:
        homes = while_prefilled(child, homes, executor, main_device)
    return homes


def home_of(running: Iterable[Device]) -> Device:
    """Return the device of a block, given those of its parts: the first accelerator among them, else the first."""
    devices = list(dict.fromkeys(running))
    return next((device for device in devices if device.is_accelerator), devices[0] if devices else CPU)


def forward_nanoseconds(timing: Timing, homes: Mapping[TensorName, Location]) -> int:
    """Return the time of one forward of a whole plan.

    Raises:
        MissingFigureError: if a rate that the plan depends on is unknown.
    """
    return timing.rates.nanoseconds(*forward_segments(timing, homes))


class ForwardPart(NamedTuple):
    """A part of a forward: a block, a transfer to one, or work outside of every block.

    `path` is the block, or the one that a transfer goes to; `""` outside. `home` is the device that the part ends on.
    """

    path: str
    home: Device
    segment: Segment
    is_crossing: bool = False


def forward_segments(timing: Timing, homes: Mapping[TensorName, Location]) -> Iterator[Segment]:
    """Yield the amounts of one forward of a whole plan, in order."""
    return (part.segment for part in forward_parts(timing, homes))


def forward_parts(timing: Timing, homes: Mapping[TensorName, Location]) -> Iterator[ForwardPart]:
    """Yield the parts of one forward in order: blocks, work outside of them, and transfers."""
    graph, main_device = timing.graph, timing.main_device
    block_homes = homes_of_blocks(graph, homes)
    for path in execution_order(graph):
        if path in block_homes:
            yield ForwardPart(path, block_homes[path], timing.module(graph.modules[path], homes))
    yield ForwardPart("", main_device, timing.outside(outside_of(graph)))
    for crossing in crossings(graph):
        maker, reader = (block_homes.get(ModulePath(path), main_device) for path in (crossing.maker, crossing.reader))
        if maker != reader:
            segment = Segment(copies=[timing.crossing(crossing, maker, reader)])
            yield ForwardPart(crossing.reader, reader, segment, is_crossing=True)


def outside_of(graph: ModelGraph) -> Iterator[str]:
    """Yield the modules outside of every block with tensors, which run on the main device."""
    yield from graph.composites
    for path in graph.blocks:
        if not any(True for _ in graph.modules[path].tensors()):
            yield from (inner.path for inner in graph.modules[path].walk())


def hops(graph: ModelGraph, homes: Mapping[TensorName, Location]) -> int:
    """Return the number of transfers of activations: between blocks, and to a part of a block and back."""
    block_homes = homes_of_blocks(graph, homes)
    along = [block_homes[path] for path in execution_order(graph) if path in block_homes and has_weights(graph, path)]
    count = len([after for before, after in pairwise(along) if before != after])
    for block, home in block_homes.items():
        count += 2 * _parts_elsewhere(graph.modules[block], homes, home)
    return count


def execution_order(graph: ModelGraph) -> list[ModulePath]:
    """Return the blocks in the order in which they first run; blocks that do not run keep their place of definition."""
    measurement = graph.measurement
    if measurement is None:
        return list(graph.blocks)
    first_run = {cost.path: place for place, cost in enumerate(measurement.modules)}
    running = sorted((path for path in graph.blocks if path in first_run), key=lambda path: first_run[path])
    position = {path: place for place, path in enumerate(graph.blocks)}
    ordered: list[ModulePath] = []
    idle = [path for path in graph.blocks if path not in first_run]
    for path in running:
        while idle and position[idle[0]] < position[path]:
            ordered.append(idle.pop(0))
        ordered.append(path)
    return [*ordered, *idle]


def has_weights(graph: ModelGraph, path: ModulePath) -> bool:
    """Return whether a block has parameters, rather than only buffers."""
    return any(tensor.kind == "parameter" for tensor in graph.modules[path].tensors())


def _parts_elsewhere(module: Module, homes: Mapping[TensorName, Location], around: Device) -> int:
    running = {homes[tensor.name].runs_on for tensor in module.tensors()}
    if not running:
        return 0
    here = next(iter(running)) if len(running) == 1 else around
    return int(here != around) + sum(_parts_elsewhere(child, homes, here) for child in module.children)


def homes_of_blocks(graph: ModelGraph, homes: Mapping[TensorName, Location]) -> dict[ModulePath, Device]:
    """Return the device on which each block runs, for blocks with tensors."""
    homes_by_block: dict[ModulePath, Device] = {}
    for path in graph.blocks:
        running = [homes[tensor.name].runs_on for tensor in graph.modules[path].tensors()]
        if running:
            homes_by_block[path] = home_of(running)
    return homes_by_block


def crossings(graph: ModelGraph) -> Iterator[Crossing]:
    """Yield the tensors that pass between blocks, if they were measured."""
    if graph.measurement is not None:
        yield from graph.measurement.crossings
