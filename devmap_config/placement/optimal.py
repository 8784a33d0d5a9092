"""`fastest`: states a placement problem as a chain of blocks, has it solved, and reads the answer back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, STORAGE_DEVICES
from devmap_config.graph.model import ModulePath
from devmap_config.placement.assignment import ON_CPU, Location
from devmap_config.placement.chain import Block, Chain, Gift, Option
from devmap_config.placement.solver import UNREACHABLE, solve_below
from devmap_config.placement.timing import (
    MissingFigureError,
    Timing,
    crossings,
    execution_order,
    forward_nanoseconds,
    has_weights,
    home_of,
)
from devmap_config.placement.wishes import Contexts, preferred, with_times_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.costs import Crossing, ModuleCost
    from devmap_config.graph.model import Module, Tensor, TensorName
    from devmap_config.hardware.inventory import Inventory, InventoryDevice
    from devmap_config.placement.chain import Hops, Mode
    from devmap_config.placement.problem import Aim, Placement, Problem
    from devmap_config.placement.solver import Solution

PARTS_CONSIDERED = 4
"""Of the modules within a block, the heaviest so many may be taken out of it to compute on the CPU."""

LONGEST_CONTEXT = 2**24
"""Where a model's cache does not grow, no length is the longest; this is as far as is looked."""

CONTEXT_STEPS = 64
"""The longest context is looked for until it is known to this part of itself."""

NEARLY_AS_FAST = 100
"""Within a hundredth of the bound, other things than time decide."""

SMALLEST_PART = 8
"""A part that is worth it holds at least this part, an eighth, of its block's weights."""

NEARLY_ALL = (19, 20)
"""A part that weighs at least so much of the one around it stands for that one."""


@dataclass(frozen=True, kw_only=True)
class Optimal:
    """A placement with what computes on the CPU, and the time of the objective.

    `fastest` is the fastest placement that was found with what it computes there, where wishes chose another; no
    placement is below the bound.
    """

    placement: Placement
    compute: Placement
    nanoseconds: int
    bound_nanoseconds: int
    fastest: tuple[Placement, Placement] | None = None


@dataclass(frozen=True, slots=True)
class Wished:
    """What is wished for among placements that are nearly as fast: a context of so many tokens at least, if known."""

    least_context: int | None = None


def place_fastest(problem: Problem, aim: Aim, wished: Wished | None = None) -> Optimal | None:
    """The fastest placement, or `None` where none was found that fits.

    Args:
        problem: what is to be placed, and within what.
        aim: what is to be fast; without any phase, whatever fits is as good.
        wished: what else is wished for among what is nearly as fast; without it, nothing is.

    Raises:
        MissingFigureError: where the machine does not say how fast something is.
    """
    best: tuple[int, _Statement, Solution] | None = None
    bound: int | None = None
    for main_device in _main_devices(problem, aim.inventory):
        stated = _Statement(problem, aim, main_device)
        known = UNREACHABLE if best is None else best[0] - stated.constant_nanoseconds
        outcome = solve_below(stated.chain, known)
        # Even with nothing found with this card as the first, what it might take at least bounds the plan.
        least = outcome.bound_nanoseconds + stated.constant_nanoseconds
        bound = least if bound is None else min(bound, least)
        if outcome.solution is not None:
            nanoseconds = stated.forward_nanoseconds(stated.homes(outcome.solution.choice))
            if best is None or nanoseconds < best[0]:
                best = (nanoseconds, stated, outcome.solution)
    if best is None or bound is None:
        return None
    fastest_nanoseconds, stated, solution = best
    homes = fastest = stated.homes(solution.choice)
    if wished is not None:
        most = max(fastest_nanoseconds, bound + bound // NEARLY_AS_FAST)
        limit = most - stated.constant_nanoseconds
        wanted = stated.homes(preferred(stated.chain, solution, limit, stated.contexts(wished)))
        homes = wanted if stated.forward_nanoseconds(wanted) <= most else homes
    placement, compute = _as_placed(homes, problem)
    return Optimal(
        placement=placement,
        compute=compute,
        nanoseconds=stated.forward_nanoseconds(homes),
        bound_nanoseconds=bound,
        fastest=None if homes == fastest else _as_placed(fastest, problem),
    )


def _as_placed(homes: Mapping[TensorName, Location], problem: Problem) -> tuple[Placement, Placement]:
    """Return the device of every tensor, and of those that compute on the CPU beside accelerators that one."""
    computed = {name: CPU for name, location in homes.items() if location == ON_CPU} if problem.accelerators else {}
    return {name: location.stored_on for name, location in homes.items()}, computed


def place_longest_context(problem: Problem, aim: Aim) -> Optimal | None:
    """The fastest placement under which the context can be longest, or `None` where none fits the workload's.

    Raises:
        MissingFigureError: where the machine does not say how fast something is.
    """
    measurement = problem.graph.measurement
    if measurement is None or place_fastest(problem, aim) is None:
        return None

    def placed_at(context_length: int) -> Optimal | None:
        graph = replace(problem.graph, measurement=measurement.at(context_length))
        return place_fastest(replace(problem, graph=graph), aim)

    fits, most = measurement.workload.context_length, measurement.positions.most
    if most is not None and (found := placed_at(max(most, fits))) is not None:
        return found
    best, too_long, longest = placed_at(fits), 2 * fits, most or LONGEST_CONTEXT
    while too_long < longest and (found := placed_at(too_long)) is not None:
        best, fits, too_long = found, too_long, 2 * too_long
    while too_long - fits > max(fits // CONTEXT_STEPS, 1):
        middle = (fits + too_long) // 2
        if (found := placed_at(middle)) is not None:
            best, fits = found, middle
        else:
            too_long = middle
    return best


def place_fewest_devices(problem: Problem, aim: Aim) -> Optimal | None:
    """The fastest placement on the fewest accelerators that hold all of it; on all, with the rest, where none do.

    Raises:
        MissingFigureError: where the machine does not say how fast something is.
    """
    devices = {device.id: device for device in aim.inventory.devices}
    pinned = set(problem.pinned.values())
    kept = [device for device in problem.capacities if device in pinned]
    alike: dict[object, list[Device]] = {}
    for accelerator in problem.accelerators:
        if accelerator not in pinned:
            alike.setdefault(_kind(devices[accelerator]), []).append(accelerator)
    kinds = list(alike.values())
    sets = sorted(product(*(range(len(kind) + 1) for kind in kinds)), key=lambda counts: (sum(counts), counts))
    least_bytes = problem.graph.size_bytes
    best: Optimal | None = None
    fewest: int | None = None
    for counts in sets:
        if fewest is not None and sum(counts) > fewest:
            break
        chosen = {*kept, *(device for kind, count in zip(kinds, counts, strict=True) for device in kind[:count])}
        capacities = {device: size for device, size in problem.capacities.items() if device in chosen}
        if sum(capacities.values()) < least_bytes or not any(device.is_accelerator for device in capacities):
            continue
        found = place_fastest(replace(problem, capacities=capacities), aim)
        if found is not None:
            fewest = sum(counts)
            best = found if best is None or found.nanoseconds < best.nanoseconds else best
    return best or place_fastest(problem, aim)


def _main_devices(problem: Problem, inventory: Inventory) -> list[Device]:
    """What may be the first accelerator in use: none before it may hold a pin. Of cards that are alike, the first."""
    if not problem.accelerators:
        return [CPU]
    pinned = {device for device in problem.pinned.values() if device.is_accelerator}
    devices = {device.id: device for device in inventory.devices}
    found: list[Device] = []
    kinds: list[object] = []
    for accelerator in problem.accelerators:
        kind = _kind(devices[accelerator])
        if pinned or kind not in kinds:
            kinds.append(kind)
            found.append(accelerator)
        if accelerator in pinned:
            break
    return found


def _kind(device: InventoryDevice) -> object:
    return (
        device.capacity_bytes,
        device.bandwidth_bytes_per_second,
        device.flops_per_second,
        device.memory_efficiency,
        device.compute_efficiency,
    )


class _Statement:
    """A placement problem as a chain, with one accelerator as the first that is used."""

    def __init__(self, problem: Problem, aim: Aim, main_device: Device) -> None:
        self._problem = problem
        self._aim = aim
        self._graph = problem.graph
        self._executor = problem.executor
        self._main_device = main_device
        self._timings = [
            (Timing(problem.graph, aim.inventory, phase, problem.executor, main_device), times)
            for phase, times in aim.phases
        ]
        accelerators = problem.accelerators
        self._accelerators = accelerators[accelerators.index(main_device) :] if accelerators else ()
        self._computes = {
            device.id for device in aim.inventory.devices if device.bandwidth_bytes_per_second is not None
        }
        self._known_options: dict[object, tuple[Option, ...]] = {}
        self._known_hops: dict[tuple[int, ...], Hops] = {}

    @cached_property
    def chain(self) -> Chain:
        """The chain: what has no weights and the model's own tensors first, then the blocks as they run."""
        graph = self._graph
        ordered = [path for path in execution_order(graph) if any(True for _ in graph.modules[path].tensors())]
        aside = [path for path in ordered if not has_weights(graph, path)]
        along = [path for path in ordered if has_weights(graph, path)]
        own = [tensor for path in sorted(graph.composites) for tensor in graph.modules[path].own_tensors]
        fixed_homes: dict[str, Device] = dict.fromkeys(map(str, sorted(graph.composites)), self._main_device)
        blocks: list[Block] = []
        for tensor in own:
            blocks.append(Block(tensor.name, self._tensor_options(tensor), self._groups.get(tensor.name)))
        for path in aside:
            option = self._option(graph.modules[path], self._home_aside(path), ("resident",))
            fixed_homes[path] = option.home
            blocks.append(Block(path, (option,), self._groups.get(path)))
        for path in along:  # what is pinned is known before what reads it
            home = self._pinned_home(graph.modules[path])
            if home is not None:
                fixed_homes[path] = home
        entering: list[Hops] = [{} for _ in blocks]
        before: str | None = None
        for path in along:
            blocks.append(Block(path, self._options(graph.modules[path], fixed_homes, before), self._groups.get(path)))
            entering.append(self._entering(path, before))
            before = path
        gifts = self._gifts({block.name: place for place, block in enumerate(blocks)}, along, fixed_homes)
        return Chain(tuple(blocks), self._problem.capacities, tuple(entering), gifts)

    @cached_property
    def constant_nanoseconds(self) -> int:
        """What the model does outside of every block that holds anything."""
        graph = self._graph
        total = 0
        for timing, times in self._timings:
            for path in graph.composites:
                total += times * timing.own_nanoseconds(path, self._main_device)
            for path in graph.blocks:
                if not any(True for _ in graph.modules[path].tensors()):
                    modules = graph.modules[path].walk()
                    total += times * sum(timing.own_nanoseconds(each.path, self._main_device) for each in modules)
        return total

    def contexts(self, wished: Wished) -> Contexts | None:
        """The chain at other context lengths, in the times of this; `None` where its cache does not grow."""
        measurement, problem = self._graph.measurement, self._problem
        if measurement is None or not self._graph.decodes:
            return None
        length = measurement.workload.context_length
        if measurement.at(2 * length).cache_bytes == measurement.cache_bytes:
            return None

        def chain_at(context_length: int) -> Chain:
            graph = replace(self._graph, measurement=measurement.at(context_length))
            other = _Statement(replace(problem, graph=graph), self._aim, self._main_device)
            return with_times_of(other.chain, self.chain)

        least = wished.least_context or length
        longest = max(measurement.positions.most or LONGEST_CONTEXT, length)
        return Contexts(length=length, least=max(least, length), longest=longest, chain_at=chain_at)

    def homes(self, choice: Iterable[int]) -> dict[TensorName, Location]:
        """Where every tensor is stored and runs."""
        found: dict[TensorName, Location] = {}
        for block, index in zip(self.chain.blocks, choice, strict=True):
            option = block.options[index]
            if block.name in self._graph.modules:
                module = self._graph.modules[ModulePath(block.name)]
                found |= self._homes_of(module, option.home, option.mode)
            else:
                found[self._graph.tensors[block.name].name] = Location(option.home, option.home)  # type: ignore[index]
        return {name: found[name] for name in self._graph.tensors}

    def forward_nanoseconds(self, homes: Mapping[TensorName, Location]) -> int:
        """What the objective takes, all that crosses included."""
        return sum(times * forward_nanoseconds(timing, homes) for timing, times in self._timings)

    @cached_property
    def _groups(self) -> dict[str, int]:
        """The group of every block that must be with another: ties, rules, and what reads another's cache."""
        graph = self._graph
        block_of = {tensor.name: path for path in graph.blocks for tensor in graph.modules[path].tensors()}
        leader: dict[str, str] = {}

        def find(name: str) -> str:
            while leader.setdefault(name, name) != name:
                name = leader[name]
            return name

        together: list[list[str]] = [
            [str(block_of.get(name, name)) for name in names] for names in (*graph.tied_groups, *self._problem.groups)
        ]
        if graph.measurement is not None:
            together += [list(bond) for bond in graph.measurement.bonds]
        for names in together:
            for name in names[1:]:
                leader[find(name)] = find(names[0])
        members: dict[str, list[str]] = {}
        for name in leader:
            members.setdefault(find(name), []).append(name)
        return {
            name: number
            for number, names in enumerate(names for names in members.values() if len(names) > 1)
            for name in names
        }

    @cached_property
    def _counted(self) -> frozenset[TensorName]:
        """Of names that share a storage, the one under which it is counted."""
        first: dict[TensorName, TensorName] = {}
        for name in self._graph.tensors:
            first.setdefault(self._graph.storage_of[name], name)
        return frozenset(first.values())

    @cached_property
    def _crossings(self) -> dict[str, list[Crossing]]:
        found: dict[str, list[Crossing]] = {}
        for crossing in crossings(self._graph):
            found.setdefault(crossing.reader, []).append(crossing)
        return found

    @cached_property
    def _composite_peaks(self) -> dict[str, int]:
        """What a model's own operations need at once, by the first block within: that is where they run."""
        measurement = self._graph.measurement
        peaks: dict[str, int] = {}
        for path in sorted(self._graph.composites):
            cost = None if measurement is None else measurement.by_path.get(path)
            prefix = f"{path}." if path else ""
            first = next((block for block in self._graph.blocks if block.startswith(prefix)), None)
            if cost is not None and first is not None:
                peaks[first] = max(peaks.get(first, 0), cost.own_peak_bytes)
        return peaks

    def _home_aside(self, path: ModulePath) -> Device:
        """Where a block without weights goes: to the main device, or the first that no rule forbids."""
        names = [tensor.name for tensor in self._graph.modules[path].tensors()]
        forbidden = {device for name in names for device in self._problem.forbidden.get(name, ())}
        homes = (self._main_device, *self._accelerators)
        return next((device for device in homes if device not in forbidden), self._main_device)

    def _pinned_home(self, module: Module) -> Device | None:
        """Where a block runs that is pinned as a whole."""
        names = [tensor.name for tensor in module.tensors()]
        if not all(name in self._problem.pinned for name in names):
            return None
        return home_of(self._pinned(name).runs_on for name in names)

    def _pinned(self, name: TensorName) -> Location:
        compute = self._problem.computed.get(name)
        return self._executor.location(self._problem.pinned[name], self._main_device, compute)

    def _tensor_options(self, tensor: Tensor) -> tuple[Option, ...]:
        """A tensor of the model's own: on the main device, unless a rule or a tie says otherwise."""
        if tensor.name in self._problem.pinned:
            homes: tuple[Device, ...] = (self._problem.pinned[tensor.name],)
        elif tensor.name in self._groups:
            homes = self._accelerators or (CPU,)
        else:
            homes = (self._main_device,)
        size_bytes = tensor.size_bytes if tensor.name in self._counted else 0
        return tuple(
            Option(home=home, nanoseconds=0, demands=((home, size_bytes),), mode=("resident",)) for home in homes
        )

    def _options(self, module: Module, fixed_homes: Mapping[str, Device], before: str | None) -> tuple[Option, ...]:
        """The ways of placing a block; blocks that are alike share them."""
        signature = self._signature(module, fixed_homes, before)
        if signature not in self._known_options:
            aside = self._aside(module.path, fixed_homes, before)
            options = []
            for home, mode in self._ways(module):
                try:
                    option = self._option(module, home, mode, aside)
                except MissingFigureError:
                    if home == CPU or mode[0] == "part":
                        continue  # the CPU does not compute where it is not known how fast
                    raise
                options.append(option)
            self._known_options[signature] = tuple(options)
        return self._known_options[signature]

    def _ways(self, module: Module) -> Iterator[tuple[Device, Mode]]:
        pinned = self._pinned_home(module)
        if pinned is not None:
            yield pinned, ("resident",)
            return
        names = [tensor.name for tensor in module.tensors() if tensor.name not in self._problem.pinned]
        forbidden = {device for name in names for device in self._problem.forbidden.get(name, ())}
        capacities = self._problem.capacities
        for accelerator in self._accelerators:
            if accelerator not in forbidden:
                yield accelerator, ("resident",)
        if not self._accelerators and CPU not in forbidden and CPU in capacities:
            yield CPU, ("resident",)
        for store in STORAGE_DEVICES:
            is_offered = store in capacities and store not in forbidden and store != self._main_device
            if is_offered and self._executor.streams(Location(store, self._main_device)):
                yield self._main_device, ("streamed", store)
        computes_on_cpu = self._accelerators and CPU in capacities and CPU in self._computes
        if computes_on_cpu and CPU not in forbidden and self._graph.measurement is not None:
            yield CPU, ("computed",)
            if module.path not in self._groups:
                for part in self._parts(module):
                    for accelerator in self._accelerators:
                        if accelerator not in forbidden:
                            yield accelerator, ("part", part)

    def _parts(self, module: Module) -> list[str]:
        """The modules within a block that are heavy enough to be taken out, as paths from the block.

        Of one within another that weigh nearly the same, the inner one: the experts, without the router.
        """
        total = sum(tensor.size_bytes for tensor in module.tensors())
        costs = self._costs
        found: list[tuple[int, int, str]] = []
        for each in module.walk():
            size_bytes = sum(tensor.size_bytes for tensor in each.tensors())
            is_pinned = any(tensor.name in self._problem.pinned for tensor in each.tensors())
            if each is module or is_pinned or each.path not in costs or size_bytes == total:
                continue
            if size_bytes * SMALLEST_PART >= total:
                found.append((-size_bytes, len(found), each.path[len(module.path) + 1 :]))
        outer = {
            path
            for size, _, path in found
            for inner_size, _, inner in found
            if inner.startswith(f"{path}.") and inner_size * NEARLY_ALL[1] <= size * NEARLY_ALL[0]
        }
        return [path for _, _, path in sorted(found) if path not in outer][:PARTS_CONSIDERED]

    @cached_property
    def _costs(self) -> Mapping[str, ModuleCost]:
        return {} if self._graph.measurement is None else self._graph.measurement.by_path

    def _homes_of(self, module: Module, home: Device, mode: Mode) -> dict[TensorName, Location]:
        """Where the tensors of a block are stored and run when it is placed so; pins come first."""
        stored_on = mode[1] if mode[0] == "streamed" else home
        part = f"{module.path}.{mode[1]}." if mode[0] == "part" else None
        homes: dict[TensorName, Location] = {}
        for tensor in module.tensors():
            if tensor.name in self._problem.pinned:
                homes[tensor.name] = self._pinned(tensor.name)
            elif part is not None and tensor.name.startswith(part):
                homes[tensor.name] = ON_CPU
            else:
                homes[tensor.name] = Location(stored_on, home)
        return homes

    def _option(self, module: Module, home: Device, mode: Mode, aside: _Aside | None = None) -> Option:
        homes = self._homes_of(module, home, mode)
        home = home_of(location.runs_on for location in homes.values())
        nanoseconds = sum(times * timing.module_nanoseconds(module, homes) for timing, times in self._timings)
        for crossing, maker in aside or ():
            nanoseconds += sum(
                times * timing.crossing_nanoseconds(crossing, maker, home) for timing, times in self._timings
            )
        demands: dict[Device, int] = {}
        pieces: dict[Device, int] = {}
        for tensor in module.tensors():
            residence = self._executor.residence(tensor, homes[tensor.name])
            if tensor.name in self._counted:
                demands[residence] = demands.get(residence, 0) + self._held_bytes(tensor, homes)
        for each in module.walk():
            copied = [tensor for tensor in each.own_tensors if self._executor.is_copied_in(tensor, homes[tensor.name])]
            if copied:
                runs_on = homes[copied[0].name].runs_on
                size_bytes = sum(self._held_bytes(tensor, homes) for tensor in copied)
                pieces[runs_on] = max(pieces.get(runs_on, 0), size_bytes)
            if (cost := self._costs.get(each.path)) is not None:
                within = [homes[tensor.name].runs_on for tensor in each.tensors()]
                runs_on = home if not within or len(set(within)) > 1 else within[0]
                demands[runs_on] = demands.get(runs_on, 0) + cost.cache_bytes + cost.retained_bytes
        cost = self._costs.get(module.path)
        peak_bytes = max(0 if cost is None else cost.peak_bytes, self._composite_peaks.get(module.path, 0))
        involved = dict.fromkeys([home, *(location.runs_on for location in homes.values())])
        return Option(
            home=home,
            nanoseconds=nanoseconds,
            demands=tuple((device, size_bytes) for device, size_bytes in demands.items() if size_bytes),
            peaks=tuple((device, peak_bytes) for device in involved) if peak_bytes else (),
            pieces=tuple(pieces.items()),
            mode=mode,
        )

    def _held_bytes(self, tensor: Tensor, homes: Mapping[TensorName, Location]) -> int:
        return self._executor.held_bytes(tensor, homes[tensor.name], self._main_device)

    def _aside(self, path: str, fixed_homes: Mapping[str, Device], before: str | None) -> _Aside:
        """What a block is given by what has its place already."""
        return [
            (crossing, fixed_homes[crossing.maker])
            for crossing in self._crossings.get(path, ())
            if crossing.maker in fixed_homes and crossing.maker != before
        ]

    def _entering(self, path: str, before: str | None) -> Hops:
        """What the hop from the block before costs, by devices."""
        crossing = next((each for each in self._crossings.get(path, ()) if each.maker == before), None)
        return {} if crossing is None else self._hops(crossing)

    def _gifts(
        self, positions: Mapping[str, int], along: list[ModulePath], fixed_homes: Mapping[str, Device]
    ) -> tuple[Gift, ...]:
        """What blocks are given that have no place yet by others than the one before."""
        return tuple(
            Gift(positions[crossing.maker], positions[path], self._hops(crossing))
            for before, path in zip([None, *along], along, strict=False)
            for crossing in self._crossings.get(path, ())
            if crossing.maker not in {*fixed_homes, before, path} and crossing.maker in positions
        )

    def _hops(self, crossing: Crossing) -> Hops:
        """What a crossing costs, by the devices of its maker and its reader."""
        figures = _sizes(crossing)
        if figures not in self._known_hops:
            self._known_hops[figures] = self._found_hops(crossing)
        return self._known_hops[figures]

    def _found_hops(self, crossing: Crossing) -> Hops:
        devices = [*self._accelerators, *([CPU] if CPU in self._problem.capacities else [])]
        found: dict[tuple[Device, Device], int] = {}
        for maker in devices:
            for reader in devices:
                if maker == reader:
                    continue
                try:
                    found[maker, reader] = sum(
                        times * timing.crossing_nanoseconds(crossing, maker, reader) for timing, times in self._timings
                    )
                except MissingFigureError:
                    if maker.is_accelerator and reader.is_accelerator:
                        raise
        return found

    def _signature(self, module: Module, fixed_homes: Mapping[str, Device], before: str | None) -> tuple[object, ...]:
        """What the options of a block depend on."""
        start = len(module.path)
        problem = self._problem
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
            (each.path[start:], cost if cost is None else _figures(cost))
            for each in module.walk()
            for cost in (self._costs.get(each.path),)
        )
        aside = tuple((_sizes(crossing), maker) for crossing, maker in self._aside(module.path, fixed_homes, before))
        return (tensors, costs, aside, self._composite_peaks.get(module.path, 0), module.path in self._groups)


_Aside = list[tuple["Crossing", "Device"]]


def _sizes(crossing: Crossing) -> tuple[int, ...]:
    return (crossing.decode_bytes, crossing.prefill_bytes, crossing.decode_tensors, crossing.prefill_tensors)


def _figures(cost: ModuleCost) -> tuple[int, ...]:
    return (
        cost.cache_bytes,
        cost.retained_bytes,
        cost.peak_bytes,
        cost.prefill_operations,
        cost.decode_operations,
        cost.prefill_touched_bytes,
        cost.decode_touched_bytes,
        cost.prefill_launches,
        cost.decode_launches,
        cost.prefill_input_bytes,
        cost.decode_input_bytes,
        cost.prefill_output_bytes,
        cost.decode_output_bytes,
    )
