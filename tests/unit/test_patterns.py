"""The table of patterns in docs/patterns.md holds against a real module tree."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from devmap_config.graph.introspection import build_meta_model, graph_of
from devmap_config.rules.matching import match
from devmap_config.rules.pattern import PatternError, parse_pattern


def build(model_class, config):
    return graph_of(build_meta_model(model_class, config, torch.bfloat16), torch.bfloat16)


@pytest.fixture(scope="module")
def llama():
    return build(LlamaForCausalLM, LlamaConfig(num_hidden_layers=24, hidden_size=64, intermediate_size=64))


@pytest.fixture(scope="module")
def mixture():
    config = Qwen3MoeConfig(num_hidden_layers=60, hidden_size=64, moe_intermediate_size=32, num_experts=8)
    return build(Qwen3MoeForCausalLM, config)


def layers(*indices):
    return tuple(f"model.layers.{index}" for index in indices)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", ("lm_head",)),
        ("model.layers.*", layers(*range(24))),
        ("model.layers.[0-15]", layers(*range(16))),
        ("model.layers.[0,2,8-11]", layers(0, 2, 8, 9, 10, 11)),
        ("model.layers.[16-]", layers(*range(16, 24))),
        ("model.layers.[0-23/2]", layers(*range(0, 24, 2))),
        ("model.layers.[16-/2]", layers(16, 18, 20, 22)),
        ("model.layers.[-4:]", layers(20, 21, 22, 23)),
        ("model.layers.[0:16]", layers(*range(16))),
        ("model.layers.[::2]", layers(*range(0, 24, 2))),
        ("model.layers.[:2,-1:]", layers(0, 1, 23)),
        ("model.layers.1?", layers(*range(10, 20))),
        ("model.layers.1*", layers(1, *range(10, 20))),
        ("model.{embed_tokens,norm}", ("model.embed_tokens", "model.norm")),
        ("{lm_head,model.norm}", ("model.norm", "lm_head")),
        ("model.layers.0.self_attn.{q,k}_proj", ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")),
        ("model.layers.0.self_attn.q_*", ("model.layers.0.self_attn.q_proj",)),
        ("model.layers.[22-].mlp.*_proj.weight", tuple(
            f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (22, 23) for name in ("gate", "up", "down")
        )),
        ("**.layers.3", layers(3)),
        ("**.self_attn", tuple(f"{layer}.self_attn" for layer in layers(*range(24)))),
        ("lm_head.**", ("lm_head", "lm_head.weight")),
        ("class:LlamaDecoderLayer", layers(*range(24))),
        ("class:LlamaMLP in model.layers.[0-3]", tuple(f"{layer}.mlp" for layer in layers(0, 1, 2, 3))),
        (r"re:model\.layers\.(7|8)", layers(7, 8)),
        ("", ("",)),
    ],
)  # fmt: skip
def test_patterns_match_as_the_page_says(llama, pattern, expected):
    assert match(parse_pattern(pattern), llama).names == expected


def test_two_stars_also_match_no_segment(llama):
    assert "" in match(parse_pattern("**"), llama).names


def test_a_name_is_never_a_prefix(llama):
    assert match(parse_pattern("model.layers.1"), llama).names == layers(1)


def test_a_slice_counts_the_indices_that_exist(llama):
    assert match(parse_pattern("model.layers.[30:]"), llama).names == ()


@pytest.mark.parametrize("pattern", ["model.layers.[20-24]", "model.layers.[24]"])
def test_a_range_beyond_the_end_is_reported(llama, pattern):
    beyond = match(parse_pattern(pattern), llama).beyond
    assert [(each.parent, each.existing[-1]) for each in beyond] == [("model.layers", 23)]


def test_below_a_wildcard_a_range_may_end_beyond_some_parents(llama):
    # Every list of the model has its own length; a pattern over several is not wrong for the shorter ones.
    assert match(parse_pattern("**.[20-30]"), llama).beyond != ()
    assert match(parse_pattern("*.layers.[0-3]"), llama).beyond == ()


@pytest.mark.parametrize(
    ("pattern", "start", "end"),
    [
        ("model.layers.[0-15", 13, 14),
        ("model.layers.[5-2]", 14, 17),
        ("model.layers.[-4]", 14, 16),
        ("model.layers.[01]", 14, 16),
        ("model..norm", 6, 7),
        ("model.***", 6, 9),
        ("model.a**", 7, 9),
        ("model.{a,b", 6, 7),
        ("re:(", 3, 4),
        ("class:", 0, 6),
        ("class:A.B", 7, 8),
    ],
)
def test_a_bad_pattern_points_at_its_characters(pattern, start, end):
    with pytest.raises(PatternError) as error:
        parse_pattern(pattern)
    assert (error.value.start, error.value.end) == (start, end)


def test_experts_of_many_layers_match_at_once(mixture):
    found = match(parse_pattern("model.layers.[0-59].mlp.experts.{gate_up,down}_proj"), mixture)
    assert len(found.names) == 120


def test_repeated_stars_are_one_and_match_in_linear_time(llama):
    stars = "**." * 2000
    assert match(parse_pattern(f"{stars}lm_head"), llama).names == ("lm_head",)
    assert match(parse_pattern(f"{stars}nothing"), llama).names == ()
