"""Reported memory is measured: by torch for accelerators, by the process for the CPU; otherwise nothing is reported."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from devmap_config import compile_profile
from devmap_config.runner.usage import memory_use

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 32}
hardware: {devices: {"cuda:[0-1]": {memory: 300KiB}, cpu: {memory: 400KiB}, disk: {memory: 1GiB}}}
placement: {strategy: sequential, offload: {folder: offload}}
"""


@pytest.fixture
def plan(workspace):
    Path("profile.yaml").write_text(PROFILE)
    return compile_profile("profile.yaml")


def test_each_devices_peak_is_reported_beside_the_planned_maximum(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 1_000 + index)
    used = {str(use.device): use for use in memory_use(plan)}
    assert [used["cuda:0"].peak_bytes, used["cuda:1"].peak_bytes] == [1_000, 1_001]
    assert "disk" not in used
    for use in plan.devices:
        if str(use.id) in used:
            held_bytes = use.weights_bytes + use.kv_cache_bytes + use.activation_bytes + use.overhead_bytes
            assert used[str(use.id)].planned_bytes == max(held_bytes, use.loading_bytes) > 0


def test_memory_that_cannot_be_measured_is_left_out(plan, monkeypatch):
    monkeypatch.delattr(torch.cuda, "max_memory_allocated")
    [cpu] = memory_use(plan)
    assert (str(cpu.device), cpu.peak_bytes >= psutil.Process().memory_info().rss // 2) == ("cpu", True)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory_use(plan) == ()
