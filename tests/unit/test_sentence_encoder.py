"""One vector is made of those of a text's tokens, as sentence-transformers makes it."""

from __future__ import annotations

import math

import pytest
import torch

from devmap_config.runner.sentence_encoder import SentenceEncoder

STATES = torch.tensor([[[1.0, -2.0], [3.0, 0.5], [-4.0, 6.0], [99.0, 99.0]]])
MASK = torch.tensor([[1, 1, 1, 0]])
TEXT = STATES[0, :3]

POOLED = {
    "cls": TEXT[0],
    "lasttoken": TEXT[2],
    "max": torch.tensor([3.0, 6.0]),
    "mean": TEXT.sum(0) / 3,
    "mean_sqrt_len_tokens": TEXT.sum(0) / math.sqrt(3),
    "weightedmean": (TEXT[0] + 2 * TEXT[1] + 3 * TEXT[2]) / 6,
}


def vector(*modes, **more):
    return SentenceEncoder(modes=modes, **more).embedding(STATES, MASK).value


@pytest.mark.parametrize("mode", POOLED)
def test_padding_has_no_part_in_a_pooling(mode):
    assert vector(mode) == pytest.approx(POOLED[mode].tolist())


def test_poolings_are_joined_and_then_scaled_to_a_length_of_one():
    joined = torch.cat([POOLED["max"], POOLED["mean"]])
    assert vector("max", "mean", normalizes=True) == pytest.approx((joined / joined.norm()).tolist())


def test_what_stands_before_every_text_is_put_there():
    encoder = SentenceEncoder(modes=("mean",), prompt="Query: ", lowers_case=True)
    assert encoder.prepared("Where IS it?") == "Query: where is it?"
