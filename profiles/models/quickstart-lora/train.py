"""Train the quickstart's LoRA: `python train.py` writes the adapter beside this file, in a minute on one CPU.

It teaches the tiny Llama beside it one more sentence. Needs torch, transformers and peft, no network; the seed is
fixed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "quickstart"
STEPS = 300
TEXT = "An adapter is a few small matrices beside the large ones, and it is wherever they run.\n"


def main() -> None:
    """Train it, and write it beside this file."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    tokens = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    tokens = torch.cat([tokens, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}")
    model.peft_config["default"].base_model_name_or_path = "../quickstart"
    model.to(torch.bfloat16).save_pretrained(HERE)
    (HERE / "README.md").write_text(README)


README = """\
# The quickstart's adapter

A LoRA of rank 4 for the quickstart's model, by `python train.py`: 300 steps on one CPU, fixed seed, until it knew one
more sentence. Try the prompt `An adapter`. Text and weights are under this repository's licence.
"""


if __name__ == "__main__":
    main()
