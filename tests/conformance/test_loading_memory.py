"""The RAM that a plan predicts for loading is what the loading process holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from devmap_config.cli.compile import compile_command
from devmap_config.compiler import Request, run_pipeline

LLAMA = (
    LlamaForCausalLM,
    LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=16000,
        tie_word_embeddings=False,
    ),
)
MIXTURE = (
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig(
        hidden_size=1024,
        moe_intermediate_size=512,
        intermediate_size=1024,
        num_experts=32,
        num_experts_per_tok=2,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=8000,
        tie_word_embeddings=False,
    ),
)

HALF = "strategy: sequential, offload: {folder: ./offload}, pins: [{match: 'model.layers.[3-]', device: disk}]"
BASE_BYTES = 30_000_000
"""What reading a profile and building a model without data take in themselves, about."""


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("model", "stored", "placement"),
    [
        pytest.param(LLAMA, torch.bfloat16, "strategy: sequential", id="as it is stored"),
        pytest.param(LLAMA, torch.float32, "strategy: sequential", id="cast"),
        pytest.param(LLAMA, torch.float32, HALF, id="cast and half of it on disk"),
        pytest.param(MIXTURE, torch.bfloat16, "strategy: sequential", id="experts that are merged"),
        pytest.param(MIXTURE, torch.bfloat16, HALF, id="experts that are merged and written to disk"),
    ],
)
def test_loading_process_holds_the_predicted_ram(model, stored, placement, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_class, config = model
    model_class(config).to(stored).save_pretrained("random", max_shard_size="200MB")
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, dtype: bfloat16}\n"
        f"hardware: {{devices: {{cpu: {{memory: 8GiB}}, disk: {{memory: 8GiB}}}}}}\nplacement: {{{placement}}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q", "--no-simulate"], standalone_mode=False) == 0
    plan = run_pipeline(Request(path=Path("profile.yaml"))).plan
    script = REPOSITORY / "tests" / "conformance" / "loading_process.py"
    done = subprocess.run([sys.executable, script, "profile.yaml"], capture_output=True, text=True, check=True)
    measured_bytes = int(done.stdout.splitlines()[-1])
    assert measured_bytes <= plan.loading_ram_bytes + BASE_BYTES
    assert plan.loading_ram_bytes <= 1.25 * measured_bytes
