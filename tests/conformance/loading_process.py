"""A script that loads the model of a profile and prints the most RAM that its process held, without pages of files."""

from __future__ import annotations

import re
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from devmap_config import load_model
from devmap_config.devices import CPU
from devmap_config.runner.inspection import tensor_home

STATUS = Path("/proc/self/status")
MAPS = Path("/proc/self/maps")


def anonymous_bytes():
    return int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text()).group(1)) * 1024


def mapped_bytes(model):
    """Return the bytes of weights that are stored on the CPU and are pages of a file; those on disk are, too."""
    lines = [line.split() for line in MAPS.read_text().splitlines() if "safetensors" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    return sum(
        each.numel() * each.element_size()
        for name, each in model.named_parameters()
        if tensor_home(model, name) == CPU and any(begin <= each.data_ptr() < end for begin, end in spans)
    )


def main():
    tiny = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    AutoModelForCausalLM.from_config(tiny)  # what is imported is not counted
    for module in ("compiler", "locked", "runner.runner", "runner.loading", "dispatch.mapped_weights"):
        import_module(f"devmap_config.{module}")
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, most, is_over = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not is_over.is_set():
            most[0] = max(most[0], anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(sys.argv[1])
    is_over.set()
    watcher.join()
    print(most[0] - before + mapped_bytes(model))


if __name__ == "__main__":
    main()
