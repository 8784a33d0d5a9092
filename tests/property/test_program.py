"""The integer program of a chain and its layout agree with every choice of small problems: feasibility and times."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby, pairwise, permutations, product

import numpy as np
import pytest
from test_solver import all_figures, option_of, small_chain, with_transfers

from devmap_config.placement import solver
from devmap_config.placement.chain import Block, Chain, Transfer
from devmap_config.placement.layout import in_runs, laid_out, order_in
from devmap_config.placement.milp import INFINITY, Milp
from devmap_config.placement.program import program_of

MOST_CHOICES = 200
"""Of a problem here: each of its choices is a program that is solved."""


def every_choice(chain):
    shape = [len(block.options) for block in chain.blocks]
    return np.indices(shape).reshape(len(shape), -1).T


def few_choices(seeds):
    """Yield random problems with few choices; in a third of them, some blocks pass outputs to many others."""
    for seed in seeds:
        chain = with_transfers(small_chain(seed), seed) if seed % 3 == 0 else small_chain(seed)
        if 1 < len(every_choice(chain)) <= MOST_CHOICES:
            yield seed, chain


def numbers_of(program, choice):
    """Return the values of the counting variables of a choice, or `None` if it separates blocks of a group."""
    values = {}
    for block_class, variables in zip(program.classes, program.counts, strict=True):
        values |= dict.fromkeys(variables, 0)
        for member in block_class.members:
            taken = tuple(choice[position] for position in member)
            if taken not in block_class.choices:
                return None
            values[variables[block_class.choices.index(taken)]] += 1
    return values


def least_with(program, values):
    """Return the least time that the program allows for these numbers of blocks."""
    milp = program.milp.copy()
    for variable, value in values.items():
        milp.equal({variable: 1}, value)
    return milp.minimize(program.objective, relative_gap=0)


def by_numbers(program, chain):
    """Return the choices of a chain by equal numbers of blocks: values, times, and whether they are feasible."""
    choices = every_choice(chain)
    totals, feasible = all_figures(chain, choices)
    alike = {}
    for choice, total, is_feasible in zip(choices.tolist(), totals.tolist(), feasible.tolist(), strict=True):
        assert (chain.nanoseconds(choice), chain.is_feasible(choice)) == (total, is_feasible)
        values = numbers_of(program, choice)
        if values is None:
            assert not is_feasible
        else:
            alike.setdefault(tuple(values.items()), []).append((total, is_feasible))
    for values, members in alike.items():
        [is_feasible] = {is_feasible for _, is_feasible in members}
        yield dict(values), [total for total, _ in members], is_feasible


def test_hops_are_counted_between_blocks_that_have_a_choice():
    """Transfers from or to a pinned block are no hops, since its device is known."""
    devices = ("cuda:0", "cuda:1")
    times = {("cuda:0", "cuda:1"): 3, ("cuda:1", "cuda:0"): 4}
    chain = bare_chain("aapaa", devices, [times] * 4)
    pinned = replace(chain.blocks[2], options=chain.blocks[2].options[:1])
    blocks = (*chain.blocks[:2], pinned, *chain.blocks[3:])
    again = Transfer(0, 1, {("cuda:0", "cuda:1"): 10, ("cuda:1", "cuda:0"): 20})
    chain = replace(
        chain, blocks=blocks, transfers=(*chain.transfers, again, Transfer(0, 4, times), Transfer(4, 3, times))
    )
    assert chain.hops == {1: {("cuda:0", "cuda:1"): 13, ("cuda:1", "cuda:0"): 24}, 4: times}


def test_an_unlisted_device_holds_nothing():
    chain = bare_chain("aa", ("cuda:0", "cuda:1"), [], room={"cuda:1": 2})
    assert [chain.is_feasible(choice) for choice in product((0, 1), repeat=2)] == [False, False, False, True]
    assert solver.solve(chain).fastest.choice == (1, 1)


@pytest.mark.parametrize("is_exact", [False, True])
def test_program_agrees_with_choices_on_feasibility_and_time(is_exact):
    seen = set()
    for seed, chain in few_choices(range(60)):
        program = program_of(chain, is_exact=is_exact)
        hops = set() if is_exact else {(target - 1, target) for target in chain.hops}
        flows = tuple(each for each in chain.transfers if (each.source, each.target) not in hops)
        without_hops = by_numbers(program, replace(chain, transfers=flows))
        least = {tuple(values.items()): min(times) for values, times, _ in without_hops}
        for values, times, is_feasible in by_numbers(program, chain):
            seen.add(is_feasible)
            found = least_with(program, values)
            assert (found.values is not None) == is_feasible, (seed, values)
            if is_feasible:
                assert least[tuple(values.items())] - 0.01 <= found.bound <= min(times) + 0.01, (seed, values)
            if is_feasible and not hops:
                assert found.bound == pytest.approx(min(times)), (seed, values)
    assert seen == {False, True}


def sized_chain(sizes, room, **transfers):
    """Return blocks that are equal except for their peaks, pieces, and the outputs that they pass to others."""
    blocks = []
    for place, (peak, piece) in enumerate(sizes):
        options = [
            option_of(device, 10 + (place == 0), {device: 1}, {device: peak}, {device: piece}, mode="resident")
            for device in ("cuda:0", "cuda:1")
        ]
        blocks.append(Block(f"block{place}", tuple(options)))
    return Chain(tuple(blocks), room, **transfers)


@pytest.mark.parametrize("sizes", [*permutations([(1, 9), (5, 2), (8, 4)])])
@pytest.mark.parametrize("room", range(8, 24, 3))
def test_a_device_needs_its_largest_peak_and_its_largest_piece(sizes, room):
    chain = sized_chain([*sizes, sizes[0]], {"cuda:0": room, "cuda:1": 16})
    program = program_of(chain)
    for values, _, is_feasible in by_numbers(program, chain):
        assert (least_with(program, values).values is not None) == is_feasible, values


def test_a_group_sums_times_and_demands_and_takes_the_largest_peak():
    """It can be only in the places that all of its blocks can have."""
    for room in range(9, 20):
        chain = sized_chain([(1, 4), (7, 2), (3, 3), (1, 1)], {"cuda:0": room, "cuda:1": 14})
        blocks = [replace(block, group=0) for block in chain.blocks[:3]]
        blocks[1] = replace(blocks[1], options=blocks[1].options[::-1])
        blocks[2] = replace(blocks[2], options=(*blocks[2].options, option_of("cpu", 1, {}, {})))
        chain = replace(chain, blocks=(*blocks, chain.blocks[3]))
        program = program_of(chain)
        for values, totals, is_feasible in by_numbers(program, chain):
            found = least_with(program, values)
            assert (found.values is not None) == is_feasible, (room, values)
            assert not is_feasible or found.bound == pytest.approx(min(totals)), (room, values)


@pytest.mark.parametrize("targets", [(2, 3, 4), (2, 4), (4,), (2, 2, 3, 3, 4, 4), (2, 2, 3)])
@pytest.mark.parametrize("is_alone", [True, False])
def test_an_output_is_counted_for_each_reader_and_each_use(targets, is_alone):
    """Also if the block passes it to the next one too, or reads from one that is not the one before."""
    times = {("cuda:0", "cuda:1"): 30, ("cuda:1", "cuda:0"): 70}
    given = [Transfer(0, target, times) for target in targets] + ([] if is_alone else [Transfer(3, 1, times)])
    chain = sized_chain([(5, 0)] + [(3, 0)] * 4, {"cuda:0": 12, "cuda:1": 30}, transfers=tuple(given))
    program = program_of(chain)
    for values, totals, is_feasible in by_numbers(program, chain):
        if is_feasible:
            assert least_with(program, values).bound == pytest.approx(min(totals)), values


# Hops


def bare_chain(pattern, devices, hops, room=None):
    """Return blocks of kinds, one letter each, that can be on any device.

    `hops` gives for each block but the first the times of getting there.
    """
    options = {
        kind: tuple(option_of(device, 7 + place, {device: 1}, {}, mode="resident") for device in devices)
        for place, kind in enumerate(sorted(set(pattern)))
    }
    transfers = tuple(Transfer(place, place + 1, times) for place, times in enumerate(hops))
    blocks = tuple(Block(f"block{place}", options[kind]) for place, kind in enumerate(pattern))
    return Chain(blocks, room or dict.fromkeys(devices, len(pattern)), transfers)


def prices(rng, devices, *, is_uniform):
    price = rng.randint(1, 50)
    return {pair: price if is_uniform else rng.randint(1, 50) for pair in permutations(devices, 2)}


@pytest.mark.parametrize(("pattern", "count"), [("aaaaa", 3), ("abbbb", 2), ("bbbba", 2)])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_the_bound_on_hops_is_exact_with_two_devices_or_equal_hops(pattern, count, is_uniform):
    """With two devices, or all hops alike, what no order is below is what the best one takes."""
    for seed in range(3):
        devices = [f"cuda:{index}" for index in range(count if is_uniform else 2)]
        times = prices(random.Random(seed), devices, is_uniform=is_uniform)
        chain = bare_chain(pattern, devices, [times] * (len(pattern) - 1))
        program = program_of(chain)
        for values, totals, _ in by_numbers(program, chain):
            assert least_with(program, values).bound == pytest.approx(min(totals), abs=0.01), (seed, values)


def least_hops(chain, values_of):
    """Return the program's bound on hops if classes have these numbers on each device."""
    program = program_of(chain)
    values = {}
    for number, on_device in enumerate(values_of):
        values |= dict(zip(program.counts[number], on_device, strict=True))
    blocks = sum(
        values[variable] * option.nanoseconds for variable, _, option in program.variables if variable in values
    )
    return round(least_with(program, values).bound) - blocks


def test_expensive_hops_are_not_counted_as_cheap_ones():
    """An encoder's hops are cheap and its decoder's expensive: splitting the decoder alone costs the latter."""
    devices = ("cuda:0", "cuda:1", "cuda:2")
    cheap, dear = (dict.fromkeys(permutations(devices, 2), price) for price in (5, 20))
    chain = bare_chain("aaabbb", devices, [cheap] * 3 + [dear] * 2)
    assert least_hops(chain, [(3, 0, 0), (3, 0, 0)]) == 0
    assert least_hops(chain, [(2, 1, 0), (0, 3, 0)]) == 5
    assert least_hops(chain, [(3, 0, 0), (2, 1, 0)]) == 20
    assert least_hops(chain, [(3, 0, 0), (1, 1, 1)]) == 40


def test_a_cheap_hop_does_not_hide_expensive_ones():
    """The least cost of hops of one row counts, whatever hops of the other can cost."""
    devices = ("cuda:0", "cuda:1", "cpu")
    cheap = {pair: 100 if "cpu" in pair else 5 for pair in permutations(devices, 2)}
    chain = bare_chain("aaabbb", devices, [cheap] * 3 + [dict.fromkeys(permutations(devices, 2), 20)] * 2)
    assert least_hops(chain, [(3, 0, 0), (2, 1, 0)]) == 20


def test_no_hop_passes_an_unused_device():
    devices = ("cuda:0", "cuda:1", "cpu")
    times = {pair: 5 if "cpu" in pair else 50 for pair in permutations(devices, 2)}
    chain = bare_chain("abbbbc", devices, [times] * 5)
    assert least_hops(chain, [(1, 0, 0), (4, 0, 0), (0, 1, 0)]) == 50
    assert least_hops(chain, [(1, 0, 0), (3, 0, 1), (0, 1, 0)]) == 10


@pytest.mark.parametrize("dear", [("cuda:1", "cpu"), ("cpu", "cuda:1")])
def test_devices_are_equal_only_if_their_hops_are(dear):
    devices = ("cuda:0", "cuda:1", "cpu")
    times = dict.fromkeys(permutations(devices, 2), 7) | {dear: 50}
    chain = bare_chain("abbb", devices, [times] * 3)
    place = {"cuda:1": (0, 1, 0), "cpu": (0, 0, 1)}
    blocks = {device: tuple(3 * count for count in place[device]) for device in place}
    assert least_hops(chain, [place[dear[0]], blocks[dear[1]]]) == 50
    assert least_hops(chain, [place[dear[1]], blocks[dear[0]]]) == 7


def test_the_bound_counts_the_hop_to_a_distant_device():
    near, far = ("cuda:0", "cuda:1"), "cpu"
    times = {pair: 60 if far in pair else 5 for pair in permutations((*near, far), 2)}
    chain = bare_chain("abbbbc", (*near, far), [times] * 5)
    assert least_hops(chain, [(1, 0, 0), (2, 0, 2), (1, 0, 0)]) == 120
    assert least_hops(chain, [(1, 0, 0), (4, 0, 0), (0, 0, 1)]) == 60


# The layout


def homes_of(chain, choice):
    return [block.options[index].home for block, index in zip(chain.blocks, choice, strict=True)]


def test_a_layout_has_the_given_numbers_of_blocks():
    for seed, chain in few_choices(range(150)):
        program = program_of(chain)
        for choice in every_choice(chain).tolist():
            values = numbers_of(program, choice)
            if values is not None:
                laid = laid_out(program, [values.get(index, 0) for index in range(max(values) + 1)])
                assert numbers_of(program, laid) == values, (seed, choice)


@pytest.mark.parametrize("numbers", [(3, 2, 1), (1, 3, 2), (0, 4, 2), (6, 0, 0)])
def test_equal_blocks_are_laid_out_in_one_run_per_device_longest_first(numbers):
    devices = ("cuda:0", "cuda:1", "cuda:2")
    chain = bare_chain("aaaaaa", devices, [])
    laid = homes_of(chain, laid_out(program_of(chain), numbers))
    runs = [(device, len(list(run))) for device, run in groupby(laid)]
    expected = sorted(zip(devices, numbers, strict=True), key=lambda run: -run[1])
    assert runs == [run for run in expected if run[1]]


def free_homes(chain, choice):
    homes = zip(chain.blocks, homes_of(chain, choice), strict=True)
    return [home for block, home in homes if len(block.options) > 1 and block.group is None]


def runs_of(chain, choice, order):
    """Tell whether the blocks with a choice of their own run on the devices in this order, without going back."""
    places = [order.index(home) if home in order else None for home in free_homes(chain, choice)]
    return None not in places and places == sorted(places)


@pytest.mark.parametrize("pattern", ["aaaaa", "ababa", "aabbc", "aapaa", "agabg"])
@pytest.mark.parametrize("order", [("cuda:1", "cuda:0"), ("cuda:2", "cuda:0", "cuda:1")])
def test_runs_are_the_best_choice_in_the_order_of_devices(pattern, order):
    devices = ("cuda:0", "cuda:1", "cuda:2")
    for seed in range(8):
        rng = random.Random(seed)
        hops = [prices(rng, devices, is_uniform=False) for _ in pattern[1:]]
        room = {device: rng.randint(1, len(pattern)) for device in devices}
        chain = bare_chain(pattern, devices, hops, room=room)
        options = [tuple(replace(each, nanoseconds=rng.randint(0, 30)) for each in chain.blocks[0].options)] * 3
        blocks = tuple(
            replace(block, options=options["abc".index(kind)]) if kind == "a" else block
            for block, kind in zip(chain.blocks, pattern, strict=True)
        )
        blocks = tuple(
            replace(
                block, options=block.options[:1] if kind == "p" else block.options, group=0 if kind == "g" else None
            )
            for block, kind in zip(blocks, pattern, strict=True)
        )
        if "p" in pattern or "g" in pattern:  # what is given to such a block is no hop
            hops = [each for each in chain.transfers if not {"p", "g"} & {*pattern[each.source : each.target + 1]}]
            chain = replace(chain, transfers=tuple(hops))
        chain = replace(chain, blocks=blocks)
        choices = every_choice(chain)
        totals, feasible = all_figures(chain, choices)
        in_order = np.array([runs_of(chain, choice, order) for choice in choices.tolist()])
        # Where no run is empty, hops are what they are: one that is passed by is paid for as if it were there.
        is_full = np.array([len(set(free_homes(chain, choice))) == len(order) for choice in choices.tolist()])
        program = program_of(chain)
        runs = in_runs(program, order)
        found = runs.milp.minimize(program.objective, relative_gap=0)
        if not (feasible & in_order).any():
            assert found.values is None, seed
            continue
        laid = laid_out(program, found.values, runs)
        assert runs_of(chain, laid, order), seed
        assert chain.is_feasible(laid), seed
        assert chain.nanoseconds(laid) >= totals[feasible & in_order].min(), seed
        if (feasible & in_order & is_full).any():
            assert found.bound <= totals[feasible & in_order & is_full].min() + 0.01, seed
        if len(set(free_homes(chain, laid))) == len(order):
            assert chain.nanoseconds(laid) == pytest.approx(found.bound), seed
        if len(order) == 2:
            assert chain.nanoseconds(laid) == totals[feasible & in_order].min(), seed


def test_devices_are_ordered_by_the_average_place_of_their_blocks():
    devices = ("cuda:0", "cuda:1", "cuda:2")
    chain = bare_chain("aaaaaa", devices, [])
    assert order_in(program_of(chain), (2, 2, 0, 2, 1, 1)) == ("cuda:2", "cuda:0", "cuda:1")
    assert order_in(program_of(chain), (1, 0, 0, 0, 1, 1)) == ("cuda:0", "cuda:1")


# Mixed-integer programs by themselves


def test_the_minimum_of_random_programs_is_found():
    found = []
    for seed in range(120):
        rng, milp = random.Random(seed), Milp()
        upper = [milp.variable(rng.randint(1, 3)) for _ in range(4)] and milp.upper
        points = np.array(list(product(*(range(most + 1) for most in upper))))
        fits = np.ones(len(points), bool)
        for add in (milp.at_most, milp.at_most, milp.equal):
            factors, most = [rng.randint(-9, 9) for _ in upper], rng.randint(-5, 20)
            add(dict(enumerate(factors)), most)
            left = points @ factors
            fits &= left == most if add == milp.equal else left <= most
        objective = [rng.choice([1, 10**4]) * rng.randint(-9, 9) for _ in upper]
        solution = milp.copy().minimize(dict(enumerate(objective)), relative_gap=0)
        assert (solution.values is not None) == fits.any(), seed
        found.append(fits.any())
        if not fits.any():
            assert solution.bound == INFINITY
            continue
        least = (points @ objective)[fits].min()
        assert np.dot(solution.values, objective) == least, seed
        assert solution.bound == pytest.approx(least), seed
    assert 20 < sum(found) < 100


def test_changing_a_copy_leaves_the_program_unchanged():
    milp = Milp()
    x = milp.variable(3)
    other = milp.copy()
    other.at_most({x: 1}, 1)
    other.variable(2)
    assert (len(milp.upper), len(milp.constraints)) == (1, 0)
    assert milp.minimize({x: -1}).values == (3,)
    assert other.minimize({x: -1}).values == (1, 0)


def test_a_continuous_variable_can_be_fractional():
    milp = Milp()
    x, y = milp.variable(1, is_integer=False), milp.switch()
    milp.equal({x: 2, y: 1}, 1)
    milp.at_most({x: -4, y: -4}, -2)
    assert milp.minimize({y: 1}).bound == 0


def test_a_search_ends_at_its_limit_or_its_gap():
    rng, milp = random.Random(5), Milp()
    weights = {milp.switch(): rng.randint(10**5, 10**6) for _ in range(30)}
    milp.at_most({variable: -weight for variable, weight in weights.items()}, -sum(weights.values()) // 2)
    objective = {variable: weight + rng.randint(0, 10**5) for variable, weight in weights.items()}
    root, wide, best = (
        milp.minimize(objective, relative_gap=gap, nodes=nodes) for gap, nodes in ((0, 1), (0.01, 10**5), (0, 3_000))
    )
    values = [np.dot(each.values, list(objective.values())) for each in (root, wide, best)]
    assert root.bound < best.bound <= values[2] <= min(values)
    assert wide.bound < best.bound
    assert values[1] <= wide.bound * 1.0102


# What the solver makes of it


def test_the_optimum_of_few_choices_is_found_among_nearly_equal_ones():
    """Sixteen blocks take a millisecond on either card, but for some nanoseconds, where a solver's tolerance would
    stop.
    """
    rng = random.Random(0)
    sizes = [(rng.randint(20, 60), rng.randint(0, 99)) for _ in range(12)]
    blocks = [
        Block(
            f"block{place}",
            (
                option_of("cuda:0", 10**6 + more, {"cuda:0": size}, {}),
                option_of("cuda:1", 10**6 + 2 * size - more, {"cuda:1": size}, {}),
            ),
        )
        for place, (size, more) in enumerate(sizes)
    ]
    chain = Chain(tuple(blocks), dict.fromkeys(("cuda:0", "cuda:1"), sum(size for size, _ in sizes) // 2 + 9))
    totals, feasible = all_figures(chain, every_choice(chain))
    outcome = solver.solve(chain)
    assert outcome.fastest.nanoseconds == totals[feasible].min()


def test_only_answers_below_the_limit_are_returned():
    for seed in range(20):
        chain = small_chain(seed)
        best = solver.solve(chain).fastest
        if best is None:
            continue
        assert solver.solve(chain, best.nanoseconds + 1).fastest.nanoseconds == best.nanoseconds, seed
        for limit in (best.nanoseconds, best.nanoseconds // 2):
            assert solver.solve(chain, limit) == solver.ChainSolution(None, limit), seed


def test_without_an_answer_below_the_limit_the_bound_is_below_the_optimum(monkeypatch):
    """Hops have a lower bound only, so finding nothing below the limit does not prove the limit a bound."""
    monkeypatch.setattr(solver, "FEW_CHOICES", 0)
    for seed in (323, 495, 73, 587):
        chain = with_transfers(small_chain(seed), seed) if seed % 3 == 0 else small_chain(seed)
        totals, feasible = all_figures(chain, every_choice(chain))
        found, optimum = solver.solve(chain).fastest, totals[feasible].min()
        assert found.nanoseconds > optimum
        assert solver.solve(chain, found.nanoseconds).bound_nanoseconds <= optimum


def test_a_bound_raised_by_rounding_is_corrected(monkeypatch):
    minimize = Milp.minimize

    def rounded_up(*arguments, **options):
        solution = minimize(*arguments, **options)
        return replace(solution, bound=solution.bound * (1 + 9e-7) + 9e-4 * (solution.bound < 1_000))

    monkeypatch.setattr(Milp, "minimize", rounded_up)
    for time in (7, 7_000, 7_000_000_000):
        chain = Chain((Block("block", (option_of("cuda:0", time, {}, {}),)),), {"cuda:0": 1})
        outcome = solver.solve(chain)
        assert outcome.bound_nanoseconds <= outcome.fastest.nanoseconds == time
        assert outcome.bound_nanoseconds > 0.99999 * time - 1


@pytest.mark.parametrize("few_choices", [0, solver.FEW_CHOICES])
@pytest.mark.parametrize("missing", [0, 1, 2_000])
def test_feasibility_is_exact_to_the_byte(few_choices, missing, monkeypatch):
    """HiGHS tolerates a ten-millionth: of 80 GB, 8,000 bytes."""
    monkeypatch.setattr(solver, "FEW_CHOICES", few_choices)
    size = 10 * 10**9 + 1
    options = (
        option_of("cuda:0", 10, {"cuda:0": size}, {}, mode="resident"),
        option_of("cpu", 1_000, {"cpu": size}, {}, mode="computed"),
    )
    chain = Chain(
        tuple(Block(f"block{place}", options) for place in range(8)), {"cuda:0": 8 * size - missing, "cpu": size}
    )
    fastest = solver.solve(chain).fastest
    assert chain.is_feasible(fastest.choice)
    assert fastest.nanoseconds == (1_070 if missing else 80)
    without = replace(chain, capacities={"cuda:0": 8 * size - missing, "cpu": 0})
    assert (solver.solve(without).fastest is None) == bool(missing)
    roomy = replace(chain, capacities={"cuda:0": 7 * size - missing, "cpu": 2 * size - 9})
    assert (solver.solve(roomy).fastest is None) == bool(missing)


def test_runs_are_searched_if_the_layout_hops_too_often():
    """Two kinds alternate, each slightly faster on a card of its own: a second program finds runs instead."""
    devices = ("cuda:0", "cuda:1")
    chain = bare_chain(
        "ab" * 10, devices, [dict.fromkeys(permutations(devices, 2), 100)] * 19, dict.fromkeys(devices, 10)
    )
    kinds = [
        tuple(replace(option, nanoseconds=50 + (option.home != fast)) for option in chain.blocks[0].options)
        for fast in devices
    ]
    blocks = tuple(replace(block, options=kinds[place % 2]) for place, block in enumerate(chain.blocks))
    fastest = solver.solve(replace(chain, blocks=blocks)).fastest
    homes = homes_of(chain, fastest.choice)
    assert sum(one != other for one, other in pairwise(homes)) == 1
    assert fastest.nanoseconds == 20 * 50 + 10 + 100
