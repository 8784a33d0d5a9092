"""The memory that the system reports for a process is what its plan predicts: its own, pages of files, and the peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM

from devmap_config.cli.compile import compile_command
from devmap_config.compiler import Request, run_pipeline

SCRIPT = Path(__file__).with_name("held_by_a_process.py")
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "vocab_size": 4_000}


def save(name, config):
    torch.manual_seed(0)
    values = {key: value for key, value in {**LLAMA, **config}.items() if key not in ("architectures", "dtype")}
    LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16).save_pretrained(name)


def predicted(name, source, dtype):
    profile = Path(name)
    profile.write_text(
        f"version: 1\nmodel: {{source: {source}, dtype: {dtype}}}\nworkload: {{context_length: 128}}\n"
        "hardware: {devices: {cpu: {memory: 8GiB}}}\nplacement: {strategy: sequential}\n"
    )
    assert compile_command.main([profile.name, "-q", "--no-simulate"], standalone_mode=False) == 0
    found = run_pipeline(Request(path=profile))
    memory = found.process_memory
    return {"anonymous": memory.anonymous_bytes, "file": memory.file_bytes, "peak": memory.peak_bytes}


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what is of files")
def test_process_memory_is_as_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("small", {})
    save("large", LARGE)
    bfloat16, float32 = "bfloat16", "float32"
    profiles = {"small.yaml": ("small", bfloat16), "mapped.yaml": ("large", bfloat16), "cast.yaml": ("large", float32)}
    small, *larger = [predicted(name, *model) for name, model in profiles.items()]
    done = subprocess.run([sys.executable, SCRIPT, *profiles], capture_output=True, check=True)
    seen_small, *seen_larger = json.loads(done.stdout)
    # Libraries take more or less by their versions, and of their files as many pages are mapped as the system has at
    # hand: 121 to 217 MiB were seen. What a model takes beyond that does not vary so.
    assert small["anonymous"] == pytest.approx(seen_small["anonymous"], rel=0.25)
    for plan, seen in zip(larger, seen_larger, strict=True):
        for part in small:
            more_bytes = pytest.approx(seen[part] - seen_small[part], rel=0.1, abs=12_000_000)
            assert plan[part] - small[part] == more_bytes
