"""Compares ways to run a model larger than memory: `devmap run`, accelerate's hooks, and the system's paging alone.

A Llama with random weights, at least twice as large as the memory, is loaded and generates, in a process of its own
each time, in a memory cgroup of the memory that the profile states and a tenth. The files are in no cache before. They
take turns, and then again:

- `devmap`: the plan of the profile, by its lock;
- `accelerate`: the same map by plain `from_pretrained`;
- `mapped`: plain `device_map="cpu"`, by which parameters are the file's pages, and the system decides which stay;
- `resident`: the same with as much memory as there is, which is the time of computing.

Beside the times stands the longer of two that bound them: of reading what is on disk by mapping, at the rate of the
same round, and of computing. Needs root, for the cgroup and to empty the cache.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from devmap_config import load_model
from devmap_config.runner.generation_times import TokenClock

TOKENS, ROUNDS = 6, 3
LAYERS, HIDDEN, INNER = 28, 2048, 8192
MEMORY_MIB, RESERVE_MIB = 1_700, 500
"""What the profile states; what the process itself takes is the reserve."""

PROFILE = f"""version: 1
model: {{source: model}}
workload: {{context_length: 64}}
hardware:
  devices:
    cpu: {{memory: {MEMORY_MIB}MiB, reserve: {RESERVE_MIB}MiB, bandwidth: 12GB/s, flops: 200GFLOP/s}}
    disk: {{memory: 20GiB, bandwidth: 1GB/s}}
placement: {{strategy: fastest, offload: {{folder: offload}}}}
"""


def make_model(folder: Path) -> None:
    """Save a model of random weights, made tensor by tensor by `save_pretrained`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, vocab_size=32_000,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


class Cgroup:
    """A memory cgroup, of either version."""

    def __init__(self, limit_bytes: int) -> None:
        """Make one with this limit."""
        v1 = Path("/sys/fs/cgroup/memory")
        self.folder = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"devmap-benchmark-{os.getpid()}"
        self.folder.mkdir()
        self.is_v1 = v1.is_dir()
        (self.folder / ("memory.limit_in_bytes" if self.is_v1 else "memory.max")).write_text(str(limit_bytes))

    def enter(self) -> None:
        """Move this process into it; called between fork and exec."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def anonymous_bytes(self) -> int:
        """Return its bytes that are not pages of files."""
        lines = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(lines["total_rss" if self.is_v1 else "anon"])

    def close(self) -> None:
        """Remove it."""
        self.folder.rmdir()


def run_one(mode: str) -> None:
    """Load and generate in this process, and print the times."""
    begun = time.monotonic()
    if mode == "devmap":
        model = load_model("profile.yaml", probe=False)
    else:
        device_map = json.loads(Path("profile.lock.json").read_text())["plan"]["device_map"]
        model = AutoModelForCausalLM.from_pretrained(
            "model", device_map=device_map if mode == "accelerate" else "cpu", dtype=torch.bfloat16,
            offload_folder="offload-of-accelerate",
        )  # fmt: skip
    loaded = time.monotonic()
    prompt = torch.arange(1, 33).unsqueeze(0)
    clock = TokenClock()
    tokens = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, streamer=clock)
    prefill, *decode = (after - before for before, after in pairwise(clock.seconds))
    print(json.dumps({
        "load_seconds": loaded - begun, "prefill_seconds": prefill, "decode_seconds": median(decode),
        "tokens": tokens[0, 32:].tolist(),
    }))  # fmt: skip


def probed_bytes_per_second(folder: Path) -> float:
    """Return the rate at which the checkpoint is read through a mapping, with none of it in memory before."""
    read_bytes, begun = 0, time.monotonic()
    for path in sorted(folder.glob("*.safetensors"))[:3]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            memory.madvise(mmap.MADV_SEQUENTIAL)
            for start in range(0, len(memory), 2**23):
                sum(memory[start : start + 2**23 : mmap.PAGESIZE])
            read_bytes += len(memory)
    return read_bytes / (time.monotonic() - begun)


def empty_cache() -> None:
    """Make the system drop all cached files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def measure(mode: str) -> dict[str, object]:
    """Run one way in a process and a cgroup of its own."""
    empty_cache()
    cgroup = Cgroup(2**50 if mode == "resident" else int(MEMORY_MIB * 2**20 * 1.1))
    try:
        command = [sys.executable, str(Path(__file__).resolve()), "--run", mode]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=cgroup.enter, check=False)
    finally:
        cgroup.close()
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make the model, compile the profile, and print the table."""
    with TemporaryDirectory(dir=Path.cwd()) as name:
        os.chdir(name)
        subprocess.run([sys.executable, str(Path(__file__).resolve()), "--make"], check=True, capture_output=True)
        Path("profile.yaml").write_text(PROFILE)
        subprocess.run([Path(sys.executable).with_name("devmap"), "compile", "-q", "profile.yaml"], check=True)
        plan = json.loads(Path("profile.lock.json").read_text())["plan"]
        rates: list[float] = []
        runs: dict[str, list[dict[str, object]]] = {"devmap": [], "accelerate": [], "mapped": [], "resident": []}
        for _ in range(ROUNDS):
            empty_cache()
            rates.append(probed_bytes_per_second(Path("model")))
            for mode, found in runs.items():
                found.append(measure(mode))
                print(mode, found[-1], file=sys.stderr)
        streamed_bytes = plan["prediction"]["streamed_bytes_per_token"]
        print(f"executor {plan['executor']}; {streamed_bytes / 2**30:.2f} GiB on disk are read for each token")
        print(f"mapped reads: {' '.join(f'{rate / 1e9:.2f}' for rate in rates)} GB/s")
        least = [
            max(streamed_bytes / rate, float(resident["decode_seconds"]))  # type: ignore[arg-type]
            for rate, resident in zip(rates, runs["resident"], strict=True)
        ]
        print(f"so that a token takes at the least {' '.join(f'{seconds:.2f}' for seconds in least)} s")
        print("\n| | load s | prefill s | a token s | spread | times `devmap` |\n|---|---|---|---|---|---|")
        own = [float(each["decode_seconds"]) for each in runs["devmap"]]  # type: ignore[arg-type]
        for mode, found in runs.items():
            if failed := next((each["failed"] for each in found if "failed" in each), None):
                print(f"| {mode} | {failed} | | | | |")
                continue
            decode = [float(each["decode_seconds"]) for each in found]  # type: ignore[arg-type]
            load, prefill = (median(float(each[key]) for each in found) for key in ("load_seconds", "prefill_seconds"))  # type: ignore[arg-type]
            ratio = median(theirs / ours for theirs, ours in zip(decode, own, strict=True))
            spread = f"{min(decode):.2f} to {max(decode):.2f}"
            print(f"| {mode} | {load:.1f} | {prefill:.2f} | {median(decode):.2f} | {spread} | {ratio:.2f} |")
        bound = median(ours / seconds for ours, seconds in zip(own, least, strict=True))
        print(f"\n`devmap` takes {bound:.2f} times the longer of reading and computing")
        tokens = {str(each.get("tokens")) for found in runs.values() for each in found}
        print(f"the same tokens each time: {'yes' if len(tokens) == 1 else 'no'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="load and generate in this process (`devmap`, `accelerate`, `mapped`)")
    parser.add_argument("--make", action="store_true", help="save the model")
    asked = parser.parse_args()
    if asked.run:
        run_one(asked.run)
    elif asked.make:
        make_model(Path("model"))
    else:
        main()
