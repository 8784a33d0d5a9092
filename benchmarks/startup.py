"""Compares the time of `devmap check` with that of a script that asks transformers' planner for the same map.

Each is a process of its own, from start to exit, with files in the system's cache and bytecode compiled. The script
imports transformers, builds the model on the meta device from its config and calls the planner behind
`device_map="auto"`; that it gives the locked map, tensor by tensor, is checked first. `check` runs in a folder of its
own with the graph that `devmap compile --vendor` kept: it builds no model, which is why it is quick. A profile by
`fastest`, with a workload, stands beside it: its graph holds the measurements as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROFILES = Path(__file__).parent.parent / "profiles"
MODEL = Path("models/llama-3.1-70b")
COMPARED = "llama-3.1-70b-auto"
OPTIMISED = "llama-3.1-70b-fastest"

PLANNER = """
import json, logging, sys
logging.disable(logging.WARNING)
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.accelerate import _get_device_map, expand_device_map

budgets = {int(key) if key.isdigit() else key: value for key, value in json.loads(sys.argv[2]).items()}
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
device_map = _get_device_map(model, "auto", budgets, None)
if len(sys.argv) > 3:
    names = list(model.state_dict())
    locked = json.load(open(sys.argv[3]))["plan"]["device_map"]
    sys.exit(expand_device_map(device_map, names) != expand_device_map(locked, names))
"""

CHECK = "import sys; from devmap_config.cli import main; sys.argv = ['devmap', 'check', *sys.argv[1:]]; main()"


def main() -> None:
    """Measure, and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="how often each is run")
    runs = parser.parse_args().runs
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
        compiling = "from devmap_config.cli import compile_main; compile_main()"
        run(folder, ["-c", compiling, f"{profile}.yaml", "--vendor"]).check_returncode()


def budgets_of(lock: Path) -> dict[str, int]:
    """Every device's capacity as transformers' `max_memory` takes it; what is not listed has none."""
    devices = json.loads(lock.read_text(encoding="utf-8"))["plan"]["devices"]
    return {"cpu": 0} | {use["id"].removeprefix("cuda:"): use["capacity_bytes"] for use in devices}


def run(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run this Python; whatever is cached is cached in that folder, and the hub is not asked."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, check=False)


def measure(folder: Path, commands: dict[str, list[str]], runs: int) -> dict[str, float]:
    """The median time of each command in seconds, of runs that take turns; one before them is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, arguments in commands.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            start = time.perf_counter()
            run(folder, arguments).check_returncode()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def print_results(seconds: dict[str, float], runs: int) -> None:
    """Print a row for each command, with what part of the planner's time it takes."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "accelerate"))
    print(f"Llama-3.1-70B, median of {runs} runs each, Python {sys.version.split()[0]}, {versions}")
    reference = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"{name:<42}{value:>8.2f} s   1/{reference / value:.1f}")


if __name__ == "__main__":
    main()
