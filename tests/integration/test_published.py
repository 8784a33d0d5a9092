"""Plans of published models that once failed: their positions, budgets with room for the workload, whole names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from devmap_config.cli import devmap
from devmap_config.compiler import Compiled, Request, run_pipeline

CARDS = """\
version: 1
model: {source: models/llama-3.1-70b/config.json}
workload: {context_length: 2048}
hardware: {devices: {cuda:0: FIRST, cuda:1: rtx-4090, cpu: {memory: 128GiB}}}
placement: {strategy: sequentialCAPS}
"""

IMAGES = """\
version: 1
model: {source: models/gemma-3-27b-it/config.json}
workload: {context_length: 8192}
hardware: {devices: {cuda:0: rtx-4090, cuda:1: rtx-4090, cuda:2: rtx-3090}}
placement: {strategy: sequential, pins: [{match: "**.vision_tower", device: cuda:1}]}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    shutil.copytree(REPOSITORY / "profiles" / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)


def compiled(text):
    Path("p.yaml").write_text(text)
    return run_pipeline(Request(path=Path("p.yaml")))


def test_an_encoder_is_limited_to_its_512_positions(models):
    text = (
        "version: 1\n"
        "model: {source: models/all-minilm-l6-v2/config.json}\n"
        "hardware: {devices: {cpu: {memory: 20GiB}}}\n"
    )
    found = compiled(f"{text}workload: {{context_length: 2000, batch_size: 32}}\n").diagnostics
    assert [(each.code, each.severity) for each in found] == [("context-too-long", "error")]
    assert "end at 512 tokens" in found[0].message
    assert compiled(f"{text}workload: {{context_length: 256}}\n").plan.prediction.longest_context == 512


@pytest.mark.parametrize(
    ("first", "caps"),
    [
        ("rtx-4090", ""),
        ("{accelerator: rtx-4090, reserve: 2GiB}", ""),
        ("rtx-4090", ", max_memory: {0: 20GiB, 1: 20GiB}"),
    ],
)
def test_sequential_leaves_room_for_the_workload(first, caps, models):
    found = compiled(CARDS.replace("FIRST", first).replace("CAPS", caps))
    assert isinstance(found, Compiled), found.diagnostics
    plan = found.plan
    assert min(use.free_bytes for use in plan.devices) >= 0
    assert list(plan.max_memory) == [0, 1, "cpu"]
    assert plan.max_memory[0] < plan.devices[0].capacity_bytes


@pytest.mark.parametrize("width", [60, 80])
def test_names_are_printed_whole(width, models, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    Path("p.yaml").write_text(IMAGES)
    shown = (
        CliRunner().invoke(devmap, ["compile", "p.yaml", "--dry-run", "--no-simulate"], standalone_mode=False).stdout
    )
    for name in ("model.multi_modal_projector", "model.vision_tower.encoder.layers.[0-26]"):
        assert name in shown.split(), shown
