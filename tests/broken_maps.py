"""Device maps that load but do not run, with small models that show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conftest import LLAMA

SHARING_CODE = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


class SharingConfig(LlamaConfig):
    model_type = "sharing"


class SharingAttention(LlamaAttention):
    """Asks the keys and values that the layer three before has cached."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **options):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        cache = options.get("cache", options.get("past_key_values"))  # its name until transformers 5.24
        shared = cache.layers[self.layer_idx - 3]
        attended = torch.nn.functional.scaled_dot_product_attention(query, shared.keys, shared.values, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None


class SharingForCausalLM(LlamaForCausalLM):
    config_class = SharingConfig

    def __init__(self, config):
        super().__init__(config)
        for index in range(3, config.num_hidden_layers):
            self.model.layers[index].self_attn = SharingAttention(config, index)
'''

SHARED_CACHE: dict[str, Any] = {
    **LLAMA,
    "architectures": ["SharingForCausalLM"],
    "model_type": "sharing",
    "auto_map": {
        "AutoConfig": "modeling_sharing.SharingConfig",
        "AutoModelForCausalLM": "modeling_sharing.SharingForCausalLM",
    },
}
"""A model whose last layers read the cache of earlier ones without being passed it."""

OWN_ROTATION: dict[str, Any] = {
    "architectures": ["MoshiForCausalLM"],
    "model_type": "moshi",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "sliding_window": 64,
}
"""A model in which every attention has its own rotary embedding."""


@dataclass(frozen=True)
class BrokenMap:
    """A model and a map by patterns, with accelerators by index; the module at which running fails, and the modules
    that the repair names.
    """

    config: dict[str, Any]
    device_map: dict[str, int]
    running: str
    mend: str
    code: str | None = None


BROKEN_MAPS = {
    "a residual block is split": BrokenMap(
        LLAMA,
        {"model": 0, "lm_head": 0, "model.layers.3.mlp": 1},
        "model.layers.3",
        "give all of `model.layers.3` one device",
    ),
    "layers that share a cache are apart": BrokenMap(
        SHARED_CACHE,
        {"model": 0, "lm_head": 0, "model.layers.[3-5]": 1},
        "model.layers.3.self_attn",
        "give `model.layers.[0,3]` one device, or pin them by one rule with `keep_together: true`",
        SHARING_CODE,
    ),
    "a rotary embedding is on the wrong side": BrokenMap(
        OWN_ROTATION,
        {"model": 0, "lm_head": 0, "model.layers.1.self_attn.rotary_emb": 1},
        "model.layers.1.self_attn",
        "give all of `model.layers.1` one device",
    ),
}
