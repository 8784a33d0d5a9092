"""The predicted times of blocks copied ahead over several links are those of a simulation, and the bounds hold."""

from __future__ import annotations

import random
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from test_solver import MOST_CHOICES, all_figures, small_chain

from devmap_config.execution.overlap import Ahead, ahead_nanoseconds
from devmap_config.placement import solver
from devmap_config.placement.chain import Block, Chain, Option
from devmap_config.placement.layout import in_turns

MOST_LOOKED_AT = 1_000
"""Choices of a problem of which each is timed; of one with more, some are."""


# What a forward takes


def random_blocks(rng, cards=3):
    blocks = []
    for _ in range(rng.randint(1, 9)):
        own = rng.randint(0, 40)
        blocks.append(Ahead("decode", f"cuda:{rng.randrange(cards)}", own, rng.randint(0, own)))
    return blocks


def longest_in_the_long_run(blocks):
    """Return the time of a forward among very many: the heaviest cycle of waits, divided by its forwards."""
    cards = sorted({block.card for block in blocks})
    waits = np.full((len(cards), len(cards)), -np.inf)  # from a card's end in one forward to another's in the next
    for place, card in enumerate(cards):
        last = 0 if card == blocks[-1].card else -np.inf
        ends = {other: 0 if other == card else -np.inf for other in cards}
        for block in blocks:
            last = max(last + block.nanoseconds, ends[block.card] + block.card_nanoseconds)
            ends[block.card] = last
        waits[place] = [ends[other] for other in cards]
    longest, walks = -np.inf, waits
    for length in range(1, len(cards) + 1):
        longest = max(longest, walks.diagonal().max() / length)
        walks = (walks[:, :, None] + waits[None]).max(axis=1)
    return longest


def sums_of(blocks):
    """Return lower bounds for any order: the sum for each card, and the sum of all together."""
    own = [sum(block.card_nanoseconds for block in blocks if block.card == card) for card in {b.card for b in blocks}]
    return max(*own, sum(block.nanoseconds for block in blocks))


def test_predicted_times_are_those_of_many_forwards():
    """Exactly, for nearly all; slightly more for a few whose forwards are late alternately."""
    exact = 0
    for seed in range(2_000):
        blocks = random_blocks(random.Random(seed))
        taken, longest = ahead_nanoseconds(blocks), longest_in_the_long_run(blocks)
        assert max(longest, sums_of(blocks)) <= taken + 1e-9, seed
        assert taken <= sum(block.card_nanoseconds for block in blocks), seed
        exact += taken == longest
    assert exact > 1_980


def test_times_add_up_on_one_card_and_over_phases():
    blocks = random_blocks(random.Random(3), cards=1)
    total = sum(block.card_nanoseconds for block in blocks)
    assert ahead_nanoseconds(blocks) == total
    others = [block._replace(phase="prefill", card="cuda:1") for block in blocks]
    mixed = [block for pair in zip(blocks, others, strict=True) for block in pair]
    assert ahead_nanoseconds(mixed) == 2 * total
    assert ahead_nanoseconds(block.times(3) for block in blocks) == 3 * total
    assert ahead_nanoseconds(()) == 0


def test_alternating_cards_are_limited_by_their_links():
    turns = [Ahead("decode", f"cuda:{place % 3}", 30, 10) for place in range(9)]
    assert ahead_nanoseconds(turns) == 90
    assert ahead_nanoseconds(sorted(turns)) == 210  # one link at a time, but for the first that each brings


class Simulated:
    """Cards with two slots each; a link copies a byte per time unit, or less while all share the memory's bandwidth.

    Blocks run one after another, `forwards` times, each once its weights have arrived. A block is copied while the one
    before it on its card runs, into a free slot.
    """

    def __init__(self, cards, blocks, size, running, together, forwards=8):
        self.homes = [place % cards for _ in range(forwards) for place in range(blocks)]
        self.left, self.running, self.together = [size] * len(self.homes), running, together
        self.ends, self.now, self.begun = [], 0.0, None

    def copied_now(self):
        """Return the first missing block of each card that has a free slot."""
        missing = {}
        for place in reversed(range(len(self.homes))):
            if self.left[place]:
                missing[self.homes[place]] = place
        held = {card: self.homes[len(self.ends) : place].count(card) for card, place in missing.items()}
        return [place for card, place in missing.items() if held[card] < 2]

    def go_on(self):
        """Advance to the end of the next copy, or of the running block."""
        place, copies = len(self.ends), self.copied_now()
        if self.begun is None and not self.left[place]:
            self.begun = self.now
        rate = min(1, self.together / max(len(copies), 1))
        lasting = [self.left[copy] / rate for copy in copies]
        lasting += [] if self.begun is None else [self.begun + self.running - self.now]
        self.now += min(lasting)
        for copy in copies:
            self.left[copy] = max(self.left[copy] - rate * min(lasting), 0)
            self.left[copy] *= self.left[copy] > 1e-9
        if self.begun is not None and self.now >= self.begun + self.running - 1e-9:
            self.ends.append(self.now)
            self.begun = None

    def forward(self, blocks):
        """Return the time of a forward once forwards are alike."""
        while len(self.ends) < len(self.homes):
            self.go_on()
        return (self.ends[-1] - self.ends[-1 - 4 * blocks]) / 4


@pytest.mark.parametrize("together", [1.5, 2, 3])
@pytest.mark.parametrize("running", [0, 7, 55, 100])
@pytest.mark.parametrize("cards", [2, 3])
def test_alternating_cards_are_as_fast_as_slots_links_and_memory_allow(cards, running, together):
    blocks, size = 4 * cards, 100
    shared = round(max(running, size / together))
    turns = [Ahead("decode", f"cuda:{place % cards}", size, shared) for place in range(blocks)]
    simulated = Simulated(cards, blocks, size, running, together).forward(blocks)
    assert ahead_nanoseconds(turns) == pytest.approx(simulated, rel=0.01)


# The program


def over_links(chain, seed):
    """Return the chain in which blocks streamed from the CPU can go to any card, and take less time on other cards than
    their own.
    """
    rng, known = random.Random(seed), {}
    cards = [device for device in chain.capacities if device.startswith("cuda")]
    phases = rng.choice([("decode",), ("decode", "prefill")])

    def to_each(option):
        if option.mode != ("streamed", "cpu"):
            return [option]
        own, found = {phase: rng.randint(1, 40) for phase in phases}, []
        shared = {phase: rng.randint(0, nanoseconds) for phase, nanoseconds in own.items()}
        for card in cards:
            moved = {
                name: tuple((card if device == option.home else device, size) for device, size in getattr(option, name))
                for name in ("demands", "peaks", "pieces")
            }
            mode = option.mode if card == option.home else ("streamed elsewhere", "cpu")
            ahead = tuple(Ahead(phase, card, own[phase], shared[phase]) for phase in phases)
            found.append(Option(home=card, nanoseconds=rng.choice([0, 5]), mode=mode, ahead=ahead, **moved))
        return found

    def linked(options):
        if options not in known:
            known[options] = tuple(each for option in options for each in to_each(option))
        return known[options]

    return replace(chain, blocks=tuple(replace(block, options=linked(block.options)) for block in chain.blocks))


def problems(seeds):
    """Yield random problems, each with every choice, its least time, and whether it is feasible."""
    for seed in seeds:
        chain = over_links(small_chain(seed), seed)
        shape = [len(block.options) for block in chain.blocks]
        if prod(shape) <= MOST_CHOICES and any(each.ahead for block in chain.blocks for each in block.options):
            choices = np.indices(shape).reshape(len(shape), -1).T
            yield seed, chain, choices, *figures_of(chain, choices)


def figures_of(chain, choices):
    """Return the least times of choices by a second implementation: the maximum over cards, and the sum of all."""
    total, feasible = all_figures(chain, choices)
    for phase in ("decode", "prefill"):
        cards = {}
        for position, block in enumerate(chain.blocks):
            for card in chain.capacities:
                own, shared = (
                    np.array([sum(each[2 + place] for each in option.ahead if each[:2] == (phase, card))
                              for option in block.options])
                    for place in (0, 1)
                )  # fmt: skip
                cards[card] = cards.get(card, 0) + own[choices[:, position]]
                cards[None] = cards.get(None, 0) + shared[choices[:, position]]
        total += np.maximum.reduce(list(cards.values()))
    return total, feasible


def test_the_bound_is_at_most_the_least_time_of_the_best_choice(monkeypatch):
    """It is exact if every hop is counted. No choice is faster than its stated least time."""
    seen, near = 0, 0
    for seed, chain, choices, least, feasible in problems(range(220)):
        some = random.Random(seed).sample(range(len(choices)), min(len(choices), MOST_LOOKED_AT // 50))
        assert all(chain.nanoseconds(choices[place]) >= least[place] for place in some), seed
        for few_choices in (0, solver.FEW_CHOICES):
            monkeypatch.setattr(solver, "FEW_CHOICES", few_choices)
            outcome = solver.solve(chain)
            assert (outcome.fastest is None) == (not feasible.any()), seed
            if outcome.fastest is None:
                continue
            optimum = least[feasible].min()
            assert outcome.bound_nanoseconds == optimum if few_choices else outcome.bound_nanoseconds <= optimum, seed
            assert chain.is_feasible(outcome.fastest.choice), seed
            assert outcome.fastest.nanoseconds == chain.nanoseconds(outcome.fastest.choice), seed
        if feasible.any() and len(choices) <= MOST_LOOKED_AT:
            best = min(chain.nanoseconds(choice) for choice in choices[feasible])
            assert outcome.bound_nanoseconds <= best <= outcome.fastest.nanoseconds, seed
            seen, near = seen + 1, near + (outcome.fastest.nanoseconds <= 1.1 * best)
    assert near > 0.9 * seen > 20


def test_cards_alternate_only_if_that_is_faster(monkeypatch):
    """The numbers of a choice stay the same, and so do the bytes on each device."""
    changed = 0
    for _, chain, choices, _, feasible in problems(range(60)):
        for choice in map(tuple, choices[feasible][:: max(feasible.sum() // 10, 1)].tolist()):
            turns = in_turns(chain, choice)
            changed += turns != choice
            assert turns == choice or chain.nanoseconds(turns) < chain.nanoseconds(choice)
            assert chain.used_bytes(turns) == chain.used_bytes(choice)
            assert chain.is_feasible(turns)
    assert changed


def test_equal_blocks_on_two_cards_alternate():
    cards = ("cuda:0", "cuda:1")
    streamed = [
        Option(home=card, nanoseconds=0, mode=("streamed", "cpu"), ahead=(Ahead("decode", card, 20, 10),))
        for card in cards
    ]
    block = Block("block", (*streamed, Option(home="cuda:0", nanoseconds=1)))
    chain = Chain((block,) * 9, dict.fromkeys(cards, 0))
    turns = in_turns(chain, (0, 0, 0, 2, 0, 1, 1, 1, 1))
    assert turns == (0, 1, 0, 2, 1, 0, 1, 0, 1)
    assert chain.nanoseconds(turns) == 80 + 1
    together = replace(chain, blocks=(replace(block, group=0),) * 2)
    assert in_turns(together, (0, 0)) == (0, 0)
