"""States the placement of a chain as a mixed-integer program over counts of equal blocks.

docs/placement.md derives it. A variable counts the blocks of one class that take one option. The bytes of a device, its
largest peak and its largest piece are linear in these counts. So is the time, except for hops, the transfers between
neighbours, for which the program has a lower bound. `layout` assigns the counted options to blocks along the chain.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from typing import TYPE_CHECKING

from devmap_config.execution.overlap import total_nanoseconds
from devmap_config.placement.chain import together
from devmap_config.placement.milp import Milp

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.placement.chain import Block, Chain, Option, Place, Transfer
    from devmap_config.placement.milp import Terms

    _Way = tuple[tuple[int, ...], Option]
    """The index of an option for each block of a member, and the sum of these options."""

HOPS_UNIT = 1_000
"""The unit of the variable for hops, in nanoseconds, so that its coefficients are of the same magnitude as others."""

MOST_HOPS = 2**40
"""An upper limit of the cost of all hops, in that unit."""


@dataclass(frozen=True)
class BlockClass:
    """Blocks that are interchangeable: they have the same options, and take the same transfers from the same sources.

    Attributes:
        members: for each member, the positions of its blocks in the chain. A group, which is placed as one, is a member
            with several blocks.
        options: the options of a member, sorted by their content alone, so that the order is deterministic; of a group,
            the sums over its blocks.
        choices: for each option of a member, the index of the option of each of its blocks.
    """

    members: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]
    choices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Program:
    """The mixed-integer program of a chain.

    Attributes:
        chain: the blocks and the machine.
        classes: the classes of interchangeable blocks.
        milp: variables and constraints.
        counts: for each class and option, the index of the variable that counts the members with this option.
        objective: the nanoseconds of each variable.
        hops: the index of the variable for the cost of all hops, in units of `HOPS_UNIT` nanoseconds.
    """

    chain: Chain
    classes: tuple[BlockClass, ...]
    milp: Milp
    counts: tuple[tuple[int, ...], ...]
    objective: Terms
    hops: int

    @cached_property
    def variables(self) -> tuple[tuple[int, int, Option], ...]:
        """Each counting variable with the index of its class and its option."""
        return tuple(
            (variable, number, option)
            for number, (block_class, counts) in enumerate(zip(self.classes, self.counts, strict=True))
            for variable, option in zip(counts, block_class.options, strict=True)
        )

    def by_home(self, number: int) -> dict[Device, list[int]]:
        """Return the counting variables of a class, by the device that their options run on."""
        homes: dict[Device, list[int]] = {}
        for variable, option in zip(self.counts[number], self.classes[number].options, strict=True):
            homes.setdefault(option.home, []).append(variable)
        return homes


def program_of(chain: Chain, *, is_exact: bool = False) -> Program:
    """State the program of a chain.

    Args:
        chain: the blocks in the order in which they run, with their options.
        is_exact: give every block a class of its own and count transfers between neighbours exactly; otherwise blocks
            share classes and the cost of hops is bounded from below.
    """
    hopping = set() if is_exact else {(target - 1, target) for target in chain.hops}
    flowing = [transfer for transfer in chain.transfers if (transfer.source, transfer.target) not in hopping]
    classes, milp = _classes(chain, flowing), Milp()
    counts = tuple(
        tuple(milp.variable(len(block_class.members)) for _ in block_class.options) for block_class in classes
    )
    hops = milp.variable(MOST_HOPS, is_integer=False)
    objective = {hops: HOPS_UNIT}
    for block_class, variables in zip(classes, counts, strict=True):
        milp.equal(dict.fromkeys(variables, 1), len(block_class.members))
        for variable, option in zip(variables, block_class.options, strict=True):
            objective[variable] = option.nanoseconds
    program = Program(chain, classes, milp, counts, objective, hops)
    _add_memory(program)
    _add_ahead(program, objective)
    _add_flows(program, flowing, objective)
    if not is_exact:
        _add_hops(program)
    return program


# Classes


def _classes(chain: Chain, flowing: Sequence[Transfer]) -> tuple[BlockClass, ...]:
    """Return the classes of a chain's blocks, in the order of their first blocks; the source of a transfer to several
    blocks is alone.
    """
    sources = {transfer.source for transfer in flowing}
    given: dict[int, list[tuple[int, int]]] = {}
    for transfer in flowing:
        given.setdefault(transfer.target, []).append((transfer.source, id(transfer.nanoseconds)))
    alike: dict[object, list[int]] = {}
    for position, block in enumerate(chain.blocks):
        own = position if position in sources else None
        key = (block.options, tuple(sorted(given.get(position, ()))), own)
        alike.setdefault(key if block.group is None else block.group, []).append(position)
    return tuple(_class_of(chain, positions) for positions in alike.values())


def _class_of(chain: Chain, positions: list[int]) -> BlockClass:
    blocks = [chain.blocks[position] for position in positions]
    if blocks[0].group is None:
        members: tuple[tuple[int, ...], ...] = tuple((position,) for position in positions)
        ways: list[_Way] = [((index,), option) for index, option in enumerate(blocks[0].options)]
    else:
        members = (tuple(positions),)
        ways = list(_shared_options(blocks))
    order = {device: place for place, device in enumerate(chain.capacities)}

    def key(way: _Way) -> tuple[object, ...]:
        option = way[1]
        sizes = (option.demands, option.peaks, option.pieces, option.visits)
        place = (order.get(option.home, len(order)), option.home)
        return (*place, total_nanoseconds([option]), option.mode, *map(sorted, sizes))

    ways.sort(key=key)
    return BlockClass(members, tuple(option for _, option in ways), tuple(choice for choice, _ in ways))


def _shared_options(blocks: list[Block]) -> Iterator[_Way]:
    """Yield the options that all blocks of a group have in common: those with the same place.

    If blocks may have their cache on either of two devices, all of a group have it on the same one.
    """
    by_place: list[dict[Place, dict[bool, int]]] = [{} for _ in blocks]
    for indices, block in zip(by_place, blocks, strict=True):
        for index, option in enumerate(block.options):
            indices.setdefault(option.place, {})[option.offloads_cache] = index
    for place in by_place[0]:
        if all(place in indices for indices in by_place):
            either = [indices[place] for indices in by_place]
            choices = (
                tuple(options.get(offloads, options.get(not offloads, 0)) for options in either)
                for offloads in (False, True)
            )
            for choice in dict.fromkeys(choices):
                yield choice, together([block.options[index] for block, index in zip(blocks, choice, strict=True)])


# Constraints


def _add_memory(program: Program) -> None:
    """Constrain each device to hold all demands, plus the largest peak, piece and visit of a cache among its blocks."""
    chain, milp = program.chain, program.milp
    held: dict[Device, dict[int, int]] = {device: {} for device in chain.capacities}
    sized: dict[tuple[Device, str], dict[int, dict[int, list[int]]]] = {}
    for variable, number, option in program.variables:
        for device, size_bytes in option.demands:
            if size_bytes > chain.capacities.get(device, 0):  # and its coefficient would dwarf all others
                milp.upper[variable] = 0
            else:
                held.setdefault(device, {})[variable] = size_bytes
        for what, sizes in (("peak", option.peaks), ("piece", option.pieces), ("visit", option.visits)):
            for device, size_bytes in sizes:
                by_class = sized.setdefault((device, what), {}).setdefault(size_bytes, {})
                by_class.setdefault(number, []).append(variable)
    for (device, _), by_size in sized.items():
        _add_largest(program, held.setdefault(device, {}), by_size)
    for device, terms in held.items():
        milp.at_most(terms, chain.capacities.get(device, 0))


def _add_largest(program: Program, held: dict[int, int], by_size: Mapping[int, Mapping[int, list[int]]]) -> None:
    """Add a switch for each size, which is on if a block needs that size or more, and adds the difference to the next
    smaller.

    Thus the sum over the switches is the largest size that any block needs.
    """
    below_bytes, below = 0, None
    for size_bytes, by_class in sorted(by_size.items()):
        switch = program.milp.switch()
        held[switch] = size_bytes - below_bytes
        if below is not None:
            program.milp.at_most({switch: 1, below: -1}, 0)
        for number, variables in by_class.items():
            program.milp.at_most(dict.fromkeys(variables, 1) | {switch: -len(program.classes[number].members)}, 0)
        below_bytes, below = size_bytes, switch


def _add_ahead(program: Program, objective: dict[int, int]) -> None:
    """Bound the time of blocks that are copied ahead in a phase by the busiest card and by all cards together."""
    phases: dict[str, dict[Device | None, Counter[int]]] = {}
    for variable, _, option in program.variables:
        for block in option.ahead:
            by_card = phases.setdefault(block.phase, {})
            by_card.setdefault(block.card, Counter())[variable] += block.card_nanoseconds
            by_card.setdefault(None, Counter())[variable] += block.nanoseconds
    for by_card in phases.values():
        unit = max(max(terms.values()) for terms in by_card.values())
        period = program.milp.variable(len(program.chain.blocks), is_integer=False)
        objective[period] = unit
        for terms in by_card.values():
            program.milp.at_most({**terms, period: -unit}, 0)


def _add_flows(program: Program, transfers: Sequence[Transfer], objective: dict[int, int]) -> None:
    """State each transfer as a flow from the device of its source to those of its targets; equal ones share a flow."""
    class_of = {
        position: number
        for number, block_class in enumerate(program.classes)
        for member in block_class.members
        for position in member
    }
    flows: Counter[tuple[int, int, int]] = Counter()
    times = {}
    for transfer in transfers:
        source, target, key = class_of[transfer.source], class_of[transfer.target], id(transfer.nanoseconds)
        times[key] = transfer.nanoseconds
        if source != target:
            flows[source, target, key] += 1
    for (source, target, key), count in flows.items():
        targets = len(program.classes[target].members)
        makers, takers = program.by_home(source), program.by_home(target)
        flow = {(one, other): program.milp.variable(targets, is_integer=False) for one in makers for other in takers}
        for pair, variable in flow.items():
            objective[variable] = count // targets * times[key].get(pair, 0)
        for home, variables in makers.items():
            through = {flow[home, other]: 1 for other in takers}
            program.milp.equal(through | dict.fromkeys(variables, -targets), 0)
        for home, variables in takers.items():
            through = {flow[other, home]: 1 for other in makers}
            program.milp.equal(through | dict.fromkeys(variables, -1), 0)


def _add_hops(program: Program) -> None:
    """Bound the cost of hops from below, without knowing the order in which blocks will run.

    For each price, take the rows of blocks between which every hop costs at least that much: all blocks for the lowest
    price, then those without the cheapest hops, and so on. The hops of each such set are part of all hops.
    """
    hops = program.chain.hops
    cheapest = {target: min(times.values(), default=0) for target, times in hops.items()}
    for price in sorted({0, *cheapest.values()} - {0}):
        total = {program.hops: -HOPS_UNIT}
        row: list[int] = []
        for target in range(1, len(program.chain.blocks) + 1):
            if cheapest.get(target, 0) >= price:
                row = [*(row or [target - 1]), target]
            elif row:
                total |= _add_walk(program, row)
                row = []
        program.milp.at_most(total, 0)


def _add_walk(program: Program, row: list[int]) -> Terms:
    """State that a row of blocks is a walk over the devices that they use, and return the least cost of its hops.

    The walk stops at each used device at least once, and at most as often as blocks run there. Every stop but the first
    is entered from another device, and every stop but the last is left. Devices with equal hop prices are counted
    together.
    """
    chain, milp = program.chain, program.milp
    times = list({id(chain.hops[target]): chain.hops[target] for target in row[1:]}.values())
    prices = {
        pair: min(prices_of_hop.get(pair, 0) for prices_of_hop in times) for pair in permutations(chain.devices, 2)
    }
    kinds = _kinds(chain.devices, prices)
    hops = {
        (source, target): milp.variable(len(row), is_integer=False)
        for source, target in product(range(len(kinds)), repeat=2)
        if source != target or len(kinds[source]) > 1
    }
    ends = [_end(program, kinds, row[place]) for place in (0, -1)]
    for kind, devices in enumerate(kinds):
        entered, left = (
            {hop: 1 for pair, hop in hops.items() if pair[side] == kind} | end[kind]
            for side, end in zip((1, 0), ends, strict=True)
        )
        milp.equal(_difference(entered, left), 0)
        used = {use_of(program, milp, device, set(row)): 1 for device in devices}
        milp.at_most(_difference(used, entered), 0)
        milp.at_most(_difference(entered, _blocks_on(program, devices, set(row))), 0)
    return {hop: prices[kinds[source][0], kinds[target][-1]] for (source, target), hop in hops.items()}


def _kinds(devices: Sequence[Device], prices: Mapping[tuple[Device, Device], int]) -> list[list[Device]]:
    """Return the devices grouped by the prices of hops to and from them."""
    kinds: list[list[Device]] = []
    for device in devices:
        for kind in kinds:
            first = kind[0]
            others = [other for other in devices if other not in (device, first)]
            is_alike = prices[device, first] == prices[first, device] and all(
                prices[device, other] == prices[first, other] and prices[other, device] == prices[other, first]
                for other in others
            )
            if is_alike:
                kind.append(device)
                break
        else:
            kinds.append([device])
    return kinds


def _end(program: Program, kinds: list[list[Device]], position: int) -> list[dict[int, int]]:
    """Return the terms that are 1 if a walk ends on each kind of device.

    The block at `position` determines the end, if it is alone in its class; otherwise free variables represent it.
    """
    for number, block_class in enumerate(program.classes):
        if len(block_class.members) == 1 and position in block_class.members[0]:
            homes = program.by_home(number)
            return [{variable: 1 for device in kind for variable in homes.get(device, ())} for kind in kinds]
    ends = [program.milp.variable(1, is_integer=False) for _ in kinds]
    program.milp.equal(dict.fromkeys(ends, 1), 1)
    return [{end: 1} for end in ends]


def _blocks_on(program: Program, devices: Sequence[Device], positions: set[int]) -> Terms:
    """Return terms that count at least the blocks at `positions` on some devices; of a class, all members are
    counted.
    """
    counts: dict[int, int] = {}
    for number, block_class in enumerate(program.classes):
        inside = max(len(positions.intersection(member)) for member in block_class.members)
        homes = program.by_home(number)
        counts |= {variable: inside for device in devices for variable in homes.get(device, ()) if inside}
    return counts


def _difference(terms: Terms, others: Terms) -> dict[int, int]:
    """Return one linear expression minus another."""
    return {variable: terms.get(variable, 0) - others.get(variable, 0) for variable in dict.fromkeys([*terms, *others])}


def use_of(program: Program, milp: Milp, device: Device, positions: set[int]) -> int:
    """Add a switch that is on if one of the blocks at `positions` runs on a device, and return its variable."""
    switch = milp.switch()
    for number, block_class in enumerate(program.classes):
        inside = sum(not positions.isdisjoint(member) for member in block_class.members)
        here = program.by_home(number).get(device)
        if inside and here:
            outside = len(block_class.members) - inside
            milp.at_most(dict.fromkeys(here, 1) | {switch: -inside}, outside)
    return switch
