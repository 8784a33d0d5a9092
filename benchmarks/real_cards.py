"""Runs published models' shapes with random weights on this machine's card, and holds the plan to what is seen.

A checkpoint with the names and shapes of the published one is written (random weights: nothing is downloaded), profiles
are compiled with the rates that `devmap probe --measure` gives here, and `load_model` loads by the lock and verifies.
Of each case a receipt keeps bytes and times as predicted beside those seen. Where the card is limited, torch's
allocator is held to the profile's memory, so that what does not fit fails; plain transformers with `device_map="auto"`
and as much room for weights runs beside it, and logits are compared with those of the whole model on the card.

    python benchmarks/real_cards.py profiles/models/llama-3.1-8b --folder /dev/shm/cards
    devmap receipts --format markdown

The second prints the table of docs/real-cards.md. `--smallest` shrinks the model to a few MiB, which tries the script
itself, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from torch.profiler import ProfilerActivity, profile

from devmap_config import UnfitMachineError, load_model
from devmap_config.amounts import GIBIBYTE, MEBIBYTE
from devmap_config.cli import devmap
from devmap_config.runner.generation_times import GenerationWorkload, measure_generation
from devmap_config.runner.inputs import MadeUp
from devmap_config.runner.random_weights import Shard, shards_of, write_around
from devmap_config.runner.receipt_writing import write_receipt
from devmap_config.runner.receipts import FOLDER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONTEXT, LIMITED_CONTEXT, SMALLEST_CONTEXT = 2048, 512, 96
NEW_TOKENS, SLOW_NEW_TOKENS = 64, 6
LIMITED_SHARE = 0.4
"""Of the weights, what fits a limited card; a further `OVERHEAD_BYTES` are what a profile leaves to the driver."""

OVERHEAD_BYTES = 1280 * MEBIBYTE
IN_4_BITS = {"method": "bitsandbytes", "load_in_4bit": True, "llm_int8_enable_fp32_cpu_offload": True}
SMALLEST = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "vocab_size": 2048,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Case:
    """A placement, and the sequences that run at once. By `auto`, transformers places the model, and loads it.

    With a static cache, transformers compiles what decodes. Weights are copied from a CPU that does not compute.
    """

    name: str
    strategy: str
    batch_size: int = 1
    limited: bool = False
    quantized: bool = False
    cache: str = "dynamic"
    computes_on_cpu: bool = True


CASES = (
    Case("whole-1", "single"),
    Case("whole-8", "single", batch_size=8),
    Case("static-1", "single", cache="static"),
    Case("limited-1", "fastest", limited=True),
    Case("streamed-1", "fastest", limited=True, computes_on_cpu=False),
    Case("streamed-8", "fastest", batch_size=8, limited=True, computes_on_cpu=False),
    Case("auto-1", "auto", limited=True),
    Case("limited-8", "fastest", batch_size=8, limited=True),
    Case("4bit-1", "single", quantized=True),
    Case("4bit-limited-1", "sequential", limited=True, quantized=True),
)


def make_checkpoint(published: Path, folder: Path, *, smallest: bool) -> int:
    """Write a checkpoint in shards; return the bytes of its weights."""
    folder.mkdir(parents=True)
    config = json.loads((published / "config.json").read_text())
    config |= {key: value for key, value in SMALLEST.items() if smallest and key in config}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    shards = shards_of(built.to(torch.bfloat16))
    with ProcessPoolExecutor(8, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        list(pool.map(Shard.write, shards, repeat(folder), range(len(shards))))
    write_around(folder, config, shards)
    return sum(shard.size_bytes for shard in shards)


def probed(file: Path) -> Any:
    """Return the `hardware` of this machine, measured once and kept in a file."""
    if not file.exists():
        command = [sys.executable, "-c", "from devmap_config.cli import main; main()", "probe", "--measure", "-q"]
        file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return yaml.safe_load(file.read_text())["hardware"]


def profile_of(case: Case, hardware: Mapping[str, Any], card: str, memory_bytes: int, context: int) -> dict[str, Any]:
    """Return a case's profile; the disk is left out, which no case may use."""
    devices = {
        name: dict(what) if isinstance(what, dict) else {"accelerator": what}
        for name, what in hardware["devices"].items()
        if name != "disk"
    }
    if case.limited and card != "cpu":
        devices[card] |= {"memory": memory_bytes, "reserve": 0}
    if not case.computes_on_cpu:
        devices["cpu"] = {"memory": devices["cpu"]["memory"]}
    links = {name: rate for name, rate in hardware.get("links", {}).items() if name != "disk"}
    return {
        "version": 1,
        "model": {
            "source": "model",
            "dtype": "bfloat16",
            **({"quantization": IN_4_BITS} if case.quantized else {}),
        },
        "workload": {
            "context_length": context,
            "prompt_length": context - NEW_TOKENS,
            "batch_size": case.batch_size,
            "cache": case.cache,
        },
        "hardware": {"devices": devices, **({"links": links} if links else {})},
        "placement": {"strategy": "fastest" if case.strategy == "auto" else case.strategy},
    }


def locked_plan(file: Path) -> dict[str, Any]:
    """Compile a profile as the command does, and return the plan of its lock."""
    if exit_code := devmap(["compile", str(file)], standalone_mode=False):
        raise RuntimeError(f"{file.name}: exit {exit_code}")
    plan: dict[str, Any] = json.loads(file.with_suffix(".lock.json").read_text())["plan"]
    return plan


class Card:
    """The first CUDA card; the CPU where there is none, of which no memory is told."""

    def __init__(self) -> None:
        self.is_there = torch.cuda.is_available()
        self.device = "cuda:0" if self.is_there else "cpu"
        self.name = torch.cuda.get_device_name(0) if self.is_there else "cpu"
        self.driver_bytes = self._used_bytes() if self.is_there else 0

    @staticmethod
    def _used_bytes() -> int:
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        return total_bytes - free_bytes

    def wait(self) -> None:
        """Wait until the card has done what it was given."""
        if self.is_there:
            torch.cuda.synchronize()

    def empty(self) -> None:
        """Give back what nothing uses, and begin to note the most that is used anew."""
        gc.collect()
        if self.is_there:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def hold_to(self, memory_bytes: int | None) -> None:
        """Let torch take no more of the card than this with what the driver took; all of it for `None`."""
        if self.is_there:
            total_bytes = torch.cuda.mem_get_info(0)[1]
            share = 1.0 if memory_bytes is None else (memory_bytes - self.driver_bytes) / total_bytes
            torch.cuda.set_per_process_memory_fraction(share, 0)

    def peaks(self) -> dict[str, int]:
        """Return the bytes of tensors, now and at most, what torch took for them at most, and what is taken now."""
        if not self.is_there:
            return {}
        return {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
            "card_used_bytes": self._used_bytes(),
        }


class Running:
    """A loaded model on its card."""

    def __init__(self, model: Any, card: Card) -> None:
        self._model = model
        self._card = card

    def _tokens(self, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length)
        vocabulary_size = self._model.config.get_text_config().vocab_size
        return torch.randint(3, vocabulary_size, (1, length), generator=generator).to(self._card.device)

    def logits(self) -> torch.Tensor:
        """Return the logits of 32 tokens, on the CPU."""
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=self._tokens(32), use_cache=False).logits
        return logits.float().cpu()

    def profiled(self) -> dict[str, float]:
        """Return what torch's profiler counts of one decoded token: the difference of ten and two, by eight."""
        if not self._card.is_there:
            return {}
        counts = []
        for count in (2, 10):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                self._model.generate(
                    self._tokens(64), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
                )
                self._card.wait()
            events = list(seen.events())
            on_card = [each.device_time for each in events if "cuda" in str(each.device_type).lower()]
            counts.append(
                {
                    "device_events_per_token": len(on_card),
                    "device_seconds_per_token": sum(on_card) / 1e6,
                    "aten_operations_per_token": sum(each.name.startswith("aten::") for each in events),
                    "kernel_launches_per_token": sum("LaunchKernel" in each.name for each in events),
                }
            )
        return {name: (counts[1][name] - counts[0][name]) / 8 for name in counts[0]}


def median_seconds(card: Card, action: Callable[[], Any], rounds: int = 10) -> float:
    """Return how long the card takes for what an action gives it, the first time left out."""
    seen = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        card.wait()
        seen.append(time.perf_counter() - start)
    return statistics.median(seen[1:])


def rates(card: Card) -> dict[str, float]:
    """Return what the card and its link reach by themselves: copies, products with few and many tokens, launches."""
    if not card.is_there:
        return {}
    found: dict[str, float] = {}
    seconds = partial(median_seconds, card)
    size_bytes = 512 * MEBIBYTE
    pageable, on_card = torch.ones(size_bytes, dtype=torch.uint8), torch.ones(size_bytes, dtype=torch.uint8).cuda()
    start = time.perf_counter()
    pinned = pageable.pin_memory()
    found["pin_bytes_per_second"] = size_bytes / (time.perf_counter() - start)
    for kind, host in (("pageable", pageable), ("pinned", pinned)):
        found[f"{kind}_to_card_bytes_per_second"] = size_bytes / seconds(partial(on_card.copy_, host, True))
        found[f"card_to_{kind}_bytes_per_second"] = size_bytes / seconds(partial(host.copy_, on_card, True))
        for size_kib in (8, 64, 512, 4096, 32768):
            part = slice(0, size_kib * 1024)
            found[f"{kind}_{size_kib}KiB_seconds"] = seconds(partial(on_card[part].copy_, host[part], True), 30)
    copy = torch.empty_like(on_card)
    found["memory_copy_bytes_per_second"] = 2 * size_bytes / seconds(partial(copy.copy_, on_card))
    for rows, columns in ((4096, 4096), (14336, 4096), (128256, 4096), (768, 2048)):
        count = max(2, min(64, 2**28 // (rows * columns * 2)))  # more than the card's cache holds
        weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for tokens in (1, 8, 1984):
            inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            products = partial(multiply_all, inputs, weights)
            found[f"linear_{rows}x{columns}_of_{tokens}_seconds"] = seconds(products, 5) / count
    small = torch.ones(8, device="cuda")
    found["small_kernel_seconds"] = seconds(lambda: [small.add_(1) for _ in range(2000)], 5) / 2000
    weights = [torch.ones(4096, 4096, dtype=torch.bfloat16) for _ in range(16)]
    products = partial(multiply_all, torch.ones(1, 4096, dtype=torch.bfloat16), weights)
    found["cpu_linear_4096x4096_of_1_seconds"] = seconds(products, 5) / len(weights)
    found["cpu_threads"] = torch.get_num_threads()
    return found


def multiply_all(inputs: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Multiply by each of the weights."""
    for weight in weights:
        torch.nn.functional.linear(inputs, weight)


class Bench:
    """One model's checkpoint and machine, on which cases are run; the whole model is kept from one to the next."""

    def __init__(self, work: Path, card: Card, hardware: Mapping[str, Any], weights_bytes: int, context: int) -> None:
        self._work = work
        self._card = card
        self._hardware = hardware
        self._weights_bytes = weights_bytes
        self._context = context
        self._model: Any = None
        self._reference: torch.Tensor | None = None

    def run(self, case: Case) -> dict[str, Any]:
        """Load, verify, generate; return what was said beside what was seen."""
        card = self._card
        limit_bytes = int(LIMITED_SHARE * self._weights_bytes) + OVERHEAD_BYTES
        limit_bytes //= 2 if case.quantized else 1
        context = min(self._context, LIMITED_CONTEXT) if case.limited else self._context
        file = self._work / f"{case.name}.yaml"
        text = yaml.safe_dump(profile_of(case, self._hardware, card.device, limit_bytes, context), sort_keys=False)
        file.write_text(text)
        start = time.perf_counter()
        plan = locked_plan(file)
        compile_seconds = time.perf_counter() - start
        use = next(each for each in plan["devices"] if each["id"] == card.device)
        if case.limited or case.quantized:
            self._model = None
        card.empty()
        card.hold_to(limit_bytes if case.limited else None)
        start = time.perf_counter()
        model = self._model or self._loaded(case, file, use["weights_bytes"])
        card.wait()
        load_seconds = time.perf_counter() - start
        loading = card.peaks()
        self._model = None if case.limited or case.quantized else model
        card.empty()
        workload = GenerationWorkload(
            prompts=MadeUp(batch_size=case.batch_size, length=context - NEW_TOKENS),
            new_tokens=SLOW_NEW_TOKENS if case.limited else NEW_TOKENS,
            cache=case.cache,
        )
        generation = measure_generation(model, workload, rounds=1 if case.limited else 3).to_json()
        seen = {f"loading_{name}": size_bytes for name, size_bytes in loading.items()} | card.peaks()
        running = Running(model, card)
        logits = running.logits()
        self._reference = logits if self._reference is None else self._reference
        return {
            "case": case.name,
            "by": "transformers, device_map=auto" if case.strategy == "auto" else "devmap_config.load_model",
            "batch_size": case.batch_size,
            "context_length": context,
            "limit_bytes": limit_bytes if case.limited else None,
            "compile_seconds": compile_seconds,
            "load_seconds": load_seconds,
            "predicted": {
                "devices": [use],
                "loading_ram_bytes": plan["loading_ram_bytes"],
                "prediction": plan["prediction"],
            },
            "compute": plan["compute"],
            "seen": {card.device: seen},
            "generation": generation,
            "logits_difference": float((logits - self._reference).norm() / self._reference.norm()),
            "profiled": running.profiled() if case.name == "whole-1" else {},
        }

    def _loaded(self, case: Case, file: Path, weights_bytes: int) -> Any:
        if case.strategy != "auto":
            return self._loaded_verified(file)
        max_memory = {**({0: weights_bytes} if self._card.is_there else {}), "cpu": 1024 * GIBIBYTE}
        return transformers.AutoModelForCausalLM.from_pretrained(
            self._work / "model", device_map="auto", dtype="bfloat16", max_memory=max_memory
        )

    def _loaded_verified(self, file: Path) -> Any:
        try:
            return load_model(file)
        except UnfitMachineError as error:  # this process itself may hold some of it
            print(f"the machine is not asked: {error}", flush=True)
            return load_model(file, probe=False)


def run(given: argparse.Namespace) -> None:
    """Run the cases of a model, and write its receipt after each."""
    card, work = Card(), given.folder / given.model.name
    shutil.rmtree(work, ignore_errors=True)
    weights_bytes = make_checkpoint(given.model, work / "model", smallest=given.smallest)
    hardware = probed(given.folder / "hardware.yaml")
    receipt: dict[str, Any] = {
        "command": f"python benchmarks/real_cards.py {given.model} --folder {given.folder}",
        "model": given.model.name,
        "weights": "random",
        "weights_bytes": weights_bytes,
        "devices": {card.device: card.name},
        "driver_bytes": card.driver_bytes,
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "hardware": hardware,
        "rates": rates(card),
        "cases": [],
    }
    card.empty()
    bench = Bench(work, card, hardware, weights_bytes, SMALLEST_CONTEXT if given.smallest else CONTEXT)
    for case in (each for each in CASES if given.cases is None or each.name in given.cases.split(",")):
        try:
            receipt["cases"].append(bench.run(case))
        except Exception as error:  # whatever fails on this machine; the next case may not
            traceback.print_exc()
            receipt["cases"].append({"case": case.name, "failed": f"{type(error).__name__}: {error}"})
        given.output.mkdir(parents=True, exist_ok=True)
        write_receipt(given.output / f"{given.model.name}.json", receipt)
    shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Run a model's cases."""
    parser = argparse.ArgumentParser(description="Holds plans to what is seen on this machine's card.")
    parser.add_argument("model", type=Path, help="a folder with a published config.json")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written: a RAM disk is quick")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--cases", help=f"some of {','.join(each.name for each in CASES)}")
    parser.add_argument("--smallest", action="store_true")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
