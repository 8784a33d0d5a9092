"""What a forward takes: every block on the device that it runs on, what is copied there first, and what crosses.

The devices of a plan run one after another, so times add up. The host gives a device its work, operation by operation,
at a pace of its own: an accelerator works meanwhile, so that a block takes the longer of the two there; a CPU does one
after the other. On an accelerator a module takes the longer of reading what it touches and computing what it computes,
at the rates that the machine reaches, and so long besides for every kernel; on a CPU these add up, too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

from devmap_config.devices import CPU, DISK
from devmap_config.graph.costs import WORK
from devmap_config.graph.model import ModulePath
from devmap_config.hardware.constants import (
    CPU_DECODE_ATTENTION,
    CPU_PREFILL_ATTENTION,
    GENERATION_DISPATCHES,
    HOOK_DISPATCHES,
    KERNEL_NANOSECONDS,
)
from devmap_config.hardware.inventory import NANOSECONDS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from fractions import Fraction

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Location
    from devmap_config.execution.executor import Executor
    from devmap_config.graph.costs import Crossing, ModuleCost
    from devmap_config.graph.model import ModelGraph, Module, TensorName
    from devmap_config.hardware.inventory import Inventory, InventoryDevice, Link

Phase = Literal["prefill", "decode"]

PREFILL_WORK = attrgetter(*(f"prefill_{figure}" for figure in WORK))
DECODE_WORK = attrgetter(*(f"decode_{figure}" for figure in WORK))


class MissingFigureError(Exception):
    """The machine's description does not say how fast something is; the text is what it would have to name."""


@dataclass
class _Spent:
    """By device, how many nanoseconds it works, and what the host dispatches to it; what copies between them take."""

    working: Counter[Device] = field(default_factory=Counter)
    dispatches: Counter[Device] = field(default_factory=Counter)
    crossing: int = 0

    @property
    def devices(self) -> dict[Device, None]:
        return dict.fromkeys([*self.working, *self.dispatches])


class _Rates(NamedTuple):
    """What a device reaches in a second, in bytes read and operations computed, as far as the machine says."""

    reading: int | None = None
    computing: int | None = None
    attention: int | None = None
    experts: int | None = None

    @classmethod
    def reached(cls, device: InventoryDevice, phase: Phase) -> _Rates:
        decoding, prefilling = device.decode_attention_per_second, device.prefill_attention_per_second
        return cls(
            reading=_reached(device.bandwidth_bytes_per_second, device.memory_efficiency),
            computing=_reached(device.flops_per_second, device.compute_efficiency),
            attention=_reached(prefilling if phase == "prefill" else decoding, device.compute_efficiency),
            experts=_reached(device.experts_bytes_per_second, device.memory_efficiency),
        )


@dataclass(frozen=True)
class Timing:
    """Times of one phase on one machine. Every figure is in nanoseconds, of the whole batch.

    `executor` runs it, what is streamed on the `main_device`. What a device or a link would have to say for that and
    does not is a `MissingFigureError`.
    """

    graph: ModelGraph
    inventory: Inventory
    phase: Phase
    executor: Executor
    main_device: Device

    @property
    def least_nanoseconds(self) -> int:
        """What a forward takes at least, wherever its modules are: each at the highest rates of all devices."""
        fastest_reading, fastest_computing = (
            max(filter(None, rates), default=None) for rates in zip(*self._rates.values(), strict=True)
        )
        total = 0
        for cost in self._costs.values():
            touched_bytes, operations = self._work(cost)[:2]
            reading = touched_bytes * NANOSECONDS_PER_SECOND // fastest_reading if fastest_reading else 0
            computing = operations * NANOSECONDS_PER_SECOND // fastest_computing if fastest_computing else 0
            total += max(reading, computing)
        return max(total, 1)

    def outside_nanoseconds(self, paths: Iterable[str]) -> int:
        """What is done outside of every block that is placed: by these modules, and by `generate` for each token."""
        dispatches = GENERATION_DISPATCHES if self.phase == "decode" else 0
        working = 0
        for path in paths:
            here, given = self._own(path, self.main_device)
            working, dispatches = working + here, dispatches + given
        return self._elapsed(self.main_device, working, dispatches)

    def _own(self, path: str, device: Device, added_bytes: int = 0) -> tuple[int, int]:
        """What a module does itself, without its children: how long it works there, and what the host dispatches.

        `added_bytes` are those by which its weights are larger there than usual.
        """
        if self.graph.measurement is None:  # then what is known is that its weights are read
            module = self.graph.modules.get(ModulePath(path))
            weights_bytes = sum(tensor.size_bytes for tensor in module.parameters) if module is not None else 0
            return self.work_nanoseconds(weights_bytes + added_bytes, 0, device), 0
        if (cost := self._costs.get(path)) is None:
            return 0, 0
        touched_bytes, operations, attention_operations, launches, dispatches = self._work(cost)
        touched_bytes += added_bytes if launches else 0
        if self.phase == "decode" and self._holds_experts(path):
            touched_bytes = self._as_other_weights(touched_bytes, device)
        launching = launches * KERNEL_NANOSECONDS if device.is_accelerator else 0
        return self.work_nanoseconds(touched_bytes, operations, device, attention_operations) + launching, dispatches

    def _as_other_weights(self, experts_bytes: int, device: Device) -> int:
        """As many bytes of other weights as take as long to read as so many of experts."""
        rates = self._rates_of(device)
        return experts_bytes * rates.reading // rates.experts if rates.reading and rates.experts else experts_bytes

    def _holds_experts(self, path: str) -> bool:
        module = self.graph.modules.get(ModulePath(path))
        return module is not None and bool(module.experts)

    def work_nanoseconds(
        self, touched_bytes: int, operations: int, device: Device, attention_operations: int = 0
    ) -> int:
        """What it takes to read so much and to compute so much, attention among it."""
        reading = computing = 0
        if touched_bytes:
            reading = touched_bytes * NANOSECONDS_PER_SECOND // self._bytes_per_second(device)
        if attention_operations and (rate := self._rates_of(device).attention) is not None:
            operations -= attention_operations
            computing = attention_operations * NANOSECONDS_PER_SECOND // rate
        elif not device.is_accelerator:
            more = CPU_PREFILL_ATTENTION if self.phase == "prefill" else CPU_DECODE_ATTENTION
            operations += attention_operations * (more - 1)
        if operations and (rate := self._operations_per_second(device)) is not None:
            computing += operations * NANOSECONDS_PER_SECOND // rate
        return max(reading, computing) if device.is_accelerator else reading + computing

    def _elapsed(self, device: Device, working: int, dispatches: int) -> int:
        """How long it takes that a device works so long, in nanoseconds, which the host is to dispatch to it."""
        dispatching = dispatches * self.inventory.dispatch_nanoseconds
        return max(working, dispatching) if device.is_accelerator else working + dispatching

    def copy_nanoseconds(
        self, source: Device, target: Device, size_bytes: int, copies: int = 1, *, is_pinned: bool = False
    ) -> int:
        """What it takes to bring so much from one device to another."""
        if source == target or not copies:
            return 0
        return self._link(source, target).nanoseconds(size_bytes, copies, is_pinned=is_pinned)

    def crossing_nanoseconds(self, crossing: Crossing, maker: Device, reader: Device) -> int:
        """What it takes to give a block what another made."""
        prefills = self.phase == "prefill"
        size_bytes = crossing.prefill_bytes if prefills else crossing.decode_bytes
        tensors = crossing.prefill_tensors if prefills else crossing.decode_tensors
        return self.copy_nanoseconds(maker, reader, size_bytes, tensors)

    def module_nanoseconds(self, module: Module, homes: Mapping[TensorName, Location]) -> int:
        """A block with all within: what is stored elsewhere is copied in, what runs elsewhere is given its tensors."""
        if self.phase == "prefill":
            homes = while_prefilled(module, homes, self.executor, self.main_device)
        home = home_of(homes[tensor.name].runs_on for tensor in module.tensors())
        spent = _Spent()
        self._below(module, homes, home, spent)
        waiting, ahead, brought = self._streaming_nanoseconds(module, homes)
        spent.dispatches[home] += brought * HOOK_DISPATCHES
        running = sum(
            self._elapsed(device, spent.working[device], spent.dispatches[device]) for device in spent.devices
        )
        return max(running + spent.crossing + waiting, ahead)

    def _below(self, module: Module, homes: Mapping[TensorName, Location], around: Device, spent: _Spent) -> None:
        running = {homes[tensor.name].runs_on for tensor in module.tensors()}
        here = next(iter(running)) if len(running) == 1 else around
        working, dispatches = self._own(module.path, here, self._added_bytes(module, homes))
        spent.working[here] += working
        spent.dispatches[here] += dispatches
        cost = self._costs.get(module.path)
        if here != around and cost is not None:
            prefills = self.phase == "prefill"
            given, given_back = (
                (cost.prefill_input_bytes, cost.prefill_output_bytes)
                if prefills
                else (cost.decode_input_bytes, cost.decode_output_bytes)
            )
            spent.crossing += self.copy_nanoseconds(around, here, given)
            spent.crossing += self.copy_nanoseconds(here, around, given_back)
        for child in module.children:
            self._below(child, homes, here, spent)

    def _added_bytes(self, module: Module, homes: Mapping[TensorName, Location]) -> int:
        """By how much the module's own weights are larger where a map offloads them than elsewhere."""
        return sum(
            self.executor.held_bytes(tensor, homes[tensor.name], self.main_device) - tensor.size_bytes
            for tensor in module.parameters
            if tensor.offloaded_bytes is not None
        )

    def _streaming_nanoseconds(self, module: Module, homes: Mapping[TensorName, Location]) -> tuple[int, int, int]:
        """What is copied while modules of a block wait, what ahead of them, and for how many. What is idle stays."""
        waiting = brought = 0
        ahead: dict[TensorName, int] = {}
        for each in module.walk():
            if not self._runs(each.path):
                continue
            brought += any(self.executor.is_copied_in(tensor, homes[tensor.name]) for tensor in each.own_tensors)
            for tensor in each.own_tensors:
                location = homes[tensor.name]
                if self.executor.is_copied_in(tensor, location):
                    size_bytes = self.executor.held_bytes(tensor, location, self.main_device)
                    is_ahead = self.executor.is_brought_ahead(location)
                    nanoseconds = self._bringing_nanoseconds(location, size_bytes)
                    if not is_ahead:
                        waiting += nanoseconds
                    elif not (location.runs_on.is_accelerator and tensor.name in self._left_there):
                        ahead[self.graph.storage_of[tensor.name]] = nanoseconds
        return waiting, sum(ahead.values()), brought

    def _bringing_nanoseconds(self, location: Location, size_bytes: int) -> int:
        """What it takes to bring so much to where it runs; what is read ahead is read while what was read is copied."""
        source, target = location.stored_on, location.runs_on
        is_ahead = self.executor.is_brought_ahead(location)
        if not self.executor.is_read_ahead_for_a_card(location):
            return self.copy_nanoseconds(source, target, size_bytes, is_pinned=is_ahead)
        copying = self.copy_nanoseconds(CPU, target, size_bytes, is_pinned=True)
        return max(self.copy_nanoseconds(source, CPU, size_bytes), copying)

    @cached_property
    def _left_there(self) -> frozenset[TensorName]:
        """What the module that runs last shares with the first: on an accelerator, the next forward finds it there."""
        modules, storage_of = self.graph.modules, self.graph.storage_of
        running = [modules[ModulePath(path)] for path in self._costs if path in modules and self._runs(path)]
        holding = [module for module in running if module.parameters]
        first = {storage_of[tensor.name] for module in holding[:1] for tensor in module.parameters}
        last = (tensor.name for module in holding[1:][-1:] for tensor in module.parameters)
        return frozenset(name for name in last if storage_of[name] in first)

    def _runs(self, path: str) -> bool:
        """Whether a module runs in this phase: an encoder does not while its decoder goes on."""
        if self.graph.measurement is None or not self.graph.measurement.measured:
            return True
        cost = self._costs.get(path)
        return cost is not None and self._work(cost)[3] > 0

    def _work(self, cost: ModuleCost) -> tuple[int, int, int, int, int]:
        """What it does in this phase, in the order of `WORK`."""
        return PREFILL_WORK(cost) if self.phase == "prefill" else DECODE_WORK(cost)

    @cached_property
    def _costs(self) -> Mapping[str, ModuleCost]:
        measurement = self.graph.measurement
        return {} if measurement is None else measurement.by_path

    def _bytes_per_second(self, device: Device) -> int:
        rate = self._rates_of(device).reading
        if rate is None:
            raise MissingFigureError(f"the `bandwidth` of {device}")
        return rate

    def _operations_per_second(self, device: Device) -> int | None:
        rate = self._rates_of(device).computing
        if rate is None and self.phase == "prefill":
            raise MissingFigureError(f"the `flops` of {device}")
        return rate  # without it, one token is bound by what is read

    def _rates_of(self, device: Device) -> _Rates:
        return self._rates.get(device, _Rates())

    @cached_property
    def _rates(self) -> Mapping[Device, _Rates]:
        return {device.id: _Rates.reached(device, self.phase) for device in self.inventory.devices}

    def _link(self, source: Device, target: Device) -> Link:
        link = self.inventory.links.get((source, target))
        if link is None:
            kind = "peer" if source.is_accelerator and target.is_accelerator else "host"
            missing = "the `bandwidth` of disk" if {source, target} == {CPU, DISK} else f"`links: {{{kind}: …}}`"
            raise MissingFigureError(missing)
        return link


def _reached(rate: int | None, efficiency: Fraction) -> int | None:
    reached = 0 if rate is None else int(rate * efficiency)
    return reached or None


def while_prefilled(
    module: Module, homes: Mapping[TensorName, Location], executor: Executor, main_device: Device
) -> Mapping[TensorName, Location]:
    """Return where the tensors of a block are stored and run while a prompt is prefilled that is as long as planned."""
    if not executor.prefilled_from:
        return homes
    locations = {homes[tensor.name] for tensor in module.tensors()}
    if len(locations) == 1:
        location = executor.prefill_location(module.path, next(iter(locations)), main_device)
        return homes if location in locations else {**homes, **{each.name: location for each in module.tensors()}}
    for child in module.children:
        homes = while_prefilled(child, homes, executor, main_device)
    return homes


def home_of(running: Iterable[Device]) -> Device:
    """Where a block runs whose parts run here: on the first accelerator among them, else on the first of them."""
    devices = list(dict.fromkeys(running))
    return next((device for device in devices if device.is_accelerator), devices[0] if devices else CPU)


def forward_nanoseconds(timing: Timing, homes: Mapping[TensorName, Location]) -> int:
    """What one forward of a whole plan takes.

    Raises:
        MissingFigureError: where the machine does not say how fast something is that the plan uses.
    """
    graph, main_device = timing.graph, timing.main_device
    block_homes = homes_of_blocks(graph, homes)
    placed = [path for path in graph.blocks if path in block_homes]
    total = sum(timing.module_nanoseconds(graph.modules[path], homes) for path in placed)
    total += timing.outside_nanoseconds(outside_of(graph))
    for crossing in crossings(graph):
        maker, reader = (block_homes.get(ModulePath(path), main_device) for path in (crossing.maker, crossing.reader))
        total += timing.crossing_nanoseconds(crossing, maker, reader)
    return total


def outside_of(graph: ModelGraph) -> Iterator[str]:
    """The modules outside of every block that holds anything, which run on the main device."""
    yield from graph.composites
    for path in graph.blocks:
        if not any(True for _ in graph.modules[path].tensors()):
            yield from (each.path for each in graph.modules[path].walk())


def hops(graph: ModelGraph, homes: Mapping[TensorName, Location]) -> int:
    """How often activations go on to another device: between blocks, and to a part of a block and back."""
    block_homes = homes_of_blocks(graph, homes)
    along = [block_homes[path] for path in execution_order(graph) if path in block_homes and has_weights(graph, path)]
    count = len([after for before, after in pairwise(along) if before != after])
    for block, home in block_homes.items():
        count += 2 * _parts_elsewhere(graph.modules[block], homes, home)
    return count


def execution_order(graph: ModelGraph) -> list[ModulePath]:
    """The blocks in the order in which they first run; those that do not run stay before what is defined after them."""
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
    """Whether a block has parameters, and not buffers alone."""
    return any(tensor.kind == "parameter" for tensor in graph.modules[path].tensors())


def _parts_elsewhere(module: Module, homes: Mapping[TensorName, Location], around: Device) -> int:
    running = {homes[tensor.name].runs_on for tensor in module.tensors()}
    if not running:
        return 0
    here = next(iter(running)) if len(running) == 1 else around
    return int(here != around) + sum(_parts_elsewhere(child, homes, here) for child in module.children)


def homes_of_blocks(graph: ModelGraph, homes: Mapping[TensorName, Location]) -> dict[ModulePath, Device]:
    """Where each block runs that holds anything."""
    found: dict[ModulePath, Device] = {}
    for path in graph.blocks:
        running = [homes[tensor.name].runs_on for tensor in graph.modules[path].tensors()]
        if running:
            found[path] = home_of(running)
    return found


def crossings(graph: ModelGraph) -> Iterator[Crossing]:
    """What passes between blocks, where it was measured."""
    if graph.measurement is not None:
        yield from graph.measurement.crossings
