"""Every tensor of the architectures in the table has a GGUF name; tests/engines compares them with the engine's own."""

from __future__ import annotations

import json

import pytest
from conftest import LLAMA

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.exports.llama_cpp import _module_of, names_of

TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_tensor_has_a_gguf_name(model_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**LLAMA, "architectures": [TYPES[model_type]], "model_type": model_type, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nmodel: {source: config.json}\nhardware: {devices: {cuda:0: {memory: 4GiB}}}\n")
    compiled = run_pipeline(Request(path=profile))
    assert isinstance(compiled, Compiled), compiled.diagnostics
    held = {_module_of(name) for name, tensor in compiled.graph.tensors.items() if tensor.persistent}
    assert held == set(names_of(model_type))
