"""The predicted memory of loading beyond the weights: the copies that are made, and what is alive with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LLAMA, MIXTURE

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.locked import compile_locked
from devmap_config.plan.lock import read_lock

CARD = "cuda:0: {memory: 1GiB}"
CPU = "cpu: {memory: 1GiB}"
DISK = "disk: {memory: 1GiB}"

EXPERTS_BYTES = 8 * 64 * 64 * 2
"""`gate_up_proj` of a layer of the mixture, in bfloat16, the largest of what is merged."""
DOWN_BYTES = EXPERTS_BYTES // 2
WORDS_BYTES = 256 * 64 * 2
"""The embedding, or the head, in bfloat16: the largest that is not merged."""


@pytest.fixture(autouse=True)
def in_workspace(workspace):
    return workspace


def compiled(source, devices, placement="strategy: sequential", model=""):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {source}{model}}}\nhardware: {{devices: {{{devices}}}}}\n"
        f"placement: {{{placement}}}\n"
    )
    return run_pipeline(Request(path=Path("profile.yaml")))


def extras(*arguments, **options):
    plan = compiled(*arguments, **options).plan
    found = {str(use.id): use.loading_bytes - use.weights_bytes for use in plan.devices}
    return found | ({} if "cpu" in found else {"ram": plan.loading_ram_bytes})


def test_weights_loaded_as_stored_need_no_more_memory():
    assert extras("llama", f"{CARD}, {CPU}") == {"cuda:0": 0, "cpu": 0}
    assert extras("llama", CPU) == {"cpu": 0}


def test_casts_for_a_card_are_made_on_the_cpu_by_threads():
    four_largest = 2 * (2 * WORDS_BYTES + 2 * 128 * 64 * 2)
    assert extras("llama", CARD, model=", dtype: float32") == {"cuda:0": 0, "ram": four_largest}


def test_torchao_makes_three_copies_in_float32_of_a_weight_that_it_quantises():
    elements = 64 * 128
    size = elements + 4 * 64
    model = ", quantization: {method: torchao, quant_type: Float8WeightOnlyConfig}"
    assert extras("llama", CARD, model=model)["cuda:0"] == elements * 15 - size
    assert extras("llama", CPU, model=model) == {"cpu": elements * 13 - size}  # its dense values are the file's pages


def test_a_cast_on_the_cpu_needs_no_copy():
    assert extras("llama", CPU, model=", dtype: float32") == {"cpu": 0}


def test_a_cast_for_the_disk_lives_while_the_next_is_made():
    on_disk = "strategy: single, device: disk, offload: {folder: ./offload}"
    found = extras("llama", f"{CPU}, {DISK}", on_disk, model=", dtype: float32")
    assert found["cpu"] == 2 * 2 * WORDS_BYTES


def test_parts_of_experts_live_with_the_merged_tensor():
    assert extras("mixture", CARD) == {"cuda:0": EXPERTS_BYTES, "ram": 0}
    assert extras("mixture", CPU) == {"cpu": EXPERTS_BYTES}


def test_parts_and_merged_experts_for_the_disk_are_both_counted():
    on_disk = "strategy: single, device: disk, offload: {folder: ./offload}"
    assert extras("mixture", f"{CPU}, {DISK}", on_disk)["cpu"] == 2 * EXPERTS_BYTES + EXPERTS_BYTES


def test_quantised_weights_are_dense_before():
    found = extras("llama", CARD, model=", quantization: {method: bitsandbytes, load_in_4bit: true}")
    assert found["cuda:0"] == 128 * 64 * 2


def test_a_device_without_room_for_loading_is_refused():
    held = compiled("mixture", CARD).plan.devices[0].weights_bytes
    compilation = compiled("mixture", f"cuda:0: {{memory: {held + EXPERTS_BYTES - 1}B}}", "strategy: single")
    (error,) = [each for each in compilation.diagnostics if each.severity == "error"]
    assert error.code == "over-capacity"
    assert "at once while the model is loaded" in error.message
    assert "1 bytes are missing" in error.message
    assert "merging the weights of its experts" in error.message
    assert isinstance(compiled("mixture", f"cuda:0: {{memory: {held + EXPERTS_BYTES}}}", "strategy: single"), Compiled)


def test_a_strategy_without_room_for_loading_reports_loading():
    held = compiled("mixture", CARD).plan.devices[0].weights_bytes
    (error,) = compiled("mixture", f"cuda:0: {{memory: {held + EXPERTS_BYTES - 1}B}}").diagnostics
    assert "at once while the model is loaded" in error.message


def test_a_strategy_leaves_the_room_that_loading_needs():
    held = compiled("mixture", CARD).plan.devices[0].weights_bytes
    plan = compiled("mixture", f"cuda:0: {{memory: {held}}}, {CPU}").plan
    assert all(use.loading_bytes <= use.capacity_bytes for use in plan.devices)


@pytest.mark.parametrize("source", ["llama", "mixture"])
def test_a_lock_without_loading_bytes_is_valid(source):
    from devmap_config.cli.compile import compile_command

    compiled(source, CARD)
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    lock = read_lock(Path("profile.lock.json").read_text())
    assert lock.plan["loading_ram_bytes"] == 0
    early = json.loads(json.dumps(lock.plan))
    del early["loading_ram_bytes"]
    for use in early["devices"]:
        del use["loading_bytes"]
    _, drift = compile_locked(Path("profile.yaml"), type(lock)(**{**vars(lock), "plan": early}))
    assert drift is None


def test_the_models_of_these_tests_have_the_stated_sizes():
    assert (MIXTURE["num_experts"], MIXTURE["moe_intermediate_size"], MIXTURE["hidden_size"]) == (8, 32, 64)
    assert (LLAMA["vocab_size"], LLAMA["intermediate_size"]) == (256, 128)
