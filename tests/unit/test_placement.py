"""Pins, groups and limits hold under every strategy; `single` and `manual` place as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES

DEVICES = "{cuda:0: {memory: 400KiB}, cuda:1: {memory: 400KiB}, cpu: {memory: 2MiB}}"


def compile_text(text, model="llama", devices=DEVICES):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {model}}}\nhardware: {{devices: {devices}}}\nplacement:\n{text}"
    )
    return run_pipeline(Request(path=Path("profile.yaml")))


def homes(compilation):
    assert isinstance(compilation, Compiled), compilation.diagnostics
    return {name: str(each.location.stored_on) for each in compilation.plan.assignments for name in each.tensors}


@pytest.mark.parametrize("strategy", [*TRANSFORMERS_STRATEGIES, "single"])
@pytest.mark.parametrize(
    ("match", "tensor"),
    [
        ("lm_head", "lm_head.weight"),
        ("model.layers.[2-3]", "model.layers.3.mlp.up_proj.weight"),
        ("model.layers.4.mlp", "model.layers.4.mlp.down_proj.weight"),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_pins_hold_under_every_strategy(workspace, strategy, match, tensor):
    devices = DEVICES.replace("400KiB", "800KiB")
    compilation = compile_text(
        f'  strategy: {strategy}\n  pins: [{{match: "{match}", device: cuda:1}}]\n', devices=devices
    )
    assert homes(compilation)[tensor] == "cuda:1"


@pytest.mark.parametrize("strategy", TRANSFORMERS_STRATEGIES)
def test_not_on_keeps_modules_off_a_device(workspace, strategy):
    roomy = compile_text(
        f'  strategy: {strategy}\n  pins: [{{match: "model.layers.*", not_on: [0, cpu]}}]\n',
        devices=DEVICES.replace("400KiB", "2MiB"),
    )
    assert {device for name, device in homes(roomy).items() if name.startswith("model.layers.")} == {"cuda:1"}


@pytest.mark.parametrize("strategy", TRANSFORMERS_STRATEGIES)
def test_keep_together_puts_modules_on_one_device(workspace, strategy):
    compilation = compile_text(
        f'  strategy: {strategy}\n  pins: [{{match: "model.layers.[0,5]", keep_together: true}}]\n'
    )
    placed = homes(compilation)
    assert placed["model.layers.0.mlp.up_proj.weight"] == placed["model.layers.5.mlp.up_proj.weight"]


@pytest.mark.parametrize("strategy", TRANSFORMERS_STRATEGIES)
def test_tied_tensors_move_together(workspace, strategy):
    placed = homes(
        compile_text(f"  strategy: {strategy}\n  pins: [{{match: lm_head, device: cuda:1}}]\n", model="tied")
    )
    assert placed["lm_head.weight"] == placed["model.embed_tokens.weight"] == "cuda:1"


@pytest.mark.parametrize("strategy", TRANSFORMERS_STRATEGIES)
def test_blocks_stay_whole(workspace, strategy):
    placed = homes(compile_text(f"  strategy: {strategy}\n"))
    for layer in range(6):
        devices = {device for name, device in placed.items() if name.startswith(f"model.layers.{layer}.")}
        assert len(devices) == 1


@pytest.mark.parametrize("strategy", TRANSFORMERS_STRATEGIES)
def test_nothing_is_placed_on_unlisted_devices(workspace, strategy):
    compilation = compile_text(f"  strategy: {strategy}\n", devices="{cuda:0: {memory: 300KiB}}")
    [finding] = compilation.diagnostics
    assert finding.code == "over-capacity"
    assert finding.message == (
        "the model's 497.7 KiB find no place on cuda:0 (300.0 KiB): 197.7 KiB (202,432 bytes) are missing"
    )


def test_max_memory_takes_integer_keys_cpu_and_disk(workspace):
    compilation = compile_text(
        "  strategy: sequential\n  max_memory: {0: 300KiB, cpu: 200KiB, disk: 1MiB}\n  offload: {folder: offload}\n",
        devices="{cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}, disk: {memory: 1GiB}}",
    )
    assert {str(use.id): use.capacity_bytes for use in compilation.plan.devices} == {
        "cuda:0": 300 * 1024,
        "cpu": 200 * 1024,
        "disk": 1024 * 1024,
    }
    assert set(homes(compilation).values()) == {"cuda:0", "cpu", "disk"}


@pytest.mark.parametrize(
    ("devices", "key"),
    [
        ("{cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}}", 0),
        ("{cpu: {memory: 1GiB}, xpu:1: {memory: 1GiB}}", 1),
        ("{npu:0: {memory: 1GiB}, cpu: {memory: 1GiB}}", 0),
        ("{mps: {memory: 1GiB}, cpu: {memory: 1GiB}}", "mps"),
        ("{cpu: {memory: 1GiB}}", "cpu"),
    ],
)
def test_single_uses_the_first_accelerator_or_the_cpu(workspace, devices, key):
    assert compile_text("  strategy: single\n", devices=devices).plan.device_map == {"": key}


def test_pins_beyond_a_devices_capacity_are_named(workspace):
    compilation = compile_text('  pins: [{match: "model.layers.*", device: cuda:1}]\n')
    [finding] = compilation.diagnostics
    assert finding.message.startswith("the pins put 433.5 KiB on cuda:1, which has 400.0 KiB: 33.5 KiB (34,304 bytes)")
    assert finding.span.line == 5


def test_a_strategy_that_fits_is_proposed(workspace):
    devices = "{cuda:0: {memory: 600KiB}, cuda:1: {memory: 60KiB}}"
    [finding] = compile_text("  strategy: auto\n", devices=devices).diagnostics
    assert "`strategy: sequential` places all of it" in finding.help
    assert isinstance(compile_text("  strategy: sequential\n", devices=devices), Compiled)


def test_the_order_of_keys_in_a_profile_changes_nothing(workspace):
    plans = set()
    for devices in (DEVICES, "{cpu: {memory: 2MiB}, cuda:1: {memory: 400KiB}, cuda:0: {memory: 400KiB}}"):
        compilation = compile_text("  strategy: auto\n", devices=devices)
        plans.add(json.dumps(compilation.plan.to_json()))
        assert compilation.inputs is not None
        plans.add(str(compilation.inputs.hardware))
    assert len(plans) == 2


def test_the_missing_bytes_are_exactly_what_must_be_added(workspace):
    [finding] = compile_text("  strategy: auto\n", devices="{cpu: {memory: 420KiB}}").diagnostics
    missing = int(finding.message.split("(")[-1].split(" bytes")[0].replace(",", ""))
    for more, fits in ((missing, True), (missing - 1, False)):
        found = compile_text("  strategy: auto\n", devices=f"{{cpu: {{memory: {420 * 1024 + more}}}}}")
        assert isinstance(found, Compiled) == fits


def test_offloading_buffers_is_proposed_if_it_helps(workspace):
    text = """\
version: 1
model: {source: quantized}
hardware: {devices: {cuda:0: {memory: 120KiB}, cpu: {memory: 1GiB}}}
placement: {strategy: auto, offload: {buffers: false}}
"""
    Path("profile.yaml").write_text(text)
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert finding.message.startswith("with `buffers: false` the buffers of what is streamed stay where it runs")
    *_, strategy = f"`strategy: auto`{finding.help}".split("`strategy: ")
    strategy = strategy.split("`")[0]
    Path("profile.yaml").write_text(text.replace("auto", strategy).replace("buffers: false", "buffers: true"))
    assert isinstance(run_pipeline(Request(path=Path("profile.yaml"))), Compiled)
