"""The difference of two plans folds moved modules into runs, and compares parts of blocks that one plan splits."""

from __future__ import annotations

import time

from devmap_config.devices import Device
from devmap_config.plan.diff import Home, Move, difference

NOTHING = {
    "decode_nanoseconds_per_token": None,
    "bound_decode_nanoseconds_per_token": None,
    "prefill_nanoseconds": None,
    "streamed_bytes_per_token": 0,
    "hops": 0,
    "longest_context": None,
}


def home(device, **computing):
    return Home(Device.from_text(device), **computing)


def use(device, weights_bytes=0):
    return {
        "id": device,
        "capacity_bytes": 100,
        "weights_bytes": weights_bytes,
        "kv_cache_bytes": 0,
        "activation_bytes": 0,
        "overhead_bytes": 0,
        "free_bytes": 100 - weights_bytes,
    }


def plan(device_map, compute=None, devices=("cuda:0", "cuda:1", "cpu"), **changed):
    return {
        "strategy": "auto",
        "executor": "accelerate",
        "main_device": "cuda:0",
        "measured": False,
        "device_map": device_map,
        "compute": compute or {},
        "devices": [use(device) for device in devices],
        "prediction": NOTHING,
        **changed,
    }


def layers(devices):
    return {f"model.layers.{index}": device for index, device in enumerate(devices)} | {"lm_head": 1}


def test_a_plan_does_not_differ_from_itself():
    found = difference(plan(layers([0, 1])), plan(layers([0, 1])))
    assert found.is_none
    assert found.to_json()["equal"] is True


def test_moved_layers_are_folded_into_runs():
    found = difference(plan(layers([0] * 12 + [1] * 4)), plan(layers([0] * 8 + [1] * 5 + ["cpu"] * 3)))
    assert found.moves == (
        Move(("model.layers.[8-11]",), home("cuda:0"), home("cuda:1")),
        Move(("model.layers.[13-15]",), home("cuda:1"), home("cpu")),
    )
    assert not found.is_none


def test_a_block_that_one_plan_splits_is_compared_by_parts():
    whole = {"layer.0": 0}
    parts = {"layer.0.attention": 0, "layer.0.mlp": "cpu"}
    assert difference(plan(whole), plan(parts)).moves == (Move(("layer.0.mlp",), home("cuda:0"), home("cpu")),)
    assert difference(plan({"": 0}), plan(parts)).moves == (Move(("layer.0.mlp",), home("cuda:0"), home("cpu")),)


def test_computing_on_the_cpu_instead_of_streaming_is_a_move():
    found = difference(plan({"a": "cpu"}), plan({"a": "cpu"}, {"a": "cpu"}))
    assert found.moves == (Move(("a",), home("cpu"), home("cpu", computes_there=True)),)


def test_streaming_to_another_card_is_a_move():
    found = difference(plan({"a": "cpu"}), plan({"a": "cpu"}, {"a": "cuda:1"}))
    assert found.moves == (Move(("a",), home("cpu"), home("cpu", runs_on=Device("cuda", 1))),)


def test_modules_of_only_one_plan_are_listed():
    found = difference(plan({"a": 0}), plan({"a": 0, "b": 1}, devices=("cuda:0", "cuda:1", "cpu", "disk")))
    assert found.moves == (Move(("b",), None, home("cuda:1")),)
    assert found.devices["disk"].before is None


def test_common_modules_of_different_models_are_compared():
    before = plan({"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1})
    after = plan({"model.layers.0": 1, "model.layers.1.mlp": 0, "model.layers.1.gate": 0, "lm_head": 1})
    models = [{"model": name, "class": None, "config.layers": layers} for name, layers in (("a", 1), ("b", 2))]
    found = difference(before, after, models)
    assert (found.models_differ, found.to_json()["models_differ"]) == (True, True)
    assert found.moves == (Move(("model.layers.0",), home("cuda:0"), home("cuda:1")),)
    moved_source = difference(before, after, (models[0], {**models[0], "model": "elsewhere"}))
    assert not moved_source.models_differ  # by its values it is the same
    assert len(moved_source.moves) > 1


def test_moves_name_accelerators_of_their_own_kind():
    found = difference(plan({"a": 0}, devices=("xpu:0", "xpu:1")), plan({"a": 1}, devices=("xpu:0", "xpu:1")))
    assert found.moves == (Move(("a",), home("xpu:0"), home("xpu:1")),)


def test_plans_differ_by_bytes_times_and_settings_without_a_move():
    before = plan({"a": 0})
    for after in (
        plan({"a": 0}, strategy="fastest"),
        plan({"a": 0}, prediction={**NOTHING, "hops": 1}),
        plan({"a": 0}, devices=("cuda:0", "cuda:1")),
    ):
        assert difference(before, after).moves == ()
        assert not difference(before, after).is_none


def test_a_lock_without_buffers_is_taken_to_leave_them():
    before, left, offloaded = (plan({"a": 0}, **more) for more in ({}, *({"offload_buffers": on} for on in (0, 1))))
    assert difference(before, left).is_none
    assert list(difference(before, offloaded).settings) == ["offload_buffers"]


def test_many_changed_values_are_compared_quickly():
    values = {f"config.k{number}": number for number in range(40_000)}
    start = time.process_time()
    same = plan(layers([0]))
    found = difference(same, same, ({"model": "a"}, {"model": "b", **values}))
    assert time.process_time() - start < 2
    assert list(found.settings) == ["model"]
