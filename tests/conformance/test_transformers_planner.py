"""`auto`, `balanced`, `balanced_low_0` and `sequential` place every tensor where transformers' own planner does."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
import zoo
from accelerate.utils import check_device_map
from transformers.integrations.accelerate import _get_device_map, expand_device_map

from devmap_config.devices import CPU, Device
from devmap_config.execution.executor import Executor
from devmap_config.execution.units import fold
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import graph_of
from devmap_config.graph.measurement import measure
from devmap_config.placement.problem import Problem
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES, Infeasible, place
from devmap_config.placement.transformers_planner import plan_like_transformers
from devmap_config.plan.plan import assemble
from devmap_config.plan.verify import verify

INVALID_MAPS = yaml.safe_load((Path(__file__).parent / "invalid_maps.yaml").read_text())

SAMPLE = (
    "llama gpt2 bert t5 mixtral gemma3 gemma3_text gemma4 whisper clip deepseek_v3 mamba jamba qwen3_moe "
    "qwen2_5_vl qwen3_next gpt_oss falcon phi3 bart vit bloom opt mistral olmo2 cohere2 glm4 lfm2 llava zamba2 "
    "roberta siglip"
).split()
"""Kinds that people run: the whole zoo takes minutes and is a target of its own."""


def budgets(total_bytes):
    return {
        "both ample": {0: 10 * total_bytes, 1: 10 * total_bytes},
        "70 % + 70 %": {0: total_bytes * 7 // 10, 1: total_bytes * 7 // 10},
        "three unequal and the CPU": {
            0: total_bytes // 2,
            1: total_bytes * 3 // 10,
            2: total_bytes // 5,
            "cpu": 10 * total_bytes,
        },
        "CPU and disk": {"cpu": total_bytes * 6 // 10, "disk": 10 * total_bytes},
        "too small, then CPU and disk": {
            0: total_bytes * 3 // 10,
            1: total_bytes // 5,
            "cpu": total_bytes // 5,
            "disk": 10 * total_bytes,
        },
    }


def canonical(device):
    return Device("cuda", device) if isinstance(device, int) else Device(device)


def by_prefix(device_map, name):
    """Return the device of a tensor by the longest key that covers it, or `None` if no key does."""
    while name not in device_map:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return canonical(device_map[name])


def compare(model_type):
    """Check that the two planners agree, and return the mistakes of transformers' maps."""
    logging.disable(logging.WARNING)
    model = zoo.build(model_type)
    graph = graph_of(model, torch.float32)
    names = list(graph.tensors)
    found = {}
    for budget_name, budget in budgets(graph.size_bytes).items():
        capacities = {canonical(device): size_bytes for device, size_bytes in budget.items()}
        for strategy in TRANSFORMERS_STRATEGIES:
            where = f"{model_type}, {budget_name}, {strategy}"
            ours = plan_like_transformers(Problem(graph, capacities), strategy).devices
            check_valid(graph, model, ours, where)
            try:
                theirs = _get_device_map(model, strategy, dict(budget), None)
            except Exception as error:
                found["crashes"] = f"{where}: {error!r}"
                continue
            devices = {name: by_prefix(theirs, name) for name in names}
            if lost := [name for name in names if devices[name] is None]:
                found["loses"] = f"{where}: {lost[0]}"
            differ = [name for name in names if devices[name] not in (None, ours[name])]
            assert differ == [], where
    return found


def check_valid(graph, model, placement, where):
    """Check that a placement makes a valid plan, which both libraries read as intended."""
    ample = dict.fromkeys(placement.values(), 100 * graph.size_bytes) | {CPU: 100 * graph.size_bytes}
    homes = {name: (device, None) for name, device in placement.items()}
    plan = assemble(graph, fold(graph, homes), ample, strategy="auto", executor=Executor())
    # What cannot be read from where transformers puts it is kept elsewhere afterwards.
    assert [each for each in verify(plan, graph, ample) if each.kind != "stranded-tensor"] == [], where
    check_device_map(model, plan.device_map)
    read = expand_device_map(plan.device_map, list(graph.tensors))
    assert {name: canonical(device) for name, device in read.items()} == placement, where


WORKLOAD = WorkloadShape(batch_size=64, context_length=64, prompt_length=64)


def zoo_graph_with_workload(model_type):
    logging.disable(logging.WARNING)
    model = zoo.build_shallow(model_type, "bfloat16")
    graph = graph_of(model, torch.bfloat16)
    measurement = measure(zoo.build_shallow(model_type, "bfloat16"), graph, WORKLOAD)
    return replace(graph, measurement=measurement), model


def check_budgets(graph, model):
    """Check that transformers' planner, given the printed `max_memory`, makes the plan with room for the workload."""
    total_bytes, lowered = graph.size_bytes, set()
    for tenths, strategy in product(((5, 2), (6, 4), (8, 8), (9, 3)), TRANSFORMERS_STRATEGIES):
        sizes = [total_bytes * share // 10 for share in tenths]
        capacities = {canonical(0): sizes[0], canonical(1): sizes[1], CPU: 10 * total_bytes}
        placed = place(Problem(graph, capacities), strategy)
        if isinstance(placed, Infeasible) or placed.budgets.rounds is not None:
            continue
        budgets = placed.budgets.max_memory
        if not placed.budgets.is_mended:
            lowered |= {strategy} if budgets != capacities else set()
            asked = {device.in_device_map: size for device, size in budgets.items()}
            theirs = _get_device_map(model, strategy, asked, None)
            assert {name: by_prefix(theirs, name) for name in graph.tensors} == placed.placement, (tenths, strategy)
        homes = {name: (device, None) for name, device in placed.placement.items()}
        plan = assemble(graph, fold(graph, homes), capacities, strategy=strategy, executor=Executor())
        assert min(use.free_bytes for use in plan.devices) >= 0
    return lowered


@pytest.mark.parametrize("model_type", "falcon gpt2 llama mixtral opt t5".split())
def test_printed_budgets_make_the_same_plan_in_transformers(model_type):
    assert {"sequential", "auto"} & check_budgets(*zoo_graph_with_workload(model_type))


def test_no_budgets_are_printed_if_transformers_planner_crashes():
    graph, model = zoo_graph_with_workload("camembert")
    assert check_budgets(graph, model) == set()
    total_bytes = graph.size_bytes
    with pytest.raises(IndexError):
        _get_device_map(model, "sequential", {0: total_bytes // 2, 1: total_bytes // 2, "cpu": total_bytes}, None)


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", sorted({*zoo.causal_model_types(), *zoo.sequence_model_types()}))
def test_printed_budgets_make_the_same_plan_in_transformers_over_the_zoo(model_type):
    try:
        graph, model = zoo_graph_with_workload(model_type)
    except Exception as error:
        pytest.skip(f"transformers does not build it, or it is not measured: {type(error).__name__}")
    check_budgets(graph, model)


KNOWN_INVALID = sorted(set(INVALID_MAPS) & set(zoo.model_types()))
"""Of the types that are listed, those that this version of transformers has."""


@pytest.mark.parametrize("model_type", [*SAMPLE, *KNOWN_INVALID])
def test_every_tensor_is_placed_where_transformers_places_it(model_type):
    found = compare(model_type)
    listed = INVALID_MAPS.get(model_type, {})
    assert sorted(found) == sorted(listed), found


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", [name for name in zoo.model_types() if name not in {*SAMPLE, *INVALID_MAPS}])
def test_every_tensor_of_the_zoo_is_placed_where_transformers_places_it(model_type):
    try:
        zoo.build(model_type)
    except Exception as error:
        pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
    assert compare(model_type) == {}
