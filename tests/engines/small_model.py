"""Makes a checkpoint of six layers, with a tokenizer: `python small_model.py FOLDER`.

Its weights are random, and such that the likeliest token is far ahead of the others.
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
        vocab_size=512, max_position_embeddings=2048, bos_token_id=0, eos_token_id=511,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    made.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(512)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w511").save_pretrained(folder)


if __name__ == "__main__":
    write_model(sys.argv[1])
