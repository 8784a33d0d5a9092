"""Among placements that are nearly as fast as the fastest, the one that users would rather have: docs/placement.md."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from devmap_config.placement.layout import in_runs, laid_out, order_in
from devmap_config.placement.program import program_of, use_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.devices import Device
    from devmap_config.placement.chain import Chain, Choice
    from devmap_config.placement.layout import Runs
    from devmap_config.placement.milp import Milp, Terms
    from devmap_config.placement.program import Program

    Wish = Callable[[Program, Milp], Terms]
    """What there is to be little of: adds the variables and constraints that it takes, and returns what it counts."""

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


class _Stated(NamedTuple):
    program: Program
    milp: Milp
    runs: Runs | None


@dataclass
class _Granted:
    """What was granted so far: limits of time and of wishes, and the order of devices that are used in one run each."""

    most_nanoseconds: int
    wishes: list[tuple[Wish, int]] = field(default_factory=list)
    order: tuple[Device, ...] = ()

    def stated(self, chain: Chain) -> _Stated:
        """State the program of a chain within all of it."""
        program = program_of(chain)
        runs = in_runs(program, self.order) if self.order else None
        milp = program.milp if runs is None else runs.milp
        milp.at_most(program.objective, self.most_nanoseconds)
        for wish, most in self.wishes:
            milp.at_most(wish(program, milp), most)
        return _Stated(program, milp, runs)

    def is_possible(self, chain: Chain) -> bool:
        """Return whether a placement of this chain that keeps to all of it is found."""
        return self.stated(chain).milp.minimize({}, nodes=WISH_NODES).values is not None

    def grant(self, chain: Chain, wish: Wish) -> None:
        """Hold the least that a wish can come to, where that is found."""
        program, milp, _ = self.stated(chain)
        terms = wish(program, milp)
        values = milp.minimize(terms, relative_gap=0, nodes=WISH_NODES).values
        if values is not None:
            self.wishes.append((wish, sum(factor * values[variable] for variable, factor in terms.items())))

    def choice(self, chain: Chain) -> Choice | None:
        """Return the fastest choice that keeps to all of it."""
        program, milp, runs = self.stated(chain)
        values = milp.minimize(_tidy(program), nodes=WISH_NODES).values
        return None if values is None else laid_out(program, values, runs)


def preferred(chain: Chain, most_nanoseconds: int, contexts: Contexts | None) -> Choice | None:
    """Return the choice that is wished for most among what takes no longer than that; `None` where none is found.

    Each wish is granted as far as those before it leave room.

    Args:
        chain: what is placed.
        most_nanoseconds: what the choice may take.
        contexts: the chain at other context lengths, where it has such.
    """
    granted = _Granted(most_nanoseconds)
    granted.grant(chain, _apart_from_a_map)
    granted.grant(chain, _copied_in)
    tried, length = chain, 0 if contexts is None else contexts.length
    if contexts is not None and contexts.least > length:
        longer = contexts.chain_at(contexts.least)
        if granted.is_possible(longer):
            tried, length = longer, contexts.least
    granted.grant(tried, _devices_used)
    granted.grant(tried, _late_devices)
    granted.order = _order_of_runs(granted, tried)
    if contexts is not None:
        tried = _with_longest_context(granted, tried, length, contexts)
    choice = granted.choice(tried)
    if choice is None or not (tried.is_feasible(choice) and chain.is_feasible(choice)):
        return None
    return choice if chain.nanoseconds(choice) <= most_nanoseconds else None


# The wishes


def _apart_from_a_map(program: Program, _: Milp) -> Terms:
    """The blocks that no `device_map` can say: something of them computes on the CPU beside accelerators."""
    return {variable: 1 for variable, _, option in program.variables if option.mode[:1] in (("part",), ("computed",))}


def _copied_in(program: Program, _: Milp) -> Terms:
    """The blocks that are stored on the CPU or the disk."""
    return {variable: 1 for variable, _, option in program.variables if option.mode[:1] == ("streamed",)}


def _devices_used(program: Program, milp: Milp) -> Terms:
    """The devices on which blocks run."""
    every = set(range(len(program.chain.blocks)))
    return {use_of(program, milp, device, every): 1 for device in program.chain.devices}


def _late_devices(program: Program, milp: Milp) -> Terms:
    """The places of the devices that are used in the order in which they are listed."""
    return {variable: place for place, variable in enumerate(_devices_used(program, milp))}


def _order_of_runs(granted: _Granted, chain: Chain) -> tuple[Device, ...]:
    """The devices as they are listed, or as the fastest has them, where one run of blocks on each is possible."""
    choice = granted.choice(chain)
    order = () if choice is None else order_in(program_of(chain), choice)
    orders = dict.fromkeys((tuple(device for device in chain.devices if device in order), order))
    return next((each for each in orders if each and replace(granted, order=each).is_possible(chain)), ())


def _with_longest_context(granted: _Granted, chain: Chain, length: int, contexts: Contexts) -> Chain:
    """The chain, which is of one context length, at the longest at which all that was granted still is."""
    best, fits, too_long = chain, length, contexts.longest + 1
    while too_long - fits > max(fits // CONTEXT_STEPS, 1):
        middle = min(2 * fits, (fits + too_long) // 2)
        longer = contexts.chain_at(middle)
        if granted.is_possible(longer):
            best, fits = longer, middle
        else:
            too_long = middle
    return best


def _tidy(program: Program) -> Terms:
    """The time, and a nanosecond or so for what is not resident: of blocks that take equally long, the first are."""
    objective = dict(program.objective)
    for variable, number, option in program.variables:
        if option.mode != ("resident",):
            objective[variable] += len(program.classes) - number
    return objective
