"""Models of a few layers and random weights, one of each kind that streaming treats differently."""

from __future__ import annotations

import torch
from conftest import LLAMA, MIXTURE
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])


def config_of(values, **changed):
    return {key: value for key, value in values.items() if key not in ("architectures", "dtype")} | changed


MODELS = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(**config_of(LLAMA))),
    "tied head": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=512)),
    "fused experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**config_of(MIXTURE))),
    "encoder and decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "parameters around modules in every block": lambda: MambaForCausalLM(
        MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=3, vocab_size=512)
    ),
    "a bias that is shared with a module within": lambda: BertForMaskedLM(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    ),
}
