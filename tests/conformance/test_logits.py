"""Checkpoints of every architecture, placed on CPU and disk, give the outputs of plain transformers or do not compile.

`logits.yaml` lists the types that are run and give the same outputs, and all others with the reason why they are not
among these.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
import zoo
from click.testing import CliRunner
from conftest import REPOSITORY
from packaging.version import Version

from devmap_config import load_model
from devmap_config.cli.compile import compile_command

GROUPS = yaml.safe_load((Path(__file__).parent / "logits.yaml").read_text())
"""Every model type of the transformers that is pinned, in one of five groups."""

CPU = "cpu: {memory: 8GiB}"
DISK = "disk: {memory: 8GiB}"
SPLIT = "cpu: {memory: %d}"

PLACEMENTS = {
    "cpu": (CPU, "strategy: sequential"),
    "cpu and disk": (f"{SPLIT}, {DISK}", "strategy: sequential, offload: {folder: ./offload}"),
    "disk": (f"{CPU}, {DISK}", "strategy: single, device: disk, offload: {folder: ./offload}"),
    "buffers": (f"{CPU}, {DISK}", "strategy: single, device: disk, offload: {folder: ./offload, buffers: true}"),
    "cpu, disk and buffers": (
        f"{SPLIT}, {DISK}",
        "strategy: sequential, offload: {folder: ./offload, buffers: true}",
    ),
}
"""Devices and placement by what they are called; the CPU that is to be too small has six tenths of the model."""

QUICK = (
    "bart",
    "bert",
    "deepseek_v3",
    "falcon_mamba",
    "gemma3",
    "gpt2",
    "jetmoe",
    "llama",
    "llama4_text",
    "llava",
    "qwen3_moe",
    "t5",
    "whisper",
)
"""A share of every kind: encoders, decoders, both, states, mixtures, images, sounds."""

QUICK_PLACEMENTS = ("cpu and disk", "disk", "cpu, disk and buffers")

REFUSALS = ("over-capacity", "stranded-tensor", "device-mismatch")
"""Codes of the reasons for which such a profile may be refused."""


def held_types():
    """Return the listed types that this version of transformers has."""
    return [each for each in zoo.model_types() if each in set(GROUPS["held"])]


def pinned_transformers():
    """Return the version of transformers that the repository is tested with."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return max(
        Version(line.partition("==")[2].partition(";")[0]) for line in lines if line.startswith("transformers==")
    )


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    logging.disable(logging.WARNING)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    logging.disable(logging.NOTSET)


@torch.no_grad()
def outputs_of(model, inputs):
    """Return every tensor of a model's output without its cache, or `None` if it cannot be run with these inputs."""
    torch.manual_seed(0)  # some draw numbers
    return tiny.tensors_of(model.eval()(**inputs))


def plain_outputs(model_class, inputs_for):
    """Return the plain model's outputs and its inputs; no outputs if it does not run, or differs between two runs."""
    plain = model_class.from_pretrained("random", dtype="float32")
    inputs = inputs_for(plain)
    try:
        first, second = outputs_of(plain, inputs), outputs_of(plain, inputs)
    except Exception:
        return inputs, None
    is_same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    return inputs, first if is_same and first else None


def outcome(devices, placement, inputs, expected):
    """Return the outcome of a placement: one word, or what went wrong."""
    shutil.rmtree("offload", ignore_errors=True)
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: random, dtype: float32}\n"
        f"hardware: {{devices: {{{devices}}}}}\nplacement: {{{placement}}}\n"
    )
    done = CliRunner().invoke(
        compile_command, ["profile.yaml", "--format", "json"], standalone_mode=False, catch_exceptions=False
    )
    if done.return_value:
        errors = [each for each in json.loads(done.stdout)["diagnostics"] if each["severity"] == "error"]
        return "refused" if all(each["code"] in REFUSALS for each in errors) else "; ".join(map(described, errors))
    model = load_model("profile.yaml")
    if expected is None:
        return "loaded"
    found = outputs_of(model, inputs)
    # Matrices that are read anew each time may lie otherwise in memory, and be summed in another order.
    is_close = [torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(expected, found, strict=True)]
    return "same" if all(is_close) else f"{is_close.count(False)} of {len(is_close)} outputs differ"


def described(error):
    return f"{error['code']}: {error['message']}"


def outcomes(model_type, placements=tuple(PLACEMENTS)):
    model_class = type(tiny.save(model_type, Path("random")))
    inputs, expected = plain_outputs(model_class, tiny.inputs_for)
    size_bytes = sum(path.stat().st_size for path in Path("random").glob("*.safetensors"))
    return {
        name: outcome(devices % int(0.6 * size_bytes) if "%" in devices else devices, placement, inputs, expected)
        for name, (devices, placement) in ((name, PLACEMENTS[name]) for name in placements)
    }


@pytest.mark.parametrize("model_type", QUICK)
def test_a_share_of_types_gives_the_outputs_of_plain_transformers(model_type):
    found = outcomes(model_type, QUICK_PLACEMENTS)
    assert set(found.values()) <= {"same", "refused"}, found
    assert found["disk"] == "same", found


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", [each for each in held_types() if each not in QUICK])
def test_a_listed_type_gives_the_outputs_of_plain_transformers_or_is_refused(model_type):
    found = outcomes(model_type)
    assert set(found.values()) <= {"same", "loaded", "refused"}, found
    assert found["cpu"] != "refused", found


@pytest.mark.zoo
@pytest.mark.parametrize("share", ["1/4", "2/4", "3/4", "4/4"])
def test_experts_on_the_cpu_give_the_outputs_of_plain_transformers(share):
    """On a simulated accelerator, which needs a process of its own."""
    tests = REPOSITORY / "tests" / "conformance" / "experts_on_the_cpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--share", share, str(tests)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_type_is_in_exactly_one_group_of_the_list():
    """In a newer transformers, types that are new to it are in none."""
    counts = Counter(each for group in GROUPS.values() for each in group)
    assert [each for each, count in counts.items() if count > 1] == []
    is_newer = Version(transformers.__version__) > pinned_transformers()
    assert [each for each in zoo.model_types() if each not in counts and not is_newer] == []


def test_the_share_that_is_run_is_listed():
    assert set(QUICK) <= set(GROUPS["held"])
    assert len(GROUPS["held"]) > 200
