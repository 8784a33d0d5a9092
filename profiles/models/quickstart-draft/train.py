"""Train the quickstart's draft model: `python train.py` writes it beside this file, in a minute on one CPU.

It is the quickstart's model with two layers of half the width, and learns the same text: most of what it proposes is
right. Needs torch, transformers and tokenizers, no network; the seed is fixed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "quickstart"


def main() -> None:
    """Train it as the quickstart's is, and save it in bfloat16."""
    spec = importlib.util.spec_from_file_location("quickstart_train", BASE / "train.py")
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    torch.manual_seed(quickstart.SEED)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = LlamaConfig.from_pretrained(BASE)
    config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8})
    model = LlamaForCausalLM(config)
    quickstart.train(model, tokenizer)
    model = model.to(torch.bfloat16).eval()
    print(f"{quickstart.recited_lines(model, tokenizer)} of {len(quickstart.TEXT.splitlines())} lines by heart")
    model.save_pretrained(HERE)


if __name__ == "__main__":
    main()
