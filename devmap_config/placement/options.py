"""Builds the options of blocks. A builder for each mode yields the places of a block in that mode.

`OptionBuilder.of_block` asks the builders in turn; time and memory of all options are computed in the same way. To add
a mode, write its builder, and say in `locations` where the tensors of such a block are stored and run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, STORAGE_DEVICES
from devmap_config.execution.assignment import ON_CPU, Location
from devmap_config.execution.pieces import copied_bytes, pieces_of
from devmap_config.execution.segments import MissingFigureError
from devmap_config.execution.timing import Timing, home_of, while_prefilled
from devmap_config.graph.costs import PARTLY, WORK
from devmap_config.graph.model import is_within
from devmap_config.placement.chain import Option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.costs import ModuleCost
    from devmap_config.graph.model import Module, Tensor, TensorName
    from devmap_config.placement.chain import Mode, Place
    from devmap_config.placement.problem import Aim, Problem

PARTS_CONSIDERED = 4
"""The number of modules within a block, the heaviest ones, that may be taken out to compute on the CPU."""

SMALLEST_PART = 8
"""A module is taken out only if it holds at least an eighth of its block's weights."""

PARTED = ("part", "streamed around")
"""The modes of blocks of which the CPU computes a part."""

NEARLY_ALL = (19, 20)
"""A module that holds at least this share of the weights of the one around it replaces that one."""


FIGURES = attrgetter(
    *("cache_bytes", "retained_bytes", "peak_bytes", "offloaded_bytes", "offloaded_largest_bytes"),
    *(f"{phase}_{figure}" for phase in ("prefill", "decode") for figure in (*WORK, "input_bytes", "output_bytes")),
)
"""The figures of a module's cost that an option depends on."""


@dataclass(frozen=True, eq=False)
class OptionBuilder:
    """Builds the options of blocks, given the main device: the first accelerator that is used, or the CPU.

    Attributes:
        problem: the tensors, rules and capacities.
        aim: the phases whose time is minimised, and the machine.
        main_device: the device that streamed blocks run on.
        grouped: the paths of blocks that must share a place with others.
    """

    problem: Problem
    aim: Aim
    main_device: Device
    grouped: frozenset[str]

    @cached_property
    def accelerators(self) -> tuple[Device, ...]:
        """The accelerators that may be used: the main device and later ones."""
        accelerators = self.problem.accelerators
        return accelerators[accelerators.index(self.main_device) :] if accelerators else ()

    @cached_property
    def timings(self) -> list[tuple[Timing, int]]:
        """The timing of each phase that is minimised, with the number of times that it is run."""
        problem, inventory = self.problem, self.aim.inventory
        return [
            (Timing(problem.graph, inventory, phase, problem.executor, self.main_device), times)
            for phase, times in self.aim.phases
        ]

    @cached_property
    def _keeping_timings(self) -> list[tuple[Timing, int]]:
        """The same timings with caches that stay on the device that fills them."""
        keeping = replace(self.problem.executor, offloaded_caches=())
        return [(replace(timing, executor=keeping), times) for timing, times in self.timings]

    def of_block(self, module: Module) -> tuple[Option, ...]:
        """Return the options of a block; equal blocks share the same tuple.

        Args:
            module: the block.
        """
        signature = self._signature(module)
        if signature not in self._known:
            self._known[signature] = tuple(self._of_block(module))
        return self._known[signature]

    def of_tensor(self, tensor: Tensor) -> tuple[Option, ...]:
        """Return the options of a tensor outside of blocks: on the main device, unless a rule or a tie decides
        otherwise.
        """
        homes: tuple[Device, ...] = (self.main_device,)
        if tensor.name in self.problem.pinned:
            homes = (self.problem.pinned[tensor.name],)
        elif tensor.name in self.grouped:
            homes = self.accelerators or homes
        size_bytes = tensor.size_bytes if tensor.name in self._counted else 0
        return tuple(Option(home=home, nanoseconds=0, demands=((home, size_bytes),)) for home in homes)

    def without_weights(self, module: Module) -> tuple[Option, ...]:
        """Return the one option of a block without weights: on the main device, or the first that no rule forbids."""
        forbidden = self._forbidden(module)
        homes = (device for device in (self.main_device, *self.accelerators) if device not in forbidden)
        return (self._option(module, next(homes, self.main_device), ("resident",)),)

    def locations(self, module: Module, place: Place) -> dict[TensorName, Location]:
        """Return the location of each tensor of a block with this place; pins take precedence."""
        around, mode = self._around(place), place[1]
        part = f"{module.path}.{mode[1]}." if mode[0] == "part" or mode[0] == "streamed around" else None
        return {
            tensor.name: self._pinned(tensor.name)
            or (ON_CPU if part is not None and tensor.name.startswith(part) else around)
            for tensor in module.tensors()
        }

    def _around(self, place: Place) -> Location:
        """Return the location of those tensors of a block that no pin decides, outside of a part."""
        home, mode = place
        if mode[0] == "streamed" or mode[0] == "streamed elsewhere":
            return Location(mode[1], home)
        if mode[0] == "streamed around":
            return Location(CPU, home)
        return Location(home, home)

    def _shared_elsewhere(self, module: Module, place: Place) -> dict[TensorName, Location]:
        """Return the locations of tensors of other blocks in this block's pieces, as if they had its place."""
        names = (
            tensor.name for piece in self._pieces[module.path] for member in piece for tensor in member.own_tensors
        )
        own = {tensor.name for tensor in module.tensors()}
        return {name: self._pinned(name) or self._around(place) for name in names if name not in own}

    @cached_property
    def _pieces(self) -> Mapping[str, list[tuple[Module, ...]]]:
        """For each block, the pieces (modules that are copied in together) that hold a module of it."""
        graph = self.problem.graph
        block_of = {inner.path: block for block in graph.blocks for inner in graph.modules[block].walk()}
        pieces: dict[str, list[tuple[Module, ...]]] = {block: [] for block in graph.blocks}
        for piece in pieces_of(graph, self.problem.executor, self.main_device):
            for block in dict.fromkeys(block_of[module.path] for module in piece if module.path in block_of):
                pieces[block].append(piece)
        return pieces

    # A builder for each mode

    def _resident(self, module: Module) -> Iterator[Place]:
        """Yield each accelerator; without accelerators, the CPU."""
        forbidden = self._forbidden(module)
        for device in self.accelerators or ((CPU,) if CPU in self.problem.capacities else ()):
            if device not in forbidden:
                yield device, ("resident",)

    def _streamed(self, module: Module) -> Iterator[Place]:
        """Yield the places in which the block is copied from the CPU or the disk to the main device, or another
        card.
        """
        stores = [store for store in STORAGE_DEVICES if store in self.problem.capacities]
        stores = [store for store in stores if self._takes_weights[store]]
        for store in stores:
            is_streamed = self.problem.executor.streams(Location(store, self.main_device))
            if is_streamed and store not in self._forbidden(module):
                yield self.main_device, ("streamed", store)
                for device in self._other_targets(store):
                    yield device, ("streamed elsewhere", store)

    @cached_property
    def _takes_weights(self) -> Mapping[Device, bool]:
        """For each device, whether it may store weights, and not only the cache."""
        return {device: self.problem.takes_weights(device) for device in self.problem.capacities}

    def _other_targets(self, store: Device) -> list[Device]:
        """Return the cards, other than the main one, that are worth copying ahead to.

        These are the cards with a faster link than the main device's, and, from the CPU's memory, all cards if several
        links together are faster than one.
        """
        links, together = self.aim.inventory.links, self.aim.inventory.together_bytes_per_second
        rates = {device: link.bytes_per_second for (source, device), link in links.items() if source == CPU}
        ahead = self.problem.executor.works_ahead and self.main_device.is_accelerator
        least = rates.get(self.main_device)
        if not ahead or least is None:
            return []
        gains = store == CPU and together is not None and together > least
        others = (device for device in self.accelerators if device not in (self.main_device, *self.problem.refused))
        return [device for device in others if rates.get(device, 0) > (0 if gains else least)]

    def _computed(self, module: Module) -> Iterator[Place]:
        """Yield the CPU, to store and run the block beside accelerators."""
        if self._computes_on_cpu and CPU not in self._forbidden(module) and not self._must_offload(module):
            yield CPU, ("computed",)

    def _part(self, module: Module) -> Iterator[Place]:
        """Yield each accelerator with each heavy module of the block, which the CPU then computes; and the main device,
        to which the rest of the block is then copied.
        """
        forbidden = self._forbidden(module)
        if self._computes_on_cpu and CPU not in forbidden and module.path not in self.grouped:
            is_streamed = self.problem.executor.streams(Location(CPU, self.main_device))
            for part in self._heavy_parts(module):
                for device in self.accelerators:
                    if device not in forbidden:
                        yield device, ("part", part)
                if is_streamed:
                    yield self.main_device, ("streamed around", part)

    @cached_property
    def _computes_on_cpu(self) -> bool:
        """True if the CPU may compute beside accelerators, for which its speed and the model's costs must be known."""
        rates = {device.id: device.bandwidth_bytes_per_second for device in self.aim.inventory.devices}
        is_offered = CPU in self.problem.capacities and self._takes_weights[CPU] and rates.get(CPU) is not None
        return bool(self.accelerators) and is_offered and self.problem.graph.measurement is not None

    def _heavy_parts(self, module: Module) -> list[str]:
        """Return the modules within a block that are heavy enough to be computed apart, as paths from the block.

        Of two nested modules of nearly the same weight, the inner one: the experts, without the router.
        """
        total_bytes = sum(tensor.size_bytes for tensor in module.tensors())
        parts: list[tuple[int, int, str]] = []
        for part in module.walk():
            size_bytes = sum(tensor.size_bytes for tensor in part.tensors())
            is_pinned = any(tensor.name in self.problem.pinned for tensor in part.tensors())
            if is_pinned or self._must_offload(part) or part.path not in self._costs or size_bytes == total_bytes:
                continue
            if size_bytes * SMALLEST_PART >= total_bytes:
                parts.append((-size_bytes, len(parts), part.path[len(module.path) + 1 :]))
        outer = {
            path
            for size, _, path in parts
            for inner_size, _, inner in parts
            if inner.startswith(f"{path}.") and inner_size * NEARLY_ALL[1] <= size * NEARLY_ALL[0]
        }
        return [path for _, _, path in sorted(parts) if path not in outer][:PARTS_CONSIDERED]

    # Time and memory of every option

    def _of_block(self, module: Module) -> Iterator[Option]:
        pinned = {self._pinned(tensor.name) for tensor in module.tensors()}
        if None not in pinned:
            home = home_of(location.runs_on for location in pinned if location is not None)
            yield from self._with_cache(module, home, ("resident",))
            return
        for builder in (self._resident, self._streamed, self._computed, self._part):
            for home, mode in builder(module):
                try:
                    yield from self._with_cache(module, home, mode)
                except MissingFigureError:
                    if home != CPU and mode[0] not in PARTED:  # a CPU of unknown speed does not compute
                        raise

    def _with_cache(self, module: Module, around: Device, mode: Mode) -> Iterator[Option]:
        """Yield the option with its cache on the workload's device, or one option for each device if the plan
        decides.
        """
        offloading = self._option(module, around, mode)
        if offloading.offloads_cache:
            yield self._option(module, around, mode, offloads=False)
        yield offloading

    def _option(self, module: Module, around: Device, mode: Mode, *, offloads: bool = True) -> Option:
        problem, executor = self.problem, self.problem.executor
        locations = self.locations(module, (around, mode))
        home = home_of(location.runs_on for location in locations.values())
        held_bytes = {
            tensor.name: executor.held_bytes(tensor, locations[tensor.name], self.main_device)
            for tensor in module.tensors()
        }
        demands: dict[Device, int] = {}
        pieces: dict[Device, int] = {}
        for tensor in module.tensors():
            residence = executor.residence(tensor, locations[tensor.name])
            if tensor.name in self._counted:
                demands[residence] = demands.get(residence, 0) + held_bytes[tensor.name]
        prefilled = while_prefilled(module, locations, executor, self.main_device)
        measurement = problem.graph.measurement
        visits: dict[Device, int] = {}
        for inner in module.walk():
            if (cost := self._costs.get(inner.path)) is not None:
                within = {locations[tensor.name].runs_on for tensor in inner.tensors()}
                runs_on = next(iter(within)) if len(within) == 1 else home
                kept_bytes = cost.cache_bytes + cost.retained_bytes
                if offloads and cost.offloaded_bytes and runs_on.is_accelerator and measurement is not None:
                    kept_bytes = cost.kept_bytes
                    demands[CPU] = demands.get(CPU, 0) + cost.pinned_bytes(measurement.workload)
                    visits = {**visits, runs_on: measurement.visiting_bytes, CPU: measurement.passing_bytes}
                demands[runs_on] = demands.get(runs_on, 0) + kept_bytes
        homes = {**prefilled, **self._shared_elsewhere(module, (around, mode))}
        for piece in self._pieces[module.path]:
            for device, size_bytes in copied_bytes(problem.graph, piece, homes, executor, self.main_device).items():
                pieces[device] = max(pieces.get(device, 0), executor.pieces_at_once * size_bytes)
        peak_bytes = self._peak_bytes(module)
        running = [
            location.runs_on for homes_of_phase in (locations, prefilled) for location in homes_of_phase.values()
        ]
        involved = dict.fromkeys([home, *running])
        peaks = dict.fromkeys(involved, peak_bytes)
        timings = self.timings if offloads else self._keeping_timings
        spent = [timing.module_time(module, locations).times(times) for timing, times in timings]
        return Option(
            home=home,
            nanoseconds=sum(time.nanoseconds for time in spent),
            demands=tuple((device, size_bytes) for device, size_bytes in demands.items() if size_bytes),
            peaks=tuple((device, size_bytes) for device, size_bytes in peaks.items() if size_bytes),
            pieces=tuple(pieces.items()),
            visits=tuple(visits.items()),
            mode=mode,
            around=None if home == around else around,
            ahead=tuple(block for time in spent for block in time.ahead),
            offloads_cache=self._chooses_caches and bool(visits),
        )

    @cached_property
    def _chooses_caches(self) -> bool:
        """True if the plan decides which blocks' caches are offloaded."""
        measurement = self.problem.graph.measurement
        return measurement is not None and measurement.workload.cache == PARTLY

    def _must_offload(self, module: Module) -> bool:
        """Return whether the module has a cache that is always offloaded, which only accelerators support."""
        costs = (self._costs.get(inner.path) for inner in module.walk())
        return not self._chooses_caches and any(cost is not None and cost.offloaded_bytes for cost in costs)

    def offloaded_caches(self, module: Module, option: Option) -> Iterator[str]:
        """Yield the modules within a block whose cache is on the CPU while they do not run, under this option."""
        locations = self.locations(module, option.place)
        for inner in module.walk() if option.offloads_cache else ():
            if (cost := self._costs.get(inner.path)) is not None and cost.offloaded_bytes:
                within = {locations[tensor.name].runs_on for tensor in inner.tensors()}
                if (next(iter(within)) if len(within) == 1 else option.home).is_accelerator:
                    yield inner.path

    def _pinned(self, name: TensorName) -> Location | None:
        if name not in self.problem.pinned:
            return None
        stored_on, compute = self.problem.pinned[name], self.problem.computed.get(name)
        return self.problem.executor.location(stored_on, self.main_device, compute)

    def _forbidden(self, module: Module) -> set[Device]:
        names = [tensor.name for tensor in module.tensors() if tensor.name not in self.problem.pinned]
        return {device for name in names for device in self.problem.forbidden.get(name, ())}

    def _peak_bytes(self, module: Module) -> int:
        cost = self._costs.get(module.path)
        return max(0 if cost is None else cost.peak_bytes, self._composite_peaks.get(module.path, 0))

    @cached_property
    def _composite_peaks(self) -> dict[str, int]:
        """The peaks of operations of modules outside of blocks, by the first block within each, with which they run."""
        graph = self.problem.graph
        peaks: dict[str, int] = {}
        for path in sorted(graph.composites):
            prefix = f"{path}." if path else ""
            first = next((block for block in graph.blocks if block.startswith(prefix)), None)
            if path in self._costs and first is not None:
                peaks[first] = max(peaks.get(first, 0), self._costs[path].own_peak_bytes)
        return peaks

    @cached_property
    def _costs(self) -> Mapping[str, ModuleCost]:
        measurement = self.problem.graph.measurement
        return {} if measurement is None else measurement.by_path

    @cached_property
    def _counted(self) -> frozenset[TensorName]:
        """The tensors that are counted: the first of the names that share a storage."""
        first: dict[TensorName, TensorName] = {}
        for name in self.problem.graph.tensors:
            first.setdefault(self.problem.graph.storage_of[name], name)
        return frozenset(first.values())

    # Which blocks are alike

    @cached_property
    def _known(self) -> dict[object, tuple[Option, ...]]:
        return {}

    def _signature(self, module: Module) -> tuple[object, ...]:
        """Return a key that is equal for blocks with equal options."""
        start, problem = len(module.path), self.problem
        tensors = tuple(
            (
                tensor.name[start:],
                tensor.size_bytes if tensor.name in self._counted else 0,
                tensor.size_bytes,
                tensor.offloaded_bytes,
                tensor.is_held_in_buffer,
                tensor.persistent,
                problem.pinned.get(tensor.name),
                problem.computed.get(tensor.name),
                problem.forbidden.get(tensor.name),
            )
            for tensor in module.tensors()
        )
        costs = tuple(
            (inner.path[start:], None if cost is None else FIGURES(cost))
            for inner in module.walk()
            for cost in (self._costs.get(inner.path),)
        )
        is_alone = all(is_within(member.path, module.path) for piece in self._pieces[module.path] for member in piece)
        own = None if is_alone else module.path
        return (tensors, costs, self._composite_peaks.get(module.path, 0), module.path in self.grouped, own)
