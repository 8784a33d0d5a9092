"""Which layers see how far back, and with how many heads, held to transformers' config classes."""

from __future__ import annotations

import json

import pytest
from conftest import LLAMA
from transformers import CONFIG_MAPPING, AutoConfig

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.pipeline.windows import EVERY_FULL, EVERY_SLIDING, SWITCHED, UnknownWindowsError, windows_of

SAID = (
    {},
    {"sliding_window": 512},
    {"sliding_window": 512, "sliding_window_pattern": 3},
    {"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 3},
    {"sliding_window": 512, "use_sliding_window": True},
)


@pytest.mark.parametrize("family", sorted({*EVERY_FULL, *EVERY_SLIDING, *SWITCHED}))
def test_windows_are_those_of_the_config_class(family):
    """What a config leaves to its class gives the same windows as what that class makes of it."""
    for said in SAID:
        config = {"model_type": family, "num_hidden_layers": 8, **said}
        made = CONFIG_MAPPING[family](**{key: value for key, value in config.items() if key != "model_type"})
        assert windows_of(config, 8) == windows_of(made.to_dict(), 8), said


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "afmoe", "sliding_window": 512},
        {"model_type": "dots1", "sliding_window": 512, "max_window_layers": 3},
        {"model_type": "qwen3_next", "full_attention_interval": 4},
        {"model_type": "exaone4", "sliding_window": 512, "sliding_window_pattern": "LLLG"},
        {"model_type": "mistral", "sliding_window": "all"},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "3"},
    ],
)
def test_windows_that_are_not_known_are_not_guessed(config):
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
def test_a_config_that_its_class_has_saved_gives_the_same_plan(planned, tmp_path, family, more):
    config = {**SMALL, "architectures": [family], "sliding_window": 256, **more}
    before = planned("hub", config)
    AutoConfig.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {"full_attention", "sliding_attention"} == set(saved["layer_types"])
    assert planned("again", saved) == before


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
def test_a_query_of_many_heads_may_have_one_of_keys(planned, config, heads):
    pipeline = planned("model", config)
    for stage in pipeline.stages:
        assert stage.page_bytes == pipeline.block_size * stage.layers * 2 * heads * 16 * 2  # keys and values of 16
