"""Attention windows and heads by layer are read from configs as transformers' config classes do."""

from __future__ import annotations

import json

import pytest
from conftest import LLAMA
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.pipeline.architectures import architectures
from devmap_config.pipeline.windows import (
    ALL_FULL,
    EVERY_FULL,
    EVERY_SLIDING,
    FIRST_FULL,
    SWITCHED,
    UnknownWindowsError,
    windows_of,
)

SAID = (
    {},
    {"sliding_window": 512},
    {"sliding_window": 512, "sliding_window_pattern": 3, "global_attn_every_n_layers": 3},
    {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 512, "use_sliding_window": True},
)


@pytest.mark.parametrize(
    "family", sorted({*EVERY_FULL, *FIRST_FULL, *ALL_FULL, *EVERY_SLIDING, *SWITCHED} & set(CONFIG_MAPPING))
)
def test_windows_are_those_of_the_config_class(family):
    """Values that a config omits give the same windows as its class derives."""
    for said in SAID:
        config = {"model_type": family, "num_hidden_layers": 8, **said}
        made = CONFIG_MAPPING[family](**{key: value for key, value in config.items() if key != "model_type"})
        assert windows_of(config, 8) == windows_of(made.to_dict(), 8), said


def test_windows_are_not_guessed_for_any_family_of_vllm():
    """A default config without its layer types gives the windows that its class derives, or is refused."""
    known = 0
    for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if not {name} & architectures():
            continue
        config = CONFIG_MAPPING[family]().to_dict()
        count = config.get("num_hidden_layers") or config.get("n_layer") or 0
        without = {key: value for key, value in config.items() if key != "layer_types"}
        try:
            windows = windows_of(without, count)
        except UnknownWindowsError:
            continue
        assert windows == windows_of(config, count), family
        known += 1
    assert known > 30


def test_vllm_counts_one_token_more_for_cohere2():
    assert windows_of({"model_type": "cohere2", "sliding_window": 512}, 4) == (513, 513, 513, None)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "cohere2_moe", "sliding_window": 512},
        {"model_type": "inkling_text"},
        {"model_type": "exaone_moe", "sliding_windows": [128, 512]},
        {"model_type": "mamba", "state_size": 16},
        {"model_type": "dots1", "sliding_window": 512, "max_window_layers": 3},
        {"model_type": "qwen3_next", "full_attention_interval": 4},
        {"model_type": "exaone4", "sliding_window": 512, "sliding_window_pattern": "LLLG"},
        {"model_type": "mistral", "sliding_window": "all"},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "3"},
    ],
)
def test_unknown_windows_are_an_error(config):
    with pytest.raises(UnknownWindowsError):
        windows_of(config, 8)


SMALL = {key: LLAMA[key] for key in LLAMA if key not in ("architectures", "model_type")}

PROFILE = """version: 1
model: {source: %s}
workload: {context_length: 4096, concurrency: 2}
hardware: {devices: {"cuda:[0-1]": {memory: 1GiB}}}
targets: [vllm]
"""


@pytest.fixture
def planned(tmp_path):
    def planned(name, config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / f"{name}.yaml").write_text(PROFILE % name)
        found = run_pipeline(Request(path=tmp_path / f"{name}.yaml"))
        assert isinstance(found, Compiled), found.diagnostics
        return found.plan.pipeline

    return planned


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Gemma2ForCausalLM", {"model_type": "gemma2", "head_dim": 16}),
        ("Gemma3ForCausalLM", {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 3}),
        ("Cohere2ForCausalLM", {"model_type": "cohere2"}),
        ("Qwen2ForCausalLM", {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4}),
    ],
)
def test_a_config_saved_by_its_class_gives_the_same_plan(planned, tmp_path, family, more):
    config = {**SMALL, "architectures": [family], "sliding_window": 256, **more}
    before = planned("hub", config)
    AutoConfig.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {"full_attention", "sliding_attention"} == set(saved["layer_types"])
    assert planned("again", saved) == before


def test_layers_whose_cache_differs_from_their_config_are_refused(tmp_path):
    """In Gemma 4, layers with full attention have heads of another size than those with a window."""
    config = {**SMALL, "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "head_dim": 16}
    config |= {"global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 256}
    config |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "profile.yaml").write_text(PROFILE % "model")
    found = run_pipeline(Request(path=tmp_path / "profile.yaml"))
    [error] = [finding for finding in found.diagnostics if finding.is_error]
    assert (error.code, error.span.line) == ("beyond-vllm", 2)
    told = (
        "`model.layers.1` keeps 128 bytes of a token by its config, and its code kept 1,048,576 bytes of 4,096 tokens"
    )
    assert error.message.endswith(told)


FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}
BIGCODE = {
    "architectures": ["GPTBigCodeForCausalLM"],
    "model_type": "gpt_bigcode",
    "dtype": "bfloat16",
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 8192,
    "vocab_size": 256,
}


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (FALCON, 1),
        ({**FALCON, "num_kv_heads": 2}, 1),
        ({**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}, 2),
        ({**FALCON, "multi_query": False}, 4),
        (BIGCODE, 1),
        ({**BIGCODE, "multi_query": False}, 4),
    ],
)
def test_page_sizes_follow_the_number_of_key_value_heads(planned, config, heads):
    pipeline = planned("model", config)
    for stage in pipeline.stages:
        assert stage.page_bytes == pipeline.block_size * stage.layers * 2 * heads * 16 * 2  # keys and values of 16
