"""Prints, for this machine, what a plan predicts of a token and a prefill beside what they take.

A dense model in bfloat16 and float32, and a mixture of experts, with random weights, on the CPU. In every round the
machine is probed, the profile is compiled with what was found, and the plan is run, one after the other: what changes
on the machine changes both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

MODELS = Path(__file__).parent / "plans" / "models"
WORKLOADS = {"64 tokens": (64, 96), "448 tokens": (448, 512)}
"""By what it is called, the prompt and the context."""

CASES = {"dense-0.25b": "auto", "dense-0.25b, float32": "float32", "mixture-0.5b": "auto"}
"""By the model and what else is told of it, its dtype."""


def devmap(*arguments: str, folder: Path) -> str:
    """Return what the command prints.

    Raises:
        SystemExit: where it fails, with what it said.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [Path(sys.executable).with_name("devmap"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"devmap {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def measured_hardware(folder: Path, tries: int = 3) -> Any:
    """Return this machine as a profile has it, without its disk; tried again where other work disturbed the probe."""
    try:
        hardware = yaml.safe_load(devmap("probe", "--measure", folder=folder))["hardware"]
    except SystemExit as error:
        if "too-noisy" not in str(error) or tries == 1:
            raise
        print(f"measured again: {error}", file=sys.stderr, flush=True)
        return measured_hardware(folder, tries - 1)
    del hardware["devices"]["disk"]
    return hardware


def ratios(folder: Path, case: str, lengths: tuple[int, int], hardware: Any) -> dict[str, float]:
    """Return, by phase, what is predicted over what is measured."""
    prompt_length, context_length = lengths
    profile = {
        "version": 1,
        "model": {"source": f"models/{case.partition(',')[0]}", "dtype": CASES[case]},
        "workload": {"prompt_length": prompt_length, "context_length": context_length},
        "hardware": hardware,
        "placement": {"strategy": "fastest"},
    }
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    devmap("compile", "profile.yaml", "-q", folder=folder)
    devmap("run", "profile.yaml", "--random-weights", "--receipt", "receipt.json", "-q", folder=folder)
    (case,) = json.loads((folder / "receipt.json").read_text())["cases"]
    prediction, generation = case["predicted"]["prediction"], case["generation"]
    return {
        "decode": prediction["decode_nanoseconds_per_token"] / 1e9 / generation["decode_seconds_per_token"],
        "prefill": prediction["prefill_nanoseconds"] / 1e9 / generation["prefill_seconds"],
    }


def main() -> None:
    """Probe and run in turn, and print the medians with the least and the most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[tuple[str, str, str], list[float]] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(MODELS, folder / "models")
        for _ in range(rounds):
            hardware = measured_hardware(folder)
            for case in CASES:
                for words, lengths in WORKLOADS.items():
                    for phase, ratio in ratios(folder, case, lengths, hardware).items():
                        found.setdefault((case, words, phase), []).append(ratio)
    table = Table("model", "prompt", "phase", "predicted ÷ measured", "least to most", box=box.MARKDOWN)
    for (case, words, phase), each in found.items():
        table.add_row(case, words, phase, f"{statistics.median(each):.2f}", f"{min(each):.2f} to {max(each):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
