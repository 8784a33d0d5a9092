"""Models whose own forward, outside of every block, combines the outputs of several blocks: their code, and ways of
combining.
"""

from __future__ import annotations

from typing import Any

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class JoiningConfig(PretrainedConfig):
    model_type = "joining"

    def __init__(self, hidden_size=32, num_layers=6, vocab_size=300, **options):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_layers = self.num_hidden_layers = num_layers
        self.num_attention_heads = 4
        super().__init__(**options)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, hidden, earlier=None):
        query, key, value = self.mix(self.norm(hidden)).chunk(3, -1)
        mixed = torch.softmax(query @ key.transpose(-1, -2), -1) @ value
        if earlier:
            mixed = mixed @ earlier[0].out.weight
        return hidden + self.out(mixed), torch.stack((key, value)).unsqueeze(0)


class JoiningModel(PreTrainedModel):
    config_class = JoiningConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids):
        hidden, kept, joined = self.embed(input_ids), [], None
        for layer in self.layers:
            hidden, pair = layer(hidden)
            kept.append((hidden, pair))
            __EACH__
        __END__
        return self.norm(hidden)


class JoiningForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = JoiningConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = JoiningModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, **options):
        return CausalLMOutputWithPast(logits=self.lm_head(self.transformer(input_ids)))
"""

WITHIN = "a weight of the first block, within each other"

JOINS: dict[str, tuple[str, str]] = {
    "caches that are stacked as they come": (
        "joined = pair if joined is None else torch.cat((joined, pair), dim=0)",
        "",
    ),
    "caches that are stacked in the end": ("", "joined = torch.cat([pair for _, pair in kept], dim=0)"),
    "outputs that are summed as they come": ("joined = hidden if joined is None else joined + hidden", ""),
    "outputs that are averaged in the end": ("", "hidden = torch.stack([each for each, _ in kept]).mean(0)"),
    "the first output beside the last": ("", "hidden = hidden + kept[0][0]"),
    "the first half beside the second": (
        "",
        "half = len(kept) // 2; hidden = hidden + sum(kept[i][0] * kept[-1 - i][0] for i in range(half))",
    ),
    "a weight of the first block": ("hidden = hidden @ self.layers[0].out.weight", ""),
    WITHIN: ("", ""),
    "the tokens beside the last output": ("", "hidden = hidden * (input_ids > 0).unsqueeze(-1)"),
    "the embedding beside the last output": ("", "hidden = hidden + self.embed(input_ids)"),
}


def code_of(join: str) -> str:
    """Return the code of the model that combines outputs in this way."""
    each, end = JOINS[join]
    code = CODE.replace("__EACH__", each or "pass").replace("__END__", end or "pass")
    if join == WITHIN:
        code = code.replace("layer(hidden)", "layer(hidden, self.layers[:1])")
    return code


def config_of(layers: int) -> dict[str, Any]:
    """Return the config of such a model."""
    return {
        "architectures": ["JoiningForCausalLM"],
        "model_type": "joining",
        "auto_map": {
            "AutoConfig": "modeling_joining.JoiningConfig",
            "AutoModelForCausalLM": "modeling_joining.JoiningForCausalLM",
        },
        "dtype": "float32",
        "hidden_size": 32,
        "num_layers": layers,
        "vocab_size": 300,
    }
