"""Compares the time of `devmap check` with that of a script that asks transformers' planner for the same map.

Each is a process of its own, from start to exit, with files in the system's cache and bytecode compiled. The script
imports transformers, builds the model on the meta device from its config and calls the planner behind
`device_map="auto"`; that it gives the locked map, tensor by tensor, is checked first. `check` runs in a folder of its
own with the graph that `devmap compile --vendor` kept: it builds no model, which is why it is quick. A profile by
`fastest`, with a workload, stands beside it: its graph holds the measurements as well.

With `--compile`, `devmap compile` with nothing cached, its dry run included, beside the script, for every published
model on eight equal cards.

Two times are printed of each: that on the clock, and that of the processor (user and system, of all threads), which
other processes on the machine lengthen less. Ratios are of the processor's.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

REPOSITORY = Path(__file__).parent.parent
PROFILES = REPOSITORY / "profiles"
MODEL = Path("models/llama-3.1-70b")
COMPARED = "llama-3.1-70b-auto"
OPTIMISED = "llama-3.1-70b-fastest"

PLANNER = """
import json, logging, sys
logging.disable(logging.WARNING)
import torch
import transformers
from transformers.integrations.accelerate import _get_device_map, expand_device_map

budgets = {int(key) if key.isdigit() else key: value for key, value in json.loads(sys.argv[2]).items()}
with torch.device("meta"):
    config = transformers.AutoConfig.from_pretrained(sys.argv[1])
    model = getattr(transformers, config.architectures[0])._from_config(config)
device_map = _get_device_map(model, "auto", budgets, None)
if len(sys.argv) > 3:
    names = list(model.state_dict())
    locked = json.load(open(sys.argv[3]))["plan"]["device_map"]
    sys.exit(expand_device_map(device_map, names) != expand_device_map(locked, names))
"""

CARDS = 8
CARD_BYTES = 200 << 30
PROFILE = f"""
version: 1
model: {{source: model}}
workload: {{context_length: 2048}}
hardware: {{devices: {{"cuda:[0-{CARDS - 1}]": {{memory: {CARD_BYTES}}}}}}}
placement: {{strategy: auto}}
"""

COMPILE = "from devmap_config.cli import compile_main; compile_main()"
CHECK = "import sys; from devmap_config.cli import main; sys.argv = ['devmap', 'check', *sys.argv[1:]]; main()"


class Times(NamedTuple):
    """Seconds of a command: elapsed, and of the processor."""

    clock: float
    processor: float


def main() -> None:
    """Measure, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="how often each is run")
    parser.add_argument("--compile", action="store_true", help="time compiling, of every published model")
    arguments = parser.parse_args()
    runs = arguments.runs
    if arguments.compile:
        compare_compiling(runs)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        lock = folder / f"{COMPARED}.lock.json"
        planner = ["-c", PLANNER, str(folder / MODEL), json.dumps(budgets_of(lock))]
        if run(folder, [*planner, str(lock)]).returncode != 0:
            sys.exit("transformers' planner does not give the locked map: there is nothing to compare")
        commands = {
            "transformers' planner": planner,
            f"devmap check {COMPARED}.yaml": ["-c", CHECK, f"{COMPARED}.yaml"],
            f"devmap check {OPTIMISED}.yaml": ["-c", CHECK, f"{OPTIMISED}.yaml"],
        }
        seconds = measure(folder, commands, runs)
    print_results(seconds, runs)


def prepare(folder: Path) -> None:
    """Compile both profiles in a folder of their own, each with its graph beside it."""
    shutil.copytree(PROFILES / MODEL, folder / MODEL)
    for profile in (COMPARED, OPTIMISED):
        shutil.copy(PROFILES / f"{profile}.yaml", folder)
        run(folder, ["-c", COMPILE, f"{profile}.yaml", "--vendor"]).check_returncode()


def compare_compiling(runs: int) -> None:
    """Print of each model what the script takes, what compiling takes, their ratio, and what is beyond 1.3 of it."""
    with (REPOSITORY / "benchmarks/published.csv").open(encoding="utf-8", newline="") as file:
        models = {row["model"]: REPOSITORY / row["config"] for row in csv.DictReader(file)}
    models["Llama-3.1-405B"] = PROFILES / "models/llama-3.1-405b"
    budgets = json.dumps({"cpu": 0} | {str(index): CARD_BYTES for index in range(CARDS)})
    print_versions(runs)
    for name, directory in models.items():
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            shutil.copytree(directory, folder / "model")
            (folder / "profile.yaml").write_text(PROFILE, encoding="utf-8")
            commands = {
                "script": ["-c", PLANNER, "model", budgets],
                "compile": ["-c", COMPILE, "profile.yaml", "--dry-run"],
            }
            script, compiling = measure(folder, commands, runs).values()
        ratio, beyond = compiling.processor / script.processor, compiling.processor - 1.3 * script.processor
        times = "".join(f"{part:>8.2f} s" for times in (script, compiling) for part in times)
        print(f"{name:<22}{times}{ratio:>7.2f} x   1.3 x script + {beyond:.2f} s", flush=True)


def budgets_of(lock: Path) -> dict[str, int]:
    """Every device's capacity as transformers' `max_memory` takes it; what is not listed has none."""
    devices = json.loads(lock.read_text(encoding="utf-8"))["plan"]["devices"]
    return {"cpu": 0} | {use["id"].removeprefix("cuda:"): use["capacity_bytes"] for use in devices}


def run(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run this Python; whatever is cached is cached in that folder, and the hub is not asked."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, check=False)


def measure(folder: Path, commands: dict[str, list[str]], runs: int) -> dict[str, Times]:
    """The median times of each command, of runs that take turns; one before them is not counted."""
    seconds: dict[str, list[Times]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, arguments in commands.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            clock, processor = time.perf_counter(), processor_seconds()
            run(folder, arguments).check_returncode()
            if turn:
                seconds[name].append(Times(time.perf_counter() - clock, processor_seconds() - processor))
    return {name: Times(*map(median, zip(*times, strict=True))) for name, times in seconds.items()}


def processor_seconds() -> float:
    """Return the processor's seconds of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def print_versions(runs: int) -> None:
    """Print what was measured, and with what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "accelerate"))
    print(f"median of {runs} runs each, Python {sys.version.split()[0]}, {versions}")


def print_results(seconds: dict[str, Times], runs: int) -> None:
    """Print a row for each command, with what part of the planner's time it takes."""
    print_versions(runs)
    reference = next(iter(seconds.values()))
    for name, value in seconds.items():
        ratio = reference.processor / value.processor
        print(f"{name:<42}{value.clock:>8.2f} s{value.processor:>8.2f} s   1/{ratio:.1f}")


if __name__ == "__main__":
    main()
