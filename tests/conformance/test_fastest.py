"""`fastest` gives valid plans near the bound for published models and the machines of `benchmarks/machines.yaml`."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass

import pytest
import yaml
from conftest import REPOSITORY

from devmap_config.compiler import Compiled, Rejected, Request, run_pipeline
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES
from devmap_config.plan.verify import verify

WIDEST_GAP = 0.01
"""So far, as a share, the decode time of a plan is above its bound at most."""

with (REPOSITORY / "benchmarks/published.csv").open(encoding="utf-8", newline="") as file:
    MODELS = {row["model"]: REPOSITORY / row["config"] for row in csv.DictReader(file)}

MACHINES = yaml.safe_load((REPOSITORY / "benchmarks/machines.yaml").read_text(encoding="utf-8"))

QUICK_MODELS = ("Llama-3.2-1B", "gpt-oss-20b", "Qwen3-30B-A3B", "Llama-3.1-70B")
QUICK_MACHINES = ("one 4090, CPU", "four l40s, idle CPU", "three unequal", "sixteen h200")

INFEASIBLE = {
    ("gemma-3-27b-it", "two 4090"),
    ("Qwen3-30B-A3B", "two 4090"),
    ("Mixtral-8x7B-v0.1", "two 4090"),
    ("Llama-3.1-70B", "two 4090"),
    ("DeepSeek-V3", "one 4090, CPU"),
    ("DeepSeek-V3", "one 3090, disk"),  # neither card of these two computes in fp8
    ("DeepSeek-V3", "four a100"),
    ("DeepSeek-V3", "two 4090"),
    ("DeepSeek-V3", "two h100"),
    ("DeepSeek-V3", "eight h100"),
    ("DeepSeek-V3", "slow card first, CPU"),
    ("DeepSeek-V3", "three unequal"),
}


@dataclass(frozen=True)
class Compiler:
    """Compiles one model for one machine by any strategy, all with the same budgets."""

    folder: object
    devices: object
    context_length: int = 4096

    def compile(self, strategy):
        profile = {
            "version": 1,
            "model": {"source": "config.json", "dtype": "bfloat16"},
            "workload": {"context_length": self.context_length},
            "hardware": {"devices": self.devices, "links": {"host": "25GB/s", "peer": "25GB/s"}},
            "placement": {"strategy": strategy, "offload": {"folder": "./offload"}},
        }
        path = self.folder / f"{strategy}.yaml"
        path.write_text(yaml.safe_dump(profile, sort_keys=False))
        return run_pipeline(Request(path=path))


@pytest.fixture
def compiler(tmp_path, model, machine):
    shutil.copy(MODELS[model] / "config.json", tmp_path)
    return Compiler(tmp_path, MACHINES[machine])


def check(compiler, model, machine):
    """Check what holds for every combination of model and machine."""
    compiled = compiler.compile("fastest")
    if (model, machine) in INFEASIBLE:
        assert isinstance(compiled, Rejected)
        for strategy in TRANSFORMERS_STRATEGIES:
            assert isinstance(compiler.compile(strategy), Rejected), f"{strategy} holds it"
        return
    assert isinstance(compiled, Compiled), [each.message for each in compiled.diagnostics]
    check_valid(compiled)
    decode = compiled.plan.prediction.decode_nanoseconds_per_token
    bound = compiled.plan.prediction.bound_decode_nanoseconds_per_token
    assert 0 < bound <= decode
    assert decode <= bound * (1 + WIDEST_GAP)
    for strategy in TRANSFORMERS_STRATEGIES:
        other = compiler.compile(strategy)
        if isinstance(other, Compiled):
            theirs = other.plan.prediction.decode_nanoseconds_per_token
            assert decode <= theirs, strategy


def check_valid(compiled):
    """Check that the plan verifies, and that blocks are split only if a part of them computes on the CPU."""
    for violation in verify(compiled.plan, compiled.model.graph, compiled.inventory.capacities):
        assert violation.kind == "split-block", violation.message
        [block] = violation.subjects
        elsewhere = {
            name: str(each.location.stored_on)
            for each in compiled.plan.assignments
            for name in each.tensors
            if name.startswith(f"{block}.") and str(each.location.stored_on) != str(each.location.runs_on)
        }
        assert not elsewhere, violation.message
        assert any(unit.startswith(f"{block}.") for unit in compiled.plan.compute), violation.message


@pytest.mark.parametrize("machine", QUICK_MACHINES)
@pytest.mark.parametrize("model", QUICK_MODELS)
def test_fastest_is_near_its_bound_and_not_slower_than_transformers(compiler, model, machine):
    check(compiler, model, machine)


@pytest.mark.zoo
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", MODELS)
def test_fastest_is_near_its_bound_and_not_slower_than_transformers_on_any_machine(compiler, model, machine):
    check(compiler, model, machine)


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("model", "machine"),
    [
        ("gemma-3-27b-it", "two 4090, CPU"),  # activations take an eighth of a card, if anything runs there
        ("gemma-3-27b-it", "one 4090, CPU, disk"),
        ("flan-t5-xxl", "sixteen h200"),  # cards that are alike, and what an encoder gives to every block
    ],
)
def test_plans_for_a_long_context_are_near_the_bound(tmp_path, model, machine):
    shutil.copy(MODELS[model] / "config.json", tmp_path)
    compiled = Compiler(tmp_path, MACHINES[machine], context_length=16384).compile("fastest")
    check_valid(compiled)
    prediction = compiled.plan.prediction
    bound = prediction.bound_decode_nanoseconds_per_token
    assert bound <= prediction.decode_nanoseconds_per_token <= bound * 1.015


def test_enough_combinations_of_models_and_machines_are_tested():
    assert len(MODELS) * len(MACHINES) - len(INFEASIBLE) >= 60
