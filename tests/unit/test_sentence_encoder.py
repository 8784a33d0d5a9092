"""A text's tokens are pooled into one vector as sentence-transformers does it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.runner.loading import LoadRequest
from devmap_config.runner.sentence_encoder import SentenceEncoder, sentence_encoder

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
def test_padding_is_not_pooled(mode):
    assert vector(mode) == pytest.approx(POOLED[mode].tolist())


def test_poolings_are_concatenated_and_normalized():
    joined = torch.cat([POOLED["max"], POOLED["mean"]])
    assert vector("max", "mean", normalizes=True) == pytest.approx((joined / joined.norm()).tolist())


def test_the_prompt_prefix_is_added():
    encoder = SentenceEncoder(modes=("mean",), prompt="Query: ", lowers_case=True)
    assert encoder.prepared("Where IS it?") == "Query: where is it?"


MODULES = [{"type": "a.Transformer", "path": ""}, {"type": "b.Pooling", "path": "pool"}, {"type": "c.Normalize"}]


def encoder_of(folder, modules=MODULES, pooling=None, **files):
    """Return the encoder of a checkpoint's files, and the codes of the findings."""
    (folder / "pool").mkdir(exist_ok=True)
    files = {"modules": modules, "pool/config": pooling or {}, **files}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    sink = Sink()
    found = sentence_encoder(LoadRequest(weights=str(folder), class_name="", dtype="", attention=None), sink)
    return found, [each.code for each in sink]


def test_the_checkpoints_files_choose_the_pooling(tmp_path):
    whole = {"prompts": {"query": "Find: "}, "default_prompt_name": "query"}
    text = {"max_seq_length": 7, "do_lower_case": True}
    found = encoder_of(
        tmp_path, pooling={"pooling_mode": "cls"}, config_sentence_transformers=whole, sentence_bert_config=text
    )
    expected = SentenceEncoder(modes=("cls",), normalizes=True, prompt="Find: ", max_tokens=7, lowers_case=True)
    assert found == (expected, [])
    assert encoder_of(tmp_path, MODULES[:2])[0].normalizes is False


@pytest.mark.parametrize(
    ("modules", "pooling", "codes"),
    [
        ({"type": "Transformer"}, {}, []),
        ([3, None], {}, ["no-embedding"]),
        (MODULES, {"pooling_mode": {"a": 1}}, ["no-embedding"]),
        (MODULES, {"pooling_mode": ["mean", ["max"]]}, ["no-embedding"]),
    ],
)
def test_files_of_another_form_give_no_encoder(tmp_path, modules, pooling, codes):
    assert encoder_of(tmp_path, modules, pooling) == (None, codes)


def test_files_beyond_the_checkpoint_are_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    folder = tmp_path / "model"
    folder.mkdir()
    modules = [MODULES[0], {"type": "Pooling", "path": ".."}]
    assert encoder_of(folder, modules)[0].modes == ("mean",)
