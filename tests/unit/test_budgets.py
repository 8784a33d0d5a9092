"""transformers' strategies with a workload make plans that leave it room, and print budgets that repeat them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config import compile_profile
from devmap_config.cli import devmap

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 256}
hardware: {devices: {cuda:0: {memory: 700KiB}, cuda:1: {memory: 700KiB}, cpu: {memory: CPU}}}
placement: {strategy: sequentialPINS}
"""


@pytest.fixture
def profile(workspace):
    def write(cpu="4MiB", pins=""):
        path = Path("p.yaml")
        path.write_text(PROFILE.replace("CPU", cpu).replace("PINS", pins and f", pins: [{pins}]"))
        return path

    return write


def run(*arguments):
    done = CliRunner().invoke(devmap, [*arguments, "--dry-run", "--no-simulate"], standalone_mode=False)
    assert done.exception is None, done.output
    return done.return_value, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_the_plan_has_room_for_the_workload(profile):
    plan = compile_profile(profile())
    assert all(use.free_bytes >= 0 for use in plan.devices)
    assert {use.id.kind for use in plan.devices if use.weights_bytes} == {"cuda", "cpu"}


def test_budgets_fall_below_what_the_devices_have_and_are_printed(profile):
    plan = compile_profile(profile())
    assert plan.max_memory["cpu"] == 4 * 2**20
    assert max(plan.max_memory[0], plan.max_memory[1]) < 700 * 2**10
    _, table, _ = run("compile", str(profile()))
    expected = f'plain transformers makes the same map of device_map="sequential", max_memory={plan.max_memory}'
    assert expected in table
    _, printed, _ = run("compile", str(profile()), "--format", "json")
    assert json.loads(printed)["max_memory"] == {str(key): size for key, size in plan.max_memory.items()}


def test_with_pins_only_the_map_makes_the_plan(profile):
    path = profile(pins="{match: lm_head, device: cuda:1}")
    assert compile_profile(path).max_memory is None
    _, table, _ = run("compile", str(path))
    assert "no `max_memory` makes plain transformers choose this plan: pass it the map" in table
    assert "makes the same map" not in table


def test_without_a_workload_no_budgets_are_printed(profile):
    path = profile()
    path.write_text(path.read_text().replace("workload: {context_length: 256}\n", ""))
    assert compile_profile(path).max_memory is None
    assert "max_memory" not in run("compile", str(path))[1]


def test_if_transformers_finds_no_plan_our_strategies_are_suggested(profile):
    code, _, message = run("compile", str(profile(cpu="10KiB", pins="{match: model.layers, device: cuda:0}")))
    assert code == 1
    assert "no plan of `sequential` was found in" in message
    assert "`strategy: fewest-devices` finds none either" in message
