"""Train the tiny Llama of the quickstart: `python train.py` writes the model beside this file, in a few minutes.

The model is real (transformers' `LlamaForCausalLM`, eight layers, an untied head) and small enough for git. It knows
one text by heart, so that a generated continuation is readable English and any misplaced weight shows at once.
Needs torch, transformers and tokenizers, one CPU, no network; the seed is fixed.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SEED = 0
STEPS = 450
BATCH_SIZE = 8
WINDOW_TOKENS = 96
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

# One thought a line; no two lines begin alike, so that the first words of a line decide how it goes on.
TEXT = """\
A model is placed before it is loaded: every layer gets a device, and every device gets no more than it can hold.
The plan is written down in a lockfile, so the same profile gives the same map today, tomorrow and next year.
Layers that do not fit on the accelerator may wait on the CPU, and what does not fit there may wait on disk.
Weights on disk are read again at every step, which is slow, but slow is better than a crash at midnight.
Two tensors that are tied share one memory and must never be parted.
When a pin names a layer, the layer goes where the pin says, and the rest is packed around it.
If a pattern matches nothing, the compiler points at the line and names the nearest module that exists.
Memory is counted in bytes, not in hopes: what the profile lists is there, and what it does not list is not.
Small models teach the same lesson as large ones: know what you have, decide where it goes, then check \
that it went there.
Once the plan compiles, it loads; once it loads, it fits; and once it fits, it runs.
This text was learned by heart by eight little layers, and whatever devices they live on, they tell it \
in the same words.
"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens: any input has an encoding, and the text's own words have short ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights, in fp32 for training."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def windows(tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[list[int]]]:
    """Token windows of one length that begin with a line, and those that begin anywhere."""
    lines = [tokenizer.encode(line, add_special_tokens=False) for line in TEXT.splitlines(keepends=True)]
    tokens = [token for line in lines for token in line] + [tokenizer.eos_token_id]
    padded = tokens + [tokenizer.eos_token_id] * WINDOW_TOKENS
    starts = [sum(len(line) for line in lines[:index]) for index in range(len(lines))]
    from_line = [padded[start : start + WINDOW_TOKENS] for start in starts]
    from_anywhere = [padded[start : start + WINDOW_TOKENS] for start in range(len(tokens))]
    return from_line, from_anywhere


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """AdamW with a linear warm-up and decay, half of each batch from the beginning of a line."""
    from_line, from_anywhere = windows(tokenizer)
    chooser = random.Random(SEED)  # noqa: S311 - repeatable on purpose
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / STEPS)
    )
    model.train()
    for step in range(STEPS):
        batch = chooser.choices(from_line, k=BATCH_SIZE // 2) + chooser.choices(from_anywhere, k=BATCH_SIZE // 2)
        input_ids = torch.tensor(batch)
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)


def recited_lines(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> int:
    """How many lines of the text the model gives back word for word from their first three words."""
    recited = 0
    for line in TEXT.splitlines():
        prompt = " ".join(line.split()[:3])
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=WINDOW_TOKENS, do_sample=False)
        recited += tokenizer.decode(output[0], skip_special_tokens=True).startswith(line)
    return recited


def main() -> None:
    """Train, round to bfloat16, check that the text is still known, save."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    train(model, tokenizer)
    model = model.to(torch.bfloat16).eval()
    print(f"{recited_lines(model, tokenizer)} of {len(TEXT.splitlines())} lines by heart")
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    model.save_pretrained(HERE)
    tokenizer.save_pretrained(HERE)


if __name__ == "__main__":
    main()
