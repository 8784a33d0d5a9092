"""Mixtures whose experts compute on the CPU, each against the plain model: collected by a process of its own.

See `test_logits.py`; only the accelerator is simulated.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import simulated_accelerator
import tiny
import torch

from devmap_config import load_model
from devmap_config.cli.compile import compile_command

simulated_accelerator.install()
logging.disable(logging.WARNING)

MIXTURES = {
    "deepseek_v3": "model.layers.3.mlp.experts",
    "ernie4_5_moe": "model.layers.3.mlp.experts",
    "flex_olmo": "model.layers.*.mlp.experts",
    "glm4_moe": "model.layers.3.mlp.experts",
    "mixtral": "model.layers.*.mlp.experts",
    "olmoe": "model.layers.*.mlp.experts",
    "phimoe": "model.layers.*.mlp.experts",
    "qwen2_moe": "model.layers.*.mlp.experts",
    "qwen3_moe": "model.layers.*.mlp.experts",
    "qwen3_next": "model.layers.*.mlp.experts",
}
"""Where the experts of each type are."""


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "experts"), MIXTURES.items())
def test_experts_on_the_cpu(model_type, experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_class = type(tiny.save(model_type, Path("random")))
    plain = model_class.from_pretrained("random", dtype="float32", experts_implementation="eager").eval()
    inputs = tiny.inputs_for(plain)
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, dtype: float32}\n"
        "hardware: {devices: {npu:0: {memory: 8GiB}, cpu: {memory: 8GiB}}}\n"
        f'placement: {{strategy: sequential, pins: [{{match: "{experts}", device: cpu, compute: cpu}}]}}\n'
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    model = load_model("profile.yaml")
    found = model(**{name: tensor.to("npu:0") for name, tensor in inputs.items()}).logits.cpu()
    assert torch.allclose(found, plain(**inputs).logits, rtol=1e-4, atol=1e-5)
