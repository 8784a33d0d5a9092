"""Predicted memory for quantising a model and running it on a CPU is at least what a process really holds.

The real packages do it (the extra `quantizers`), each in a process of its own that samples its memory every
millisecond. One projection is far larger than all other modules, so that any additional copy is noticed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

pytestmark = pytest.mark.zoo

CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 28_672,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
METHODS = {
    "bnb-8bit": "method: bitsandbytes, load_in_8bit: true",
    "bnb-fp4": "method: bitsandbytes, load_in_4bit: true, bnb_4bit_compute_dtype: {dtype}",
    "bnb-nf4": "method: bitsandbytes, load_in_4bit: true, bnb_4bit_compute_dtype: {dtype}, bnb_4bit_quant_type: nf4",
    "torchao-int8": "method: torchao, quant_type: Int8WeightOnlyConfig",
    "torchao-float8": "method: torchao, quant_type: Float8WeightOnlyConfig",
    "quanto-int8": "method: quanto, weights: int8",
    "quanto-float8": "method: quanto, weights: float8",
    "quanto-int4": "method: quanto, weights: int4",
}
WIDE = ("bnb-8bit", "torchao-float8", "quanto-int8")
"""Of these, the copies depend on whether the weights are in float32 already."""

SEEN = """
import json, sys, threading, time
import psutil, torch
from devmap_config import load_model
from devmap_config.runner.loading import giving_back_at_once

process, most, is_over = psutil.Process(), [0], threading.Event()
def anonymous():
    memory = process.memory_info()
    return memory.rss - memory.shared
def watch():
    while not is_over.wait(0.001):
        most[0] = max(most[0], anonymous())
def step(work):
    before, most[0] = anonymous(), 0
    made = work()
    time.sleep(0.01)
    return made, max(most[0], anonymous()) - before
threading.Thread(target=watch, daemon=True).start()
small = load_model("small.yaml")  # the packages, and what they make once
with torch.inference_mode():
    small(torch.ones(1, 64, dtype=torch.long))
model, loading = step(lambda: load_model("large.yaml"))
with torch.inference_mode(), giving_back_at_once():
    _, running = step(lambda: model(torch.ones(1, 64, dtype=torch.long), use_cache=False))
is_over.set()
print(json.dumps({"loading": loading, "running": running}))
"""


COMPILE = "from devmap_config.cli import main; main()"


def python(folder, code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def planned(folder, name, quantization, dtype):
    text = (
        f"version: 1\nmodel: {{source: {name}, dtype: {dtype}, quantization: {{{quantization}}}}}\n"
        "workload: {context_length: 64}\n"
        "hardware: {devices: {cpu: {memory: 16GiB}}}\n"
        "placement: {strategy: single}\n"
    )
    (folder / f"{name}.yaml").write_text(text)
    compilation = python(folder, COMPILE, "compile", f"{name}.yaml", "--format", "json")
    return compilation["plan"]["devices"][0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory by dtype, with a model that each package can load, and a large one."""
    made = {}

    def make(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp(dtype)
            for name, settings in (("small", {**CONFIG, "intermediate_size": 256}), ("large", CONFIG)):
                model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
                model.to(getattr(torch, dtype)).save_pretrained(made[dtype] / name)
        return made[dtype]

    return make


@pytest.mark.parametrize(
    ("method", "dtype"), [*((method, "bfloat16") for method in METHODS), *((method, "float32") for method in WIDE)]
)
def test_loading_and_running_a_quantised_model_hold_no_more_than_planned(method, dtype, checkpoints):
    folder = checkpoints(dtype)
    quantization = METHODS[method].format(dtype=dtype)
    planned(folder, "small", quantization, dtype)
    use = planned(folder, "large", quantization, dtype)
    seen = python(folder, SEEN)
    slack_bytes = 16 * 2**20
    assert seen["loading"] <= 1.05 * use["loading_bytes"] + slack_bytes
    assert seen["loading"] >= 0.7 * use["loading_bytes"]
    assert seen["running"] <= 1.05 * use["activation_bytes"] + slack_bytes
