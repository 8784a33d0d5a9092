"""Adapters of small models, made and saved by PEFT, with random weights that change the model's output."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")

KINDS = {
    "two matrices of each layer": {"target_modules": ["q_proj", "v_proj"]},
    "an expression": {"target_modules": r".*\.(\d+)\.(self_attn|mlp)\.(q|up)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "all linear but": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.3.mlp.up_proj"]},
    "excluded by an expression": {"target_modules": ["o_proj", "k_proj"], "exclude_modules": r".*\.[12]\..*"},
    "ranks by name": {
        "target_modules": ["q_proj", "gate_proj"],
        "rank_pattern": {"gate_proj": 2, r"layers\.[0-2]\..*q_proj": 5, "q_proj": 3},
        "alpha_pattern": {"q_proj": 7},
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1, 4]},
    "one layer of a list": {"target_modules": ["v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    "rank-stabilised": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 4},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "an embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "a module whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "with biases": {"target_modules": ["q_proj", "k_proj"], "bias": "all"},
    "with a bias of its own": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
}
"""Arguments of PEFT's `LoraConfig`, for a Llama with biases."""


def adapted(model, seed=1, **arguments):
    """Wrap a model in PEFT's model, with random weights."""
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 12, "task_type": "CAUSAL_LM", **arguments})
    result = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.rand(parameter.shape) * (1 if "magnitude" in name else 0.2))
    return result.eval()


def save_adapter(model, folder="adapter", **arguments):
    """Save such an adapter without the embeddings that PEFT would add."""
    result = adapted(model, **arguments)
    result.save_pretrained(folder, save_embedding_layers=False)
    return result
