"""The verifier finds each kind of invalid plan; a lock returns its plan, or the reason why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.integrations.accelerate import expand_device_map

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.devices import CPU, Device
from devmap_config.execution.assignment import Assignment, Location
from devmap_config.execution.executor import Executor
from devmap_config.execution.units import fold
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName
from devmap_config.locked import compile_locked
from devmap_config.plan.changes import changed_inputs
from devmap_config.plan.lock import LockError, lock_of, lock_path, read_lock
from devmap_config.plan.plan import NotADeviceMapError, assemble
from devmap_config.plan.verify import verify

PROFILE = """\
version: 1
model: {source: tied}
hardware: {devices: {cuda:0: {memory: 300KiB}, cuda:1: {memory: 1MiB}, cpu: {memory: 1MiB}}}
placement: {strategy: sequential, pins: [{match: "model.layers.[4-]", device: cuda:1}]}
"""


@pytest.fixture
def compilation(workspace):
    Path("profile.yaml").write_text(PROFILE)
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert isinstance(compilation, Compiled), compilation.diagnostics
    return compilation


CARD, OTHER_CARD = Device("cuda", 0), Device("cuda", 1)
ON_CARD = Location(CARD, CARD)


def kinds(compilation, *assignments, capacities=None):
    plan = replace(compilation.plan, assignments=tuple(assignments))
    capacities = capacities or compilation.inventory.capacities
    return {violation.kind for violation in verify(plan, compilation.model.graph, capacities)}


def test_a_plan_of_ours_is_valid(compilation):
    assert kinds(compilation, *compilation.plan.assignments) == set()


def test_verifier_finds_a_tensor_without_a_device(compilation):
    assert kinds(compilation, *compilation.plan.assignments[1:]) == {"uncovered-tensor"}


def test_verifier_finds_a_buffer_without_a_device(compilation):
    without = [each for each in compilation.plan.assignments if "rotary_emb" not in each.unit]
    assert kinds(compilation, *without) == {"uncovered-tensor"}


def test_verifier_finds_a_unit_within_another(compilation):
    layer = next(each for each in compilation.plan.assignments if each.unit == "model.layers.0")
    inner = Assignment("model.layers.0.mlp", tuple(name for name in layer.tensors if ".mlp." in name), ON_CARD)
    assert kinds(compilation, *compilation.plan.assignments, inner) == {"overlapping-units"}


def test_verifier_finds_a_unit_that_the_model_does_not_have(compilation):
    first, *others = compilation.plan.assignments
    assert kinds(compilation, replace(first, unit="model.nothing"), *others) == {"unknown-unit", "misread-map"}


def test_verifier_finds_an_unlisted_device(compilation):
    first, *others = compilation.plan.assignments
    assert "unlisted-device" in kinds(
        compilation, replace(first, location=Location(Device("cuda", 5), Device("cuda", 5))), *others
    )


def test_verifier_finds_a_split_block(compilation):
    layer = next(each for each in compilation.plan.assignments if each.unit == "model.layers.0")
    others = [each for each in compilation.plan.assignments if each is not layer]
    parts = [
        Assignment(
            f"model.layers.0.{part}", tuple(n for n in layer.tensors if f".{part}." in n), Location(device, device)
        )
        for part, device in {
            "self_attn": CARD,
            "mlp": OTHER_CARD,
            "input_layernorm": CARD,
            "post_attention_layernorm": CARD,
        }.items()
    ]
    assert kinds(compilation, *others, *parts) == {"split-block"}


def test_verifier_finds_a_split_tie(compilation):
    moved = [
        replace(each, location=Location(CPU, CARD)) if each.unit == "lm_head" else each
        for each in compilation.plan.assignments
    ]
    assert kinds(compilation, *moved) == {"split-tie"}


def test_verifier_finds_a_device_over_capacity(compilation):
    capacities = {**compilation.inventory.capacities, OTHER_CARD: 1000}
    assert kinds(compilation, *compilation.plan.assignments, capacities=capacities) == {"over-capacity"}


def test_verifier_finds_a_map_that_transformers_misreads():
    """transformers joins keys into an unescaped regular expression: the dot of `block.1` matches any character."""

    def linear(path):
        weight = Tensor(TensorName(f"{path}.weight"), (1,), "float32", 4, 4)
        return Module(ModulePath(path), "Linear", (weight,))

    block = Module(ModulePath("block"), "ModuleList", (), (linear("block.1"),))
    graph = ModelGraph(Module(ModulePath(""), "Model", (), (block, linear("block_1x"))))
    homes = {"block.1.weight": (CARD, None), "block_1x.weight": (OTHER_CARD, None)}
    capacities = {CARD: 100, OTHER_CARD: 100}
    plan = assemble(graph, fold(graph, homes), capacities, strategy="manual", executor=Executor())
    with pytest.raises(KeyError):
        expand_device_map(plan.device_map, list(graph.tensors))
    assert [violation.kind for violation in verify(plan, graph, capacities)] == ["misread-map"]


def lock_text(compilation):
    hardware = compilation.inventory.accelerators_to_json()
    return lock_of(compilation.plan, compilation.inputs, {}, MADE_WITH, hardware).to_text()


MADE_WITH = {"accelerate": "1", "torch": "2", "transformers": "5"}


def test_a_lock_returns_its_plan(compilation):
    lock = read_lock(lock_text(compilation))
    again, drift = compile_locked(Path("profile.yaml"), lock)
    assert (again.plan, drift) == (compilation.plan, None)
    assert changed_inputs(lock, compilation.inputs, {}) == ()
    lock = replace(lock, variables={"a": "1"})
    assert changed_inputs(lock, compilation.inputs, {}) == ("the `--set` values: `a` is gone: it was 1",)


def test_made_with_is_not_part_of_the_digest(compilation):
    value = json.loads(lock_text(compilation))
    value["made_with"]["torch"] = "3"
    assert read_lock(json.dumps(value)).made_with == {**MADE_WITH, "torch": "3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "not a lock"),
        (lambda text: text.replace('"cuda:1"', '"cuda:0"', 1), "changed by hand"),
        (lambda text: text.replace('"lock_version": 1', '"lock_version": 2'), "reads up to"),
        (lambda text: text.replace('  "plan": {', '<<<<<<< ours\n  "plan": {'), "merge conflict"),
    ],
)
def test_a_damaged_or_newer_lock_is_an_error(compilation, change, message):
    with pytest.raises(LockError, match=message):
        read_lock(change(lock_text(compilation)))


@pytest.mark.parametrize("name", ["x.yaml", "x.yml"])
def test_the_lock_is_beside_the_profile(name):
    assert lock_path(Path("a") / name) == Path("a/x.lock.json")


def test_a_plan_that_computes_on_the_cpu_has_no_device_map(workspace):
    Path("profile.yaml").write_text(
        PROFILE.replace('"model.layers.[4-]", device: cuda:1', "model.layers.4, compute: cpu")
    )
    plan = run_pipeline(Request(path=Path("profile.yaml"))).plan
    assert plan.compute == {"model.layers.4": CPU}
    with pytest.raises(NotADeviceMapError, match=r"model\.layers\.4"):
        _ = plan.device_map
