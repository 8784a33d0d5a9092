"""Makes receipts on this machine with small models: of CPU plans, and of CPU and disk within a memory limit.

Each model is made with random weights, compiled for a machine that was probed once, run by `devmap run --receipt` in a
process of its own, and deleted. What is on disk is read by a process in a memory cgroup of a tenth more than was
predicted, with the files in no cache before (`cold`) or in it (`cached`): it would be ended where that is too little.

What has a receipt already is not run again, and what fails is told and left out: run it again to go on. Needs Linux;
the limits, and emptying the cache, need root. `devmap receipts receipts/*.json` prints what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml

from benchmarks.disk import Cgroup, empty_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

RECEIPTS = Path(__file__).parents[1] / "receipts"

SHAPE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32_000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {**SHAPE, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 128}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense-0.4b": ("Llama", SHAPE),
    "dense-1.6b": ("Llama", {**SHAPE, "hidden_size": 2048, "intermediate_size": 8192}),
    "tied-0.4b": ("Qwen2", {**SHAPE, "num_hidden_layers": 16, "vocab_size": 128_000, "tie_word_embeddings": True}),
    "learned-positions-0.1b": ("GPT2", {"n_positions": 1024}),
    "sliding-window-0.4b": ("Gemma3Text", {**SHAPE, "head_dim": 64, "sliding_window": 128}),
    "mixture-0.7b": (
        "Qwen3Moe",
        {**MIXTURE, "moe_intermediate_size": 512, "num_experts": 32, "num_experts_per_tok": 4},
    ),
    "mixture-1.1b": (
        "Mixtral",
        {**MIXTURE, "intermediate_size": 3584, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "encoder-decoder-0.7b": (
        "T5",
        {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32_128,
         "decoder_start_token_id": 0},
    ),
    "state-space-0.4b": ("Mamba", {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50_280}),
    "encoder-0.3b": (
        "Bert",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
}  # fmt: skip
"""By a name, whose config of transformers' it has, and with what."""

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "vocab_size": 512, "moe_intermediate_size": 32, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "n_embd": 64, "n_layer": 2, "n_head": 4,
}  # fmt: skip
"""What models have in place of it for a trial of this script, as far as they have it."""

CLASSES = {
    "Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration",
    "Bert": "BertModel",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One receipt: a model, how it is stored and loaded, what for, and what of it is on disk.

    `is_cached` says whether the files are in the system's cache before.
    """

    model: str
    stored: str = "bfloat16"
    dtype: str = "bfloat16"
    context_length: int = 512
    batch_size: int = 1
    quantization: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    on_disk: str | None = None
    is_cached: bool = True
    new_tokens: int = 16

    @property
    def name(self) -> str:
        """Return the name of its receipt."""
        cast = "" if self.stored == self.dtype else f"-from-{self.stored}"
        batch = "" if self.batch_size == 1 else f"-{self.batch_size}-sequences"
        method = f"-{self.quantization['method']}" if self.quantization else ""
        disk = "" if self.on_disk is None else "-disk-cached" if self.is_cached else "-disk-cold"
        return f"{self.model}-{self.dtype}{cast}{method}{batch}{disk}"


RUNS = (
    Run(model="learned-positions-0.1b", stored="float32", dtype="float32"),
    Run(model="encoder-0.3b", stored="float32", dtype="float32"),
    Run(model="dense-0.4b"),
    Run(model="dense-0.4b", dtype="float32"),
    Run(model="dense-0.4b", stored="float32"),
    Run(model="dense-0.4b", stored="float32", dtype="float32"),
    Run(model="dense-0.4b", context_length=256, batch_size=8),
    Run(model="dense-0.4b", quantization={"method": "torchao", "quant_type": "Int8WeightOnlyConfig"}, needs="torchao"),
    Run(model="tied-0.4b", context_length=1024),
    Run(model="sliding-window-0.4b", context_length=1024),
    Run(model="state-space-0.4b", context_length=128),
    Run(model="encoder-decoder-0.7b", stored="float32", dtype="float32", context_length=128, new_tokens=112),
    Run(model="mixture-0.7b"),
    Run(model="mixture-1.1b", stored="float32"),
    Run(model="dense-1.6b"),
    Run(model="dense-1.6b", context_length=64, on_disk="model.layers.[::2]", is_cached=False),
    Run(model="dense-1.6b", context_length=64, on_disk="model.layers.[::2]"),
)
"""Those of one model and stored dtype stand together: it is made once."""


def make_model(name: str, stored: str, folder: Path, *, is_tiny: bool) -> None:
    """Save a model of random weights in this process."""
    kind, settings = MODELS[name]
    if is_tiny:
        gpt2 = ("n_embd", "n_layer", "n_head", "vocab_size") if kind == "GPT2" else ()
        settings = {**settings, **{key: value for key, value in TINY.items() if key in (*settings, *gpt2)}}
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, stored))
    model_class = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))
    model_class(getattr(transformers, f"{kind}Config")(**settings)).save_pretrained(folder, max_shard_size="500MB")


def called(*command: str | Path, folder: Path, cgroup: Cgroup | None = None) -> str:
    """Return what a command prints, run in a folder.

    Raises:
        RuntimeError: where it fails, with what it said last.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    enter = None if cgroup is None else cgroup.enter
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=enter
    )
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"exit {done.returncode}: {' '.join(said)[:500] or 'it was ended'}")
    return done.stdout


DEVMAP = Path(sys.executable).with_name("devmap")


def probed_hardware(folder: Path, *, measures: bool) -> dict[str, Any]:
    """Return this machine as a profile has it; its memory alone where it is too busy to be measured."""
    try:
        block = called(DEVMAP, "probe", *(["--measure"] if measures else []), folder=folder)
    except RuntimeError as error:
        print(f"the machine was not measured, so that no times are predicted: {error}", flush=True)
        block = called(DEVMAP, "probe", folder=folder)
    hardware: dict[str, Any] = yaml.safe_load(block)["hardware"]
    hardware["devices"].setdefault("disk", {"memory": "20GiB"})
    return hardware


def profile_of(run: Run, hardware: dict[str, Any]) -> dict[str, Any]:
    """Return the profile of a run."""
    names = ("cpu",) if run.on_disk is None else ("cpu", "disk")
    model: dict[str, Any] = {"source": "model", "dtype": run.dtype}
    pins = [] if run.on_disk is None else [{"match": run.on_disk, "device": "disk"}]
    return {
        "version": 1,
        "model": model | ({"quantization": run.quantization} if run.quantization else {}),
        "workload": {
            "batch_size": run.batch_size,
            "context_length": run.context_length,
            "prompt_length": run.context_length - run.new_tokens,
        },
        "hardware": {**hardware, "devices": {name: hardware["devices"][name] for name in names}},
        "placement": {"strategy": "sequential", "pins": pins, "offload": {"folder": "offload"}},
    }


@contextmanager
def limited(limit_bytes: int | None) -> Iterator[Cgroup | None]:
    """Give a memory cgroup of this limit, where there is one."""
    cgroup = None if limit_bytes is None else Cgroup(limit_bytes)
    try:
        yield cgroup
    finally:
        if cgroup is not None:
            cgroup.close()


def make_receipt(run: Run, hardware: dict[str, Any], folder: Path, receipts: Path) -> str:
    """Write the receipt of a run; return what its process held, as predicted and as seen.

    Raises:
        RuntimeError: where a command fails.
    """
    (folder / f"{run.name}.yaml").write_text(yaml.safe_dump(profile_of(run, hardware)))
    compiled = json.loads(called(DEVMAP, "compile", f"{run.name}.yaml", "--format", "json", folder=folder))
    memory = compiled["process_memory"]
    limit_bytes = None
    if run.on_disk is not None:
        limit_bytes = int(1.1 * (memory["anonymous_bytes"] + memory["file_bytes"]))
        empty_cache()
        for file in (folder / "model").glob("*.safetensors") if run.is_cached else ():
            file.read_bytes()
    written = folder / f"{run.name}.json"
    with limited(limit_bytes) as cgroup:
        called(
            DEVMAP, "run", f"{run.name}.yaml", "-q", "--no-probe", "--receipt", written.name, "--max-new-tokens",
            str(run.new_tokens), folder=folder, cgroup=cgroup,
        )  # fmt: skip
    seen = json.loads(written.read_text())["cases"][0]["seen"]["cpu"]
    receipts.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(written, receipts / written.name)
    return ", ".join(
        f"{part} {memory[f'{part}_bytes'] / 2**20:,.0f} → {seen[f'{part}_bytes'] / 2**20:,.0f} MiB"
        f" ({(memory[f'{part}_bytes'] - seen[f'{part}_bytes']) / max(seen[f'{part}_bytes'], 2**20):+.0%})"
        for part in ("anonymous", "file", "library_file", "peak")
    )


def main() -> int:
    """Make the receipts that are missing; return how many could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of receipts, else all")
    parser.add_argument("--receipts", type=Path, default=RECEIPTS, help="the folder that they are written to")
    parser.add_argument("--tiny", action="store_true", help="make models of no size, to try this script")
    parser.add_argument("--no-measure", action="store_true", help="do not measure this machine: predict memory alone")
    parser.add_argument("--make", nargs=3, metavar=("MODEL", "STORED", "FOLDER"), help="save a model, and end")
    asked = parser.parse_args()
    if asked.make:
        make_model(asked.make[0], asked.make[1], Path(asked.make[2]), is_tiny=asked.tiny)
        return 0
    wanted = [run for run in RUNS if not asked.names or run.name in asked.names]
    missing = [run for run in wanted if not (asked.receipts / f"{run.name}.json").exists()]
    print(f"{len(missing)} of {len(wanted)} receipts are to be made", flush=True)
    failed, made = 0, None
    with TemporaryDirectory() as name:
        folder = Path(name)
        hardware = probed_hardware(folder, measures=not asked.no_measure) if missing else {}
        for number, run in enumerate(missing, 1):
            start_seconds = time.monotonic()
            print(f"[{number}/{len(missing)}] {run.name}: ", end="", flush=True)
            if run.needs is not None and find_spec(run.needs) is None:
                print(f"left out: {run.needs} is not installed", flush=True)
                continue
            try:
                if made != (run.model, run.stored):
                    shutil.rmtree(folder / "model", ignore_errors=True)
                    tiny = ["--tiny"] if asked.tiny else []
                    called(sys.executable, "-m", "benchmarks.receipts", *tiny, "--make", run.model, run.stored,
                           folder / "model", folder=Path(__file__).parents[1])  # fmt: skip
                    made = (run.model, run.stored)
                told = make_receipt(run, hardware, folder, asked.receipts.resolve())
            except (RuntimeError, OSError, KeyError, TypeError) as error:
                failed, told = failed + 1, f"FAILED: {type(error).__name__}: {error}"
            print(f"{told}; {time.monotonic() - start_seconds:.0f} s", flush=True)
            shutil.rmtree(folder / "offload", ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
