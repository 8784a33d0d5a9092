"""Small configs of each kind of model, which tests run with real numbers."""

from __future__ import annotations

from typing import Any

import transformers

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 32}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}

SLIDING = {**GROUPED, "head_dim": 32, "sliding_window": 64, "sliding_window_pattern": 2}
HYBRID = {
    **SMALL,
    "num_key_value_heads": 4,
    "mamba_d_state": 16,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "n_mamba_heads": 8,
    "num_mem_blocks": 1,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": False}),
    "grouped queries": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "one key-value head": ("FalconForCausalLM", "FalconConfig", {**SMALL, "multi_query": True}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "learned positions": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 512},
    ),
    "latent attention": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**SMALL, **LATENT, **EXPERTS}),
    "sliding window": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 64}),
    "sliding and full": ("Gemma3ForCausalLM", "Gemma3TextConfig", SLIDING),
    "experts": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4, "sliding_window": None}),
    "many experts": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    ),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 128, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 512, "d_kv": 32},
    ),
    "state space": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "state_size": 8},
    ),
    "hybrid": ("Zamba2ForCausalLM", "Zamba2Config", HYBRID),
}
"""The model's class, its config's class, and its config."""

if hasattr(transformers, "DoryConfig"):  # newer than the oldest version that is tried
    LOOPED = {**GROUPED, "head_dim": 32, "num_hidden_layers": 6, "sliding_window": 64}
    MODELS["looped"] = (
        "DoryForCausalLM",
        "DoryConfig",
        {**LOOPED, "n_input_layers": 1, "n_output_layers": 1},
    )

DEEP: dict[str, dict[str, Any]] = {
    "learned positions": {"n_layer": 7},
    "encoder-decoder": {"num_layers": 7},
    "hybrid": {"num_hidden_layers": 8, "layers_block_type": ["mamba", "hybrid"] * 4},
}
"""Values that set the number of blocks, for kinds that need others than `num_hidden_layers`."""


def config_of(name: str, **arguments: Any) -> Any:
    """Return the config of a kind, with some values replaced."""
    _, config_class, own = MODELS[name]
    return getattr(transformers, config_class)(**{**own, **arguments})


def deep_config_of(name: str) -> Any:
    """Return the config of a kind with more blocks than a measurement runs."""
    return config_of(name, **DEEP.get(name, {"num_hidden_layers": 7}))


def config_of_shared_caches() -> Any:
    """Return the config of a Gemma 3n whose later layers read the caches of earlier ones."""
    sizes = {**GROUPED, "head_dim": 32, "num_hidden_layers": 12, "num_kv_shared_layers": 7, "sliding_window": 16}
    return transformers.Gemma3nTextConfig(
        **{**sizes, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "vocab_size_per_layer_input": 512},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 12,
    )
