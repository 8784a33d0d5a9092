"""States a placement problem as a chain of blocks with their options and transfers, and reads a choice back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.assignment import Location
from devmap_config.execution.running import LONGEST_CONTEXT
from devmap_config.execution.segments import MissingFigureError
from devmap_config.execution.timing import crossings, execution_order, has_weights, outside_of
from devmap_config.execution.units import united
from devmap_config.graph.costs import PARTLY
from devmap_config.graph.model import ModulePath
from devmap_config.placement.chain import Block, Chain, Option, Transfer
from devmap_config.placement.options import OptionBuilder
from devmap_config.placement.wishes import Contexts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.costs import Crossing
    from devmap_config.graph.model import TensorName
    from devmap_config.placement.chain import Choice
    from devmap_config.placement.problem import Aim, Problem

MODEL = "the model's own code"
"""The name of the first block of a chain: the operations outside of all blocks, which hold no tensors."""


@dataclass(frozen=True, eq=False)
class Statement:
    """A placement problem as a chain, with one accelerator (or the CPU) as the main device: the first that is used."""

    problem: Problem
    aim: Aim
    main_device: Device

    @cached_property
    def chain(self) -> Chain:
        """The chain: the model's own code, its tensors and blocks without weights, then the other blocks as they
        run.
        """
        graph, builder = self.problem.graph, self._builder
        blocks = [Block(MODEL, (Option(home=self.main_device, nanoseconds=self._own_nanoseconds),))]
        for path in sorted(graph.composites):
            for tensor in graph.modules[path].own_tensors:
                blocks.append(Block(tensor.name, builder.of_tensor(tensor), self._groups.get(tensor.name)))
        holding = [path for path in execution_order(graph) if any(True for _ in graph.modules[path].tensors())]
        for path in sorted(holding, key=lambda path: has_weights(graph, path)):
            module = graph.modules[path]
            options = builder.of_block(module) if has_weights(graph, path) else builder.without_weights(module)
            blocks.append(Block(path, options, self._groups.get(path)))
        return Chain(tuple(blocks), self.problem.capacities, self._transfers(blocks))

    def locations(self, choice: Choice) -> dict[TensorName, Location]:
        """Return the location of every tensor under a choice."""
        graph = self.problem.graph
        locations: dict[TensorName, Location] = {}
        for block, index in zip(self.chain.blocks[1:], choice[1:], strict=True):
            option = block.options[index]
            if block.name in graph.modules:
                locations |= self._builder.locations(graph.modules[ModulePath(block.name)], option.place)
            else:
                locations[graph.tensors[block.name].name] = Location(option.home, option.home)  # type: ignore[index]
        return {name: locations[name] for name in graph.tensors}

    def offloaded_caches(self, choice: Choice) -> tuple[str, ...] | None:
        """Return the modules whose cache a choice offloads, in the order in which they run; `None` if the plan does
        not decide.
        """
        graph = self.problem.graph
        if graph.measurement is None or graph.measurement.workload.cache != PARTLY:
            return None
        chosen = [(block, block.options[index]) for block, index in zip(self.chain.blocks, choice, strict=True)]
        holding = ((graph.modules[ModulePath(block.name)], option) for block, option in chosen if option.offloads_cache)
        offloaded = {path for module, option in holding for path in self._builder.offloaded_caches(module, option)}
        return tuple(cost.path for cost in graph.measurement.modules if cost.path in offloaded)

    def contexts(self, least: int | None) -> Contexts | None:
        """Return the chain at other context lengths, with the times of this one; `None` if its cache does not grow.

        Args:
            least: the least context, in tokens, that is wished for, if any.
        """
        measurement = self.problem.graph.measurement
        if measurement is None or not self.problem.graph.decodes:
            return None
        length = measurement.workload.context_length
        if measurement.at(2 * length).cache_bytes == measurement.cache_bytes:
            return None

        def chain_at(context_length: int) -> Chain:
            graph = replace(self.problem.graph, measurement=measurement.at(context_length))
            untimed = Statement(replace(self.problem, graph=graph), replace(self.aim, phases=()), self.main_device)
            return untimed.chain.with_times_of(self.chain)

        longest = max(measurement.positions.most or LONGEST_CONTEXT, length)
        return Contexts(length=length, least=max(least or length, length), longest=longest, chain_at=chain_at)

    @property
    def least_nanoseconds(self) -> int:
        """A lower bound of the time of every choice, whichever accelerator is the first."""
        return sum(times * timing.least_nanoseconds for timing, times in self._builder.timings)

    @cached_property
    def _builder(self) -> OptionBuilder:
        return OptionBuilder(self.problem, self.aim, self.main_device, frozenset(self._groups))

    @cached_property
    def _own_nanoseconds(self) -> int:
        """The time of the model's operations outside of all blocks with tensors."""
        paths = list(outside_of(self.problem.graph))
        return sum(times * timing.outside_nanoseconds(paths) for timing, times in self._builder.timings)

    @cached_property
    def _groups(self) -> dict[str, int]:
        """The group of every block that must share a place with others, because of ties, rules, or shared caches."""
        graph = self.problem.graph
        block_of = {tensor.name: path for path in graph.blocks for tensor in graph.modules[path].tensors()}
        together = [[str(block_of.get(name, name)) for name in names] for names in graph.tied_groups]
        together += [[str(block_of.get(name, name)) for name in names] for names in self.problem.groups]
        if graph.measurement is not None:
            together += [list(bond) for bond in graph.measurement.bonds]
        groups = [names for names in united(together) if len(names) > 1]
        return {name: number for number, names in enumerate(groups) for name in names}

    def _transfers(self, blocks: list[Block]) -> tuple[Transfer, ...]:
        """Return the transfers between blocks; equal times are one object. Blocks without tensors count as the model's
        code.
        """
        position = {block.name: place for place, block in enumerate(blocks)}
        times: dict[tuple[int, ...], Mapping[tuple[Device, Device], int]] = {}
        transfers = []
        for crossing in crossings(self.problem.graph):
            source, target = position.get(crossing.maker, 0), position.get(crossing.reader, 0)
            sizes = (crossing.decode_bytes, crossing.prefill_bytes, crossing.decode_tensors, crossing.prefill_tensors)
            if sizes not in times:
                times[sizes] = self._nanoseconds(crossing)
            if source != target:
                transfers.append(Transfer(source, target, times[sizes]))
        return tuple(transfers)

    def _nanoseconds(self, crossing: Crossing) -> dict[tuple[Device, Device], int]:
        """Return the times of a crossing, by the devices of its maker and its reader."""
        devices = [*self._builder.accelerators, *([CPU] if CPU in self.problem.capacities else [])]
        by_devices: dict[tuple[Device, Device], int] = {}
        for pair in permutations(devices, 2):
            try:
                by_devices[pair] = sum(
                    times * timing.crossing_nanoseconds(crossing, *pair) for timing, times in self._builder.timings
                )
            except MissingFigureError:
                if all(device.is_accelerator for device in pair):
                    raise
        return by_devices
