"""If a model does not fit, the message names what takes the most memory, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LLAMA, MIXTURE

from devmap_config.compiler import Request, run_pipeline

SCORES = {**LLAMA, "max_position_embeddings": 8192}
WORDS = {**LLAMA, "vocab_size": 65536}


@pytest.fixture(autouse=True)
def in_workspace(workspace):
    return workspace


def message(config, memory, model="", workload="", strategy="single"):
    Path("sized").mkdir()
    Path("sized/config.json").write_text(json.dumps(config))
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: sized{model}}}\nworkload: {{{workload}}}\n"
        f"hardware: {{devices: {{cuda:0: {{memory: {memory}}}}}}}\nplacement: {{strategy: {strategy}}}\n"
    )
    (error,) = [
        each for each in run_pipeline(Request(path=Path("profile.yaml"))).diagnostics if each.severity == "error"
    ]
    assert error.code == "over-capacity"
    return error.message


def test_scores_of_unfused_attention_are_named():
    found = message(SCORES, "100MiB", ", attention: eager", "context_length: 4096")
    assert "attention that is not fused in `model.layers." in found
    assert "most of it scores, at 4,096 tokens" in found


def test_fused_attention_has_no_scores():
    assert "scores" not in message(SCORES, "5MiB", "", "context_length: 4096")


def test_logits_of_all_positions_are_named():
    found = message(WORDS, "20MiB", "", "context_length: 512, logits: all")
    assert "the logits of all 512 tokens (`logits: all`): 64.1 MiB" in found


def test_the_cache_is_named():
    workload = "context_length: 4096, prompt_length: 16, batch_size: 8"
    found = message({**SCORES, "num_key_value_heads": 4}, "20MiB", "", workload)
    assert "most of it is the cache of 8 sequences of 4,096 tokens" in found


@pytest.mark.parametrize("strategy", ["single", "sequential", "manual, device_map: {model: 0, lm_head: 0}"])
def test_experts_that_a_quantizer_leaves_are_named(strategy):
    config = {**MIXTURE, "num_experts": 64}
    found = message(config, "1MiB", ", quantization: {method: bitsandbytes, load_in_4bit: true}", strategy=strategy)
    assert "fused experts stay in bfloat16 under bitsandbytes: 3.0 MiB of 3.1 MiB" in found


def test_the_vocabularys_matrices_are_named():
    assert "the vocabulary's matrices are 16.0 MiB of 16.4 MiB" in message(WORDS, "1MiB", strategy="sequential")


def test_nothing_is_named_if_no_single_part_dominates():
    assert message(LLAMA, "100KiB", strategy="sequential").endswith("bytes) are missing")
