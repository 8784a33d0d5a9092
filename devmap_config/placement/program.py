"""The placement of a chain as a mixed-integer program over numbers of equal blocks, solved by HiGHS.

docs/placement.md derives it. A variable counts the blocks of one class that take one option; what a device holds, its
largest peak and its largest piece are linear in these, and so is the time, but for hops between neighbours, of which
the program has a lower bound. `layout` gives the numbers a place along the chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import highspy
import numpy as np

from devmap_config.placement.chain import Chain, Option

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.placement.chain import Block, Hops

NANOSECONDS_PER_UNIT = 1_000
"""The program counts microseconds: its coefficients are then near those of bytes, which are shares of a device."""

RELATIVE_GAP = 5e-4
"""HiGHS stops where its best answer is above its bound by at most this part."""

MOST_NODES = 500
"""Of the tree that HiGHS searches: a limit that is the same on every machine. Beyond it the gap is what it then is."""

TOLERANCE = 1e-7
"""By so much HiGHS may break a row (a part of a device's memory) or take a number for a whole one."""

BOUND_TOLERANCE = 1e-6
"""So much of itself is taken off the bound that HiGHS proves in floating point."""

MOST_UNITS = 2**40
"""No sum of hops is above this, in units."""

INFINITY = highspy.kHighsInf


class _QuietHighs(highspy.Highs):
    """HiGHS without a word on stdout: it greets as soon as callbacks are there, which is before it can be told."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def enableCallbacks(self) -> None:  # noqa: N802
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class BlockClass:
    """Blocks that may change places: they have the same options, and are given the same by the same blocks.

    Attributes:
        members: by member the positions of its blocks: one, or all of a group, which is placed as one.
        options: of a group: what its blocks hold and take together.
        choices: for every option, which option of each block of a member it is.
    """

    members: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]
    choices: tuple[tuple[int, ...], ...]


def classes_of(chain: Chain) -> tuple[BlockClass, ...]:
    """Return the classes of a chain's blocks, in the order of their first blocks."""
    makers = {gift.maker for gift in chain.gifts}
    given: dict[int, list[tuple[int, int]]] = {}
    for gift in chain.gifts:
        given.setdefault(gift.reader, []).append((gift.maker, id(gift.hops)))
    found: dict[object, list[int]] = {}
    for position, block in enumerate(chain.blocks):
        own = position if position in makers else None
        alike = (block.options, tuple(sorted(given.get(position, ()))), own)
        found.setdefault(alike if block.group is None else block.group, []).append(position)
    return tuple(_class_of(chain, positions) for positions in found.values())


def _class_of(chain: Chain, positions: list[int]) -> BlockClass:
    first = chain.blocks[positions[0]]
    if first.group is None:
        every = tuple((index,) for index in range(len(first.options)))
        return BlockClass(tuple((position,) for position in positions), first.options, every)
    blocks = [chain.blocks[position] for position in positions]
    options, choices = [], []
    for place in dict.fromkeys(option.place for option in first.options):
        choice = [_index_at(block, place) for block in blocks]
        if None not in choice:
            choices.append(tuple(index for index in choice if index is not None))
            options.append(_together([block.options[i] for block, i in zip(blocks, choices[-1], strict=True)]))
    return BlockClass((tuple(positions),), tuple(options), tuple(choices))


def _index_at(block: Block, place: tuple[object, ...]) -> int | None:
    return next((index for index, option in enumerate(block.options) if option.place == place), None)


def _together(options: list[Option]) -> Option:
    """What blocks hold, need and take that are placed as one."""
    demands: Counter[Device] = Counter()
    peaks: dict[Device, int] = {}
    pieces: dict[Device, int] = {}
    for option in options:
        demands.update(dict(option.demands))
        for largest, sizes in ((peaks, option.peaks), (pieces, option.pieces)):
            for device, size_bytes in sizes:
                largest[device] = max(largest.get(device, 0), size_bytes)
    return Option(
        home=options[0].home,
        nanoseconds=sum(option.nanoseconds for option in options),
        demands=tuple(demands.items()),
        peaks=tuple(peaks.items()),
        pieces=tuple(pieces.items()),
        mode=options[0].mode,
    )


Terms = Mapping[int, float]
"""Coefficients by column."""


@dataclass(frozen=True, slots=True)
class Solved:
    """What HiGHS found: whole numbers for the columns, if any, and what the objective cannot be below."""

    values: tuple[int, ...] | None
    bound: float


@dataclass
class Rows:
    """Columns and rows of a mixed-integer program; every column is at least 0."""

    upper: list[int] = field(default_factory=list)
    is_integer: list[bool] = field(default_factory=list)
    terms: list[Terms] = field(default_factory=list)
    limits: list[tuple[float, float]] = field(default_factory=list)

    def column(self, most: int, *, is_integer: bool = True) -> int:
        """Add a variable and return its number."""
        self.upper.append(most)
        self.is_integer.append(is_integer)
        return len(self.upper) - 1

    def row(self, terms: Terms, least: float, most: float) -> None:
        """Add a constraint: a sum within limits."""
        self.terms.append(terms)
        self.limits.append((least, most))

    def copy(self) -> Rows:
        """Return the same, to which more can be added."""
        return Rows(list(self.upper), list(self.is_integer), list(self.terms), list(self.limits))

    def minimized(
        self, costs: Terms, *, relative_gap: float = RELATIVE_GAP, counts: bool = False, nodes: int = MOST_NODES
    ) -> Solved:
        """Return the least sum of the costs: one thread and a fixed seed, so that the answer is always the same.

        Args:
            costs: what is to be little of, by column.
            relative_gap: by what part of it the answer may be above what is proven.
            counts: whether the sum is a whole number, so that less than one below the answer is nothing.
            nodes: how much of the tree is searched at most.
        """
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.upper), len(self.terms)
        model.col_cost_ = np.array([costs.get(column, 0) for column in range(len(self.upper))], float)
        model.col_lower_, model.col_upper_ = np.zeros(len(self.upper)), np.array(self.upper, float)
        model.row_lower_, model.row_upper_ = (np.array(each, float) for each in zip(*self.limits, strict=True))
        kinds = {True: highspy.HighsVarType.kInteger, False: highspy.HighsVarType.kContinuous}
        model.integrality_ = [kinds[each] for each in self.is_integer]
        matrix = model.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *map(len, self.terms)], dtype=np.int32)
        matrix.index_ = np.array([column for terms in self.terms for column in terms], np.int32)
        matrix.value_ = np.array([value for terms in self.terms for value in terms.values()], float)
        solver = _QuietHighs()
        options: dict[str, bool | float | str] = {
            "threads": 1, "random_seed": 0, "mip_rel_gap": relative_gap, "mip_max_nodes": nodes,
            "mip_abs_gap": 0.99 if counts else 1e-6, "presolve": "off",  # which now and then takes minutes
            "mip_feasibility_tolerance": TOLERANCE, "primal_feasibility_tolerance": TOLERANCE,
        }  # fmt: skip
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(model)
        solver.run()
        info = solver.getInfo()
        is_found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        values = np.rint(solver.getSolution().col_value).astype(int).tolist() if is_found else None
        is_infeasible = solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        return Solved(None if values is None else tuple(values), INFINITY if is_infeasible else info.mip_dual_bound)


@dataclass(frozen=True)
class Program:
    """The program of a chain: `numbers` are its columns by class and option, `costs` what the objective counts."""

    chain: Chain
    classes: tuple[BlockClass, ...]
    rows: Rows
    numbers: tuple[tuple[int, ...], ...]
    costs: Terms

    @cached_property
    def ways(self) -> tuple[tuple[int, int, Option], ...]:
        """Every option: the column of its number, how many blocks may take it, and what it is."""
        return tuple(
            (column, len(each.members), option)
            for each, columns in zip(self.classes, self.numbers, strict=True)
            for column, option in zip(columns, each.options, strict=True)
        )


def program_of(chain: Chain) -> Program:
    """State the program of a chain."""
    classes, rows = classes_of(chain), Rows()
    numbers = tuple(tuple(rows.column(len(each.members)) for _ in each.options) for each in classes)
    costs: dict[int, float] = {}
    for each, columns in zip(classes, numbers, strict=True):
        rows.row(dict.fromkeys(columns, 1), len(each.members), len(each.members))
        for column, option in zip(columns, each.options, strict=True):
            costs[column] = option.nanoseconds / NANOSECONDS_PER_UNIT
    program = Program(chain, classes, rows, numbers, costs)
    _add_memory(program)
    _add_gifts(program, costs)
    _add_hops(program, costs)
    return program


def _add_memory(program: Program) -> None:
    """A device holds all demands, the largest peak and the largest piece of what uses it."""
    chain, rows = program.chain, program.rows
    held: dict[Device, Counter[int]] = {device: Counter() for device in chain.capacities}
    largest: dict[tuple[str, Device], dict[int, list[tuple[int, int]]]] = {}
    for column, most, option in program.ways:
        for device, size_bytes in option.demands:
            held.setdefault(device, Counter())[column] += size_bytes
        for what, sizes in (("peak", option.peaks), ("piece", option.pieces)):
            for device, size_bytes in sizes:
                largest.setdefault((what, device), {}).setdefault(size_bytes, []).append((column, most))
    for (_, device), by_size in largest.items():
        below = 0
        for size_bytes in sorted(by_size):  # a switch for each size: on where a block needs that much or more
            switch = rows.column(1)
            held.setdefault(device, Counter())[switch] += size_bytes - below
            below = size_bytes
            for column, most in (each for size, users in by_size.items() if size >= size_bytes for each in users):
                rows.row({column: 1, switch: -most}, -INFINITY, 0)
    for device, terms in held.items():
        if terms:
            capacity = max(chain.capacities.get(device, 0), 1)
            shares = {column: size_bytes / capacity for column, size_bytes in terms.items()}
            rows.row(shares, -INFINITY, chain.capacities.get(device, 0) / capacity)


def _add_gifts(program: Program, costs: dict[int, float]) -> None:
    """What is given to blocks further on is a flow from where its maker runs to where they run."""
    class_of = {
        position: number
        for number, each in enumerate(program.classes)
        for member in each.members
        for position in member
    }
    flows: Counter[tuple[int, int, int]] = Counter()
    hops_by_id: dict[int, Hops] = {}
    for gift in program.chain.gifts:
        if class_of[gift.maker] != class_of[gift.reader]:
            flows[class_of[gift.maker], class_of[gift.reader], id(gift.hops)] += 1
            hops_by_id[id(gift.hops)] = gift.hops
    for (maker, reader, number), count in flows.items():
        _add_flow(program, costs, maker, reader, {pair: count * cost for pair, cost in hops_by_id[number].items()})


def _add_flow(program: Program, costs: dict[int, float], maker: int, reader: int, hops: Hops) -> None:
    rows, readers = program.rows, len(program.classes[reader].members)
    by_home: list[dict[Device, dict[int, float]]] = []
    for number, weight in ((maker, readers), (reader, 1)):
        homes: dict[Device, dict[int, float]] = {}
        for column, option in zip(program.numbers[number], program.classes[number].options, strict=True):
            homes.setdefault(option.home, {})[column] = -weight
        by_home.append(homes)
    makers, takers = by_home
    flow = {(one, other): rows.column(readers, is_integer=False) for one in makers for other in takers}
    for pair, column in flow.items():
        costs[column] = hops.get(pair, 0) / readers / NANOSECONDS_PER_UNIT
    for home, columns in makers.items():
        rows.row({flow[home, other]: 1.0 for other in takers} | columns, 0, 0)
    for home, columns in takers.items():
        rows.row({flow[one, home]: 1.0 for one in makers} | columns, 0, 0)


def _add_hops(program: Program, costs: dict[int, float]) -> None:
    """State what hops cost at least: of the devices that blocks in a row use, all but one are entered from another.

    In which order blocks run the program does not know. So rows are looked at in which every hop costs some price or
    more: all blocks, those without the cheapest hops, and so on; the hops of each are part of the hops of all.
    """
    chain, rows = program.chain, program.rows
    cheapest = [min(hops.values(), default=0) for hops in chain.entering]
    total = rows.column(MOST_UNITS, is_integer=False)
    costs[total] = 1
    for price in sorted(set(cheapest) - {0}):
        terms: dict[int, float] = {}
        for stretch in _stretches([cost >= price for cost in cheapest]):
            switches = [use_of(program, rows, device, set(stretch)) for device in chain.devices]
            first = rows.column(1)
            rows.row(dict.fromkeys(switches, 1.0) | {first: -len(switches)}, -INFINITY, 0)
            terms |= dict.fromkeys(switches, price / NANOSECONDS_PER_UNIT) | {first: -price / NANOSECONDS_PER_UNIT}
        rows.row(terms | {total: -1.0}, -INFINITY, 0)


def _stretches(is_priced: Sequence[bool]) -> list[list[int]]:
    """Blocks in a row each of which is entered for a price from the one before, by positions."""
    stretches: list[list[int]] = [[]]
    for position, is_entered_so in enumerate(is_priced):
        if not is_entered_so:
            stretches.append([])
        stretches[-1].append(position)
    return [stretch for stretch in stretches if len(stretch) > 1]


def use_of(program: Program, rows: Rows, device: Device, positions: set[int]) -> int:
    """Add a switch that is on where one of these blocks runs on a device, and return its column."""
    switch = rows.column(1)
    for each, columns in zip(program.classes, program.numbers, strict=True):
        inside = sum(bool(positions.intersection(member)) for member in each.members)
        here = [column for column, option in zip(columns, each.options, strict=True) if option.home == device]
        if inside and here:
            outside = len(each.members) - inside
            rows.row(dict.fromkeys(here, 1.0) | {switch: -inside}, -INFINITY, outside)
    return switch
