"""Among placements that are nearly as fast as the fastest, the one that users would rather have: docs/placement.md."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from devmap_config.placement.chain import Block
from devmap_config.placement.layout import in_runs, laid_out, laid_out_in_runs, order_in
from devmap_config.placement.program import INFINITY, NANOSECONDS_PER_UNIT, program_of, use_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.devices import Device
    from devmap_config.placement.chain import Chain, Choice
    from devmap_config.placement.program import Program, Rows, Terms
    from devmap_config.placement.solver import Solution

    Wish = Callable[[Program, Rows], Terms]
    """What there is to be little of: adds the columns and rows that it takes, and gives what it counts."""

CONTEXT_STEPS = 16
"""The longest context is looked for until it is known to this part of itself."""


WISH_NODES = 50
"""So much of the tree is searched for a wish: what is not found soon is not granted."""


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """The same chain at other context lengths.

    `length` is the workload's, `least` what is wished for at least, and `longest` as far as is looked. `chain_at` gives
    the chain with what its blocks hold and need at a length.
    """

    length: int
    least: int
    longest: int
    chain_at: Callable[[int], Chain]


@dataclass
class _Wishing:
    """What was granted so far: a limit of time, limits of wishes, and the order of devices that are used in one run."""

    limit: float
    granted: list[tuple[Wish, float]] = field(default_factory=list)
    order: tuple[Device, ...] | None = None

    def stated(self, chain: Chain) -> _Stated:
        """State the program of a chain within all of it."""
        program = program_of(chain)
        rows, costs = program.rows.copy(), program.costs
        ends: list[list[int]] = []
        if self.order:
            rows, costs, ends = in_runs(program, self.order)
        rows.row(costs, -INFINITY, self.limit)
        for wish, most in self.granted:
            rows.row(wish(program, rows), -INFINITY, most)
        return _Stated(program, rows, costs, ends)

    def is_possible(self, chain: Chain) -> bool:
        """Whether a placement of this chain keeps to all of it."""
        return self.stated(chain).rows.minimized({}, nodes=WISH_NODES).values is not None

    def grant(self, chain: Chain, wish: Wish) -> bool:
        """Hold what comes to the least of a wish; whether it could be found."""
        stated = self.stated(chain)
        terms = wish(stated.program, stated.rows)
        solved = stated.rows.minimized(terms, relative_gap=0, counts=True, nodes=WISH_NODES)
        if solved.values is None:
            return False
        self.granted.append((wish, sum(factor * solved.values[column] for column, factor in terms.items()) + 0.5))
        return True

    def choice(self, chain: Chain) -> Choice | None:
        """The fastest that keeps to all of it, laid out along the chain."""
        stated = self.stated(chain)
        values = stated.rows.minimized(_tidy(stated.program, stated.costs)).values
        if values is None:
            return None
        if self.order:
            return laid_out_in_runs(stated.program, values, self.order, stated.ends)
        return laid_out(stated.program, values)


class _Stated(NamedTuple):
    program: Program
    rows: Rows
    costs: Terms
    ends: list[list[int]]


def preferred(chain: Chain, fastest: Solution, most_nanoseconds: int, contexts: Contexts | None) -> Choice:
    """Return what is wished for most among what takes no longer than that: the fastest choice, or another.

    Each wish is granted as far as those before it leave room.

    Args:
        chain: what is placed.
        fastest: the fastest choice that was found.
        most_nanoseconds: what the choice may take.
        contexts: the chain at other context lengths, where it has such.
    """
    wishing = _Wishing(most_nanoseconds / NANOSECONDS_PER_UNIT)
    if not (wishing.grant(chain, _apart_from_a_map) and wishing.grant(chain, _copied_in)):
        return fastest.choice
    tried, start = chain, 0 if contexts is None else contexts.length
    if contexts is not None and contexts.least > start:
        longer = contexts.chain_at(contexts.least)
        if wishing.is_possible(longer):
            tried, start = longer, contexts.least
    if not (wishing.grant(tried, _devices_used) and wishing.grant(tried, _late_devices)):
        return fastest.choice
    wishing.order = _order_of_runs(wishing, tried)
    if contexts is not None:
        tried = _with_longest_context(wishing, tried, start, contexts)
    choice = wishing.choice(tried)
    if choice is None or not (tried.is_feasible(choice) and chain.is_feasible(choice)):
        return fastest.choice
    return choice if chain.nanoseconds(choice) <= most_nanoseconds else fastest.choice


def _order_of_runs(wishing: _Wishing, chain: Chain) -> tuple[Device, ...] | None:
    """The devices as they are listed, or as the fastest has them, where one run of blocks on each is possible."""
    choice = wishing.choice(chain)
    if choice is None:
        return None
    order = order_in(program_of(chain), choice)
    for each in dict.fromkeys((tuple(device for device in chain.devices if device in order), order)):
        if replace(wishing, order=each).is_possible(chain):
            return each
    return None


def _tidy(program: Program, costs: Terms) -> Terms:
    """The costs, and a nanosecond or so for what is not resident: of blocks that take equally long, the first are."""
    found = dict(costs)
    for place, (columns, each) in enumerate(zip(reversed(program.numbers), reversed(program.classes), strict=True), 1):
        for column, option in zip(columns, each.options, strict=True):
            if option.mode != ("resident",):
                found[column] += place / NANOSECONDS_PER_UNIT
    return found


def _apart_from_a_map(program: Program, _: Rows) -> Terms:
    """The blocks that no `device_map` can say: something of them computes on the CPU beside accelerators."""
    return {column: 1 for column, _, option in program.ways if option.mode[:1] in (("part",), ("computed",))}


def _copied_in(program: Program, _: Rows) -> Terms:
    """The blocks that are stored on the CPU or the disk."""
    return {column: 1 for column, _, option in program.ways if option.mode[:1] == ("streamed",)}


def _devices_used(program: Program, rows: Rows) -> Terms:
    every = set(range(len(program.chain.blocks)))
    return {use_of(program, rows, device, every): 1 for device in program.chain.devices}


def _late_devices(program: Program, rows: Rows) -> Terms:
    """The places of the devices that are used in the order in which they are listed."""
    return {column: place for place, column in enumerate(_devices_used(program, rows))}


def _with_longest_context(wishing: _Wishing, chain: Chain, start: int, contexts: Contexts) -> Chain:
    """The chain, which starts at one context length, at the longest at which all that was granted still is."""
    best, fits, too_long = chain, start, contexts.longest + 1
    while too_long - fits > max(fits // CONTEXT_STEPS, 1):
        length = min(2 * fits, (fits + too_long) // 2)
        longer = contexts.chain_at(length)
        if wishing.is_possible(longer):
            best, fits = longer, length
        else:
            too_long = length
    return best


def with_times_of(chain: Chain, other: Chain) -> Chain:
    """The chain with the times of another that has the same options."""
    blocks = (
        Block(
            block.name,
            tuple(
                replace(option, nanoseconds=timed.nanoseconds)
                for option, timed in zip(block.options, timing.options, strict=True)
            ),
            block.group,
        )
        for block, timing in zip(chain.blocks, other.blocks, strict=True)
    )
    return replace(chain, blocks=tuple(blocks), entering=other.entering, gifts=other.gifts)
