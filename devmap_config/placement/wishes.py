"""Selects, among placements that are nearly as fast as the fastest, the one that users would prefer: docs/placement.md.

To add a wish, state the quantity to minimise as a sum over the program's variables, as `_copied_in` does, and add it to
`WISHES` at its rank, with the words in which `explain` reports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.amounts import counted, format_bytes
from devmap_config.placement.chain import STREAMED
from devmap_config.placement.layout import in_runs, in_turns, laid_out, order_in
from devmap_config.placement.program import program_of, use_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.devices import Device
    from devmap_config.placement.chain import Chain, Choice
    from devmap_config.placement.layout import Runs
    from devmap_config.placement.milp import Milp, Terms
    from devmap_config.placement.program import Program

    Sum = Callable[[Program, Milp], Terms]
    """A quantity to minimise: adds the variables and constraints that it needs, and returns its terms."""

CONTEXT_STEPS = 16
"""The search for the longest context stops when it is known to this part, a sixteenth, of itself."""

WISH_NODES = 50
"""The most nodes of the tree that are searched for a wish; one that takes longer is not granted."""


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """The same chain at other context lengths.

    `length` is the workload's, `least` the least that is wished for, and `longest` the limit of the search. `chain_at`
    returns the chain with the memory of its blocks at a length.
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
class _GrantedWishes:
    """The wishes that were granted so far.

    Attributes:
        chain: the chain at the granted context.
        most_nanoseconds: the limit of time.
        sums: sums with their limits.
        order: the order of devices that are used in one run each.
    """

    chain: Chain
    contexts: Contexts | None
    most_nanoseconds: int
    length: int = 0
    sums: list[tuple[Sum, int]] = field(default_factory=list)
    order: tuple[Device, ...] = ()

    def stated(self) -> _Stated:
        """State the program with all granted wishes as constraints."""
        program = program_of(self.chain)
        runs = in_runs(program, self.order) if self.order else None
        milp = program.milp if runs is None else runs.milp
        milp.at_most(program.objective, self.most_nanoseconds)
        for count, most in self.sums:
            milp.at_most(count(program, milp), most)
        return _Stated(program, milp, runs)

    @property
    def is_possible(self) -> bool:
        """True if a placement that keeps all granted wishes is found."""
        return self.stated().milp.minimize({}, nodes=WISH_NODES).values is not None

    def choice(self) -> Choice | None:
        """Return the fastest choice that keeps all granted wishes."""
        program, milp, runs = self.stated()
        values = milp.minimize(_tidy(program), nodes=WISH_NODES).values
        return None if values is None else in_turns(self.chain, laid_out(program, values, runs))

    def grant_length(self, contexts: Contexts, length: int) -> bool:
        """Grant a context length if it is possible, and return whether it is."""
        longer = replace(self, chain=contexts.chain_at(length))
        if is_possible := longer.is_possible:
            self.chain, self.length = longer.chain, length
        return is_possible


def preferred(chain: Chain, most_nanoseconds: int, contexts: Contexts | None) -> Choice | None:
    """Return the preferred choice among those that take at most `most_nanoseconds`; `None` if none is found.

    Each wish is granted as far as those before it allow.

    Args:
        chain: what is placed.
        most_nanoseconds: the most time that the choice may take.
        contexts: the chain at other context lengths, if its cache grows.
    """
    granted = _GrantedWishes(chain, contexts, most_nanoseconds, length=0 if contexts is None else contexts.length)
    for wish in WISHES:
        wish.grant(granted)
    choice = granted.choice()
    if choice is None or not (granted.chain.is_feasible(choice) and chain.is_feasible(choice)):
        return None
    return choice if chain.nanoseconds(choice) <= most_nanoseconds else None


# Sums that wishes minimise


def _apart_from_a_map(program: Program, _: Milp) -> Terms:
    """Count the blocks that no `device_map` can express: computed on the CPU beside accelerators, or copied to other
    cards.
    """
    apart = ("part", "computed", "streamed elsewhere", "streamed around")
    return {variable: 1 for variable, _, option in program.variables if option.mode[0] in apart}


def _caches_offloaded(program: Program, _: Milp) -> Terms:
    """Count the blocks whose cache is on the CPU although it could stay on its device."""
    return {variable: 1 for variable, _, option in program.variables if option.offloads_cache}


def _copied_in(program: Program, _: Milp) -> Terms:
    """Count the blocks that are stored on the CPU or the disk."""
    return {variable: 1 for variable, _, option in program.variables if option.mode[0] in STREAMED}


def _devices_used(program: Program, milp: Milp) -> Terms:
    """Count the devices on which blocks run."""
    positions = set(range(len(program.chain.blocks)))
    return {use_of(program, milp, device, positions): 1 for device in program.chain.devices}


def _late_devices(program: Program, milp: Milp) -> Terms:
    """Sum up the indices of the used devices in the listed order."""
    return {variable: place for place, variable in enumerate(_devices_used(program, milp))}


def _tidy(program: Program) -> Terms:
    """Return the time plus about a nanosecond for each block that is not resident, so that the first of equal blocks
    are.
    """
    objective = dict(program.objective)
    for variable, number, option in program.variables:
        if option.mode != ("resident",) or option.offloads_cache:
            objective[variable] += len(program.classes) - number
    return objective


# How wishes are granted


def _little_of(count: Sum) -> Callable[[_GrantedWishes], None]:
    """Return a wish that minimises a sum, and then keeps it at that value."""

    def grant(granted: _GrantedWishes) -> None:
        program, milp, _ = granted.stated()
        if not (terms := count(program, milp)):
            return
        values = milp.minimize(terms, relative_gap=0, nodes=WISH_NODES).values
        if values is not None:
            granted.sums.append((count, sum(factor * values[variable] for variable, factor in terms.items())))

    return grant


def _least_context(granted: _GrantedWishes) -> None:
    """Grant the least wished context, if that is possible."""
    contexts = granted.contexts
    if contexts is not None and contexts.least > granted.length:
        granted.grant_length(contexts, contexts.least)


def _one_run_each(granted: _GrantedWishes) -> None:
    """Grant one run for each device, in the listed order or in that of the fastest choice, if that is possible."""
    choice = granted.choice()
    order = () if choice is None else order_in(program_of(granted.chain), choice)
    orders = dict.fromkeys((tuple(device for device in granted.chain.devices if device in order), order))
    granted.order = next(
        (candidate for candidate in orders if candidate and replace(granted, order=candidate).is_possible), ()
    )


def _long_context(granted: _GrantedWishes) -> None:
    """Grant the longest context that leaves all granted wishes possible."""
    contexts = granted.contexts
    too_long = 0 if contexts is None else contexts.longest + 1
    while contexts is not None and too_long - granted.length > max(granted.length // CONTEXT_STEPS, 1):
        middle = min(2 * granted.length, (granted.length + too_long) // 2)
        if not granted.grant_length(contexts, middle):
            too_long = middle


# The wishes


@dataclass(frozen=True, slots=True)
class Wish:
    """A wish beside time: how it is granted, the figure of a plan that it lowers, and how that is reported.

    `told` is called with the figure, and that of the fastest plan. A wish without these is not reported.
    """

    grant: Callable[[_GrantedWishes], None]
    figure: Callable[[Any], int] = lambda _: 0
    told: Callable[[int, int], str] = lambda *_: ""


def _map_in_words(after: int, before: int) -> str:
    computing = (
        "no module computes" if not after else "1 module computes" if after == 1 else f"{after:,} modules compute"
    )
    where = "on the CPU, or on another card than the first,"
    return f"{computing} {where} instead of {before:,}" + ("" if after else ", so that a plain device_map says it")


WISHES = (
    Wish(_little_of(_apart_from_a_map), lambda plan: len(plan.compute), _map_in_words),
    Wish(
        _little_of(_caches_offloaded),
        lambda plan: len(plan.offloaded_caches or ()),
        lambda after, before: f"{after:,} instead of {before:,} modules have their cache on the CPU",
    ),
    Wish(
        _little_of(_copied_in),
        lambda plan: plan.prediction.streamed_bytes_per_token or 0,
        lambda after, before: f"{format_bytes(before - after)} less is copied in at every forward",
    ),
    Wish(_least_context),
    Wish(
        _little_of(_devices_used),
        lambda plan: len({assignment.location.runs_on for assignment in plan.assignments}),
        lambda after, before: f"{after:,} devices run it instead of {before:,}",
    ),
    Wish(_little_of(_late_devices)),
    Wish(
        _one_run_each,
        lambda plan: plan.prediction.hops or 0,
        lambda after, before: f"activations change devices {counted(after, 'time')} in a forward instead of {before:,}",
    ),
    Wish(
        _long_context,
        lambda plan: -(plan.prediction.longest_context or 0),
        lambda after, before: f"the context may grow to {-after:,} tokens instead of {-before:,}",
    ),
)
"""The wishes in order of priority; each is granted as far as those before it allow."""
