"""Any value in a stranger's config gives a plan, or an error that names the place."""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import pytest
import zoo

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph import introspection, recording
from devmap_config.graph.config_values import unreasonable_number

MOST_SECONDS = 4
"""Of the processor, for a refusal, with torch imported."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "mm_tokens_per_image": 4,
    "text_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28},
}
PROFILE = """\
version: 1
model: {source: config.json}
workload: {context_length: 32}
hardware: {devices: {"cuda:[0-1]": {memory: 100TiB}, cpu: {memory: 100TiB}}}
"""
HOSTILE = [-1, 0, 10**9, 10**30, 1.5, math.nan, "x", [], {}, None, True]


def paths(value, path=()):
    below = {key: paths(item, (*path, key)) for key, item in value.items() if isinstance(item, dict)}
    return [place for key in value for place in ((*path, key), *below.get(key, ()))]


def changed(config, path, value):
    config = copy.deepcopy(config)
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return config


def compiled(config, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    Path("config.json").write_text(json.dumps(config))
    Path("profile.yaml").write_text(PROFILE)
    return run_pipeline(Request(path=Path("profile.yaml")))


def answers(config, path, folder, monkeypatch):
    for value in HOSTILE:
        start = time.process_time()
        compilation = compiled(changed(config, path, value), folder, monkeypatch)
        assert isinstance(compilation, Compiled) or any(each.is_error for each in compilation.diagnostics), value
        assert time.process_time() - start < MOST_SECONDS, value


@pytest.mark.parametrize("path", [("num_attention_heads",), ("num_hidden_layers",), ("architectures",)], ids=".".join)
def test_any_value_in_a_config_gives_a_plan_or_an_error(tmp_path, monkeypatch, path):
    answers(LLAMA, path, tmp_path, monkeypatch)


@pytest.mark.zoo
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_any_value_in_any_place_of_a_config_gives_a_plan_or_an_error(tmp_path, monkeypatch, config):
    for path in paths(config):
        answers(config, path, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("hidden_size", "x", '`hidden_size` is "x"'),
        ("num_attention_heads", -4, "`num_attention_heads` is -4"),
        ("num_hidden_layers", 200_000, "`num_hidden_layers` is 200,000, and no model has more than 1,000"),
        ("num_local_experts", 100_000, "`num_local_experts` is 100,000, and no model has more than 50,000"),
        ("num_labels", 10**9, "`num_labels` is 1,000,000,000, and no model has more than 1,000,000"),
        ("vocab_size", 10**30, "`vocab_size` is 1,000,000,000,000,000,000,000,000,000,000, and no model has more"),
        ("rms_norm_eps", math.nan, "`rms_norm_eps` is not a number (NaN)"),
    ],
)
def test_errors_name_the_wrong_value_of_a_config(tmp_path, monkeypatch, key, value, told):
    [error] = compiled(LLAMA | {key: value}, tmp_path, monkeypatch).diagnostics
    assert error.code == "unsupported-model"
    assert told in error.message


def test_no_config_of_transformers_exceeds_the_limits():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = {}
    for model_type in zoo.causal_model_types():
        with suppress(Exception):  # a few have no default config
            stated[model_type] = CONFIG_MAPPING[model_type](**zoo.SENSIBLE.get(model_type, {})).to_dict()
    assert len(stated) > 150
    assert {name: problem for name, config in stated.items() if (problem := unreasonable_number(config))} == {}


def test_a_model_of_too_many_modules_is_refused_while_it_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(introspection, "MOST_PARTS", 50)
    [error] = compiled(LLAMA, tmp_path, monkeypatch).diagnostics
    assert "it has more than 50 modules and parameters" in error.message


def test_formulas_replace_a_measurement_of_too_many_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "MOST_OPERATIONS", 300)
    compilation = compiled(LLAMA, tmp_path, monkeypatch)
    [warning] = [each for each in compilation.diagnostics if each.code == "unmeasured-model"]
    assert "it takes more than 300 operations" in warning.message
    assert not compilation.plan.measured
