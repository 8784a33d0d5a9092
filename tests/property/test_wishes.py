"""Wishes decide among plans of nearly equal time as an enumeration of all choices does."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from test_solver import all_figures, medium_chain, option_of, small_chain, solve

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.placement.chain import Block, Chain
from devmap_config.placement.wishes import Contexts, preferred
from devmap_config.profile.permissions import Permissions

SHARE = 0.3
"""So much longer than the fastest a choice may take here: more than it may in a plan, so that wishes have room."""


def options_of(chain, choice):
    return [block.options[index] for block, index in zip(chain.blocks, choice, strict=True)]


def wishes_of(chain, choice):
    """Return the quantities to minimise, the first wish first."""
    options = options_of(chain, choice)
    used = sorted({chain.devices.index(option.home) for option in options})
    return (
        sum(option.mode[0] in ("part", "computed") for option in options),
        sum(option.mode[0] == "streamed" for option in options),
        len(used),
        sum(used),
    )


@pytest.mark.parametrize("shard", range(4))
def test_wishes_are_granted_in_order_as_far_as_time_allows(shard):
    """Without hops, for which the program has only a lower bound, the answer is the best of all choices."""
    granted = 0
    for seed in range(shard, 160, 4):
        chain = small_chain(seed)
        chain = replace(chain, transfers=())
        fastest = solve(chain)
        if fastest is None:
            continue
        most = int(fastest.nanoseconds * (1 + SHARE))
        choice = preferred(chain, most, None) or fastest.choice
        shape = [len(block.options) for block in chain.blocks]
        choices = np.indices(shape).reshape(len(shape), -1).T
        total, feasible = all_figures(chain, choices)
        within = choices[feasible & (total <= most)]
        best = min(wishes_of(chain, each) for each in within)
        assert wishes_of(chain, choice) == best, seed
        granted += best < wishes_of(chain, fastest.choice)
    assert granted  # they do change something


@pytest.mark.parametrize("seed", range(30))
def test_a_wished_choice_fits_and_stays_within_the_allowed_time(seed):
    chain = medium_chain(seed)
    fastest = solve(chain)
    if fastest is None:
        pytest.fail(f"{seed} has no answer: it is to be left out")
    most = int(fastest.nanoseconds * (1 + SHARE))
    choice = preferred(chain, most, None) or fastest.choice
    assert chain.is_feasible(choice)
    assert chain.nanoseconds(choice) <= most
    assert wishes_of(chain, choice) <= wishes_of(chain, fastest.choice)


def longer_chains(chain):
    """Return the chain whose blocks hold a byte more on each device for every token beyond 100."""

    def chain_at(length):
        def held(option):
            demands = tuple((device, size + length - 100) for device, size in option.demands)
            return replace(option, demands=demands)

        blocks = (replace(block, options=tuple(map(held, block.options))) for block in chain.blocks)
        return replace(chain, blocks=tuple(blocks))

    return chain_at


@pytest.mark.parametrize("least", [100, 120])
def test_a_longer_context_is_wished_for_within_the_same_devices(least):
    """Blocks spread evenly leave every device the same room for a context."""
    chain = medium_chain(3, equal_cards=2)
    roomy = replace(chain, capacities={device: size * 2 for device, size in chain.capacities.items()})
    fastest = solve(roomy)
    contexts = Contexts(length=100, least=least, longest=10_000, chain_at=longer_chains(roomy))
    plain = preferred(roomy, fastest.nanoseconds * 2, None)
    longer = preferred(roomy, fastest.nanoseconds * 2, contexts)

    def longest(choice):
        return max(length for length in range(100, 2_000) if contexts.chain_at(length).is_feasible(choice))

    assert wishes_of(roomy, longer)[:3] == wishes_of(roomy, plain)[:3]
    assert longest(longer) >= longest(plain)
    assert longest(longer) >= least


@pytest.mark.parametrize(("longest", "on_first"), [(10_000, 3), (115, 4), (100, 5)])
def test_blocks_are_spread_for_the_context_that_is_searched(longest, on_first):
    """Five of six blocks would be fastest on the first card; three on each leave room for the longest context."""

    def chain_at(length):
        size = 1_000_000 + 10_000 * (length - 100)
        options = tuple(
            option_of(f"cuda:{card}", 1_000 + card, {f"cuda:{card}": size}, {}, mode="resident") for card in (0, 1)
        )
        blocks = tuple(Block(f"block{place}", options) for place in range(6))
        return Chain(blocks, dict.fromkeys(("cuda:0", "cuda:1"), 5_000_000))

    contexts = Contexts(length=100, least=100, longest=longest, chain_at=chain_at)
    assert preferred(chain_at(100), 7_000, contexts).count(0) == on_first


LENGTHS = range(100, 160)
"""Context lengths here; the longest is found to a sixteenth."""


def growing(chain, seed):
    """Return the contexts of a chain whose blocks hold more with every token, each kind by its own amount."""
    rng, known = random.Random(seed), {}

    def at(length):
        blocks = []
        for block in chain.blocks:
            growth = known.setdefault(block.options, rng.choice([0.1, 0.5, 1]))
            more = int((length - LENGTHS[0]) * growth)
            held = [tuple((device, size + more) for device, size in option.demands) for option in block.options]
            pairs = zip(block.options, held, strict=True)
            options = tuple(replace(option, demands=demands) for option, demands in pairs)
            blocks.append(replace(block, options=options))
        return replace(chain, blocks=tuple(blocks))

    return at


def goes_on(chain, choice):
    """Tell whether blocks with a choice of their own run on devices in the listed order, without going back."""
    groups = [block.group for block in chain.blocks]
    homes = [
        chain.devices.index(block.options[index].home)
        for block, index in zip(chain.blocks, choice, strict=True)
        if len(block.options) > 1 and (block.group is None or groups.count(block.group) == 1)
    ]
    return homes == sorted(homes)


@pytest.mark.parametrize("seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.zoo) for seed in range(15, 40))])
@pytest.mark.parametrize("least", [LENGTHS[0], 110, 10_000])
def test_the_context_is_maximised_without_more_devices(seed, least):
    """A least context comes before few devices, and the longest after: the answer is the best of all choices."""
    chain = replace(small_chain(seed), transfers=())
    fastest = solve(chain)
    if fastest is None or prod(len(block.options) for block in chain.blocks) > 2_000:
        return
    at, most = growing(chain, seed), int(fastest.nanoseconds * (1 + SHARE))
    contexts = Contexts(length=LENGTHS[0], least=least, longest=LENGTHS[-1], chain_at=at)
    choice = preferred(chain, most, contexts)
    shape = [len(block.options) for block in chain.blocks]
    choices = np.indices(shape).reshape(len(shape), -1).T
    fits = {length: all_figures(at(length), choices)[1] for length in (*LENGTHS, least)}
    totals, _ = all_figures(chain, choices)
    within = fits[LENGTHS[0]] & (totals <= most)
    for place in range(4):
        if place == 2 and (within & fits[least]).any():
            within &= fits[least]
        figures = np.array([wishes_of(chain, each)[place] for each in choices])
        within &= figures == figures[within].min()
    runs = within & np.array([goes_on(chain, each) for each in choices])
    within = runs if runs.any() else within
    longest = np.array([sum(fits[length][place] for length in LENGTHS) for place in range(len(choices))])
    [found] = np.flatnonzero((choices == choice).all(axis=1))
    assert within[found]
    if runs.any():  # else there may be runs in another order
        reached = LENGTHS[0] + longest[within].max()
        assert LENGTHS[0] + longest[found] >= reached - reached // 16 - 1
        assert totals[found] <= totals[within & (longest >= longest[found])].min() + len(chain.blocks) ** 2


CARD = "{memory: 12GiB, bandwidth: 360GB/s, flops: 100TFLOP/s}"


def compiled(config, strategy):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {config}, dtype: bfloat16}}\n"
        "workload: {batch_size: 1, context_length: 4096}\n"
        f'hardware:\n  devices: {{"cuda:[0-1]": {CARD}, cpu: {{memory: 64GiB, bandwidth: 60GB/s, flops: 1TFLOP/s}}}}\n'
        "  links: {host: 25GB/s, peer: 25GB/s}\n"
        f"placement: {{strategy: {strategy}, offload: {{folder: ./off}}}}\n"
    )
    compilation = run_pipeline(Request(path=Path("profile.yaml"), permissions=Permissions(allow_outside=True)))
    assert isinstance(compilation, Compiled), compilation.diagnostics
    return compilation.plan


def test_a_model_that_fits_on_cards_gets_a_plain_map_with_a_long_context(tmp_path, monkeypatch):
    """An embedding on the CPU would be half a percent faster."""
    config = Path(__file__).parents[2] / "profiles" / "models" / "llama-3.1-8b" / "config.json"
    assert config.exists()
    monkeypatch.chdir(tmp_path)
    fastest, sequential = compiled(config, "fastest"), compiled(config, "sequential")
    assert fastest.device_map
    assert not fastest.compute
    assert {str(each.location.stored_on) for each in fastest.assignments} == {"cuda:0", "cuda:1"}
    assert fastest.prediction.longest_context > 4 * sequential.prediction.longest_context
    assert fastest.prediction.hops == 1
    bound = fastest.prediction.bound_decode_nanoseconds_per_token
    assert bound <= fastest.prediction.decode_nanoseconds_per_token <= 1.01 * bound
