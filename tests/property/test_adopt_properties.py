"""Adopting a device map and compiling the profile gives the placement of the map."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.integrations.accelerate import expand_device_map

from devmap_config.cli.adopt import adopt
from devmap_config.compiler import Request, run_pipeline
from devmap_config.execution.units import fold
from devmap_config.graph.loading import GraphInputs, graph_from_source
from devmap_config.graph.source import local_source
from devmap_config.rules.compression import compress
from devmap_config.rules.map_reading import read_as_transformers
from devmap_config.rules.matching import match
from devmap_config.rules.pattern import parse_pattern


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return {
        name: graph_from_source(
            GraphInputs(source=local_source(folder / name), class_name=class_name, dtype="bfloat16")
        )
        for name, class_name in (("llama", "LlamaForCausalLM"), ("mixture", "Qwen3MoeForCausalLM"))
    }


def nearest_rule(graph, patterns):
    """Return the device of each tensor by its deepest pattern: a second implementation of the precedence of rules."""
    matches = [(set(match(parse_pattern(pattern), graph).names), device) for pattern, device in patterns.items()]
    homes = {}
    for name in graph.tensors:
        path = name
        while True:
            devices = {device for names, device in matches if path in names}
            if devices:
                [homes[name]] = devices
                break
            if not path:
                break
            path = path.rpartition(".")[0]
    return homes


devices = st.sampled_from(["cuda:0", "cuda:1", "cpu"])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["llama", "mixture"]), st.data())
def test_the_fewest_patterns_give_the_same_placement(graphs, name, data):
    graph = graphs[name]
    homes = {tensor: data.draw(devices) for tensor in graph.tensors} if data.draw(st.booleans()) else {}
    if not homes:
        units = [unit for unit, _ in fold(graph, dict.fromkeys(graph.tensors, ""))]
        for unit in units:
            homes |= dict.fromkeys(unit.tensors, data.draw(devices))
    patterns = compress(graph, homes)
    assert nearest_rule(graph, patterns) == homes
    assert len(patterns) <= len(fold(graph, homes))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_adopting_and_compiling_a_map_gives_the_same_map(graphs, tmp_path_factory, data):
    units = [unit.name for unit, _ in fold(graphs["llama"], dict.fromkeys(graphs["llama"].tensors, ""))]
    check_adopted({unit: data.draw(st.sampled_from([0, 1, "cpu"])) for unit in units}, tmp_path_factory)


def test_adopting_a_map_with_a_rotary_embedding_on_the_cpu(graphs, tmp_path_factory):
    # Its buffers stay where it runs, which takes a few bytes more there.
    units = [unit.name for unit, _ in fold(graphs["llama"], dict.fromkeys(graphs["llama"].tensors, ""))]
    check_adopted({unit: "cpu" if "rotary" in unit else 0 for unit in units}, tmp_path_factory)


def check_adopted(device_map, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adopted")
    write_models(folder)
    (folder / "map.json").write_text(json.dumps(device_map))
    profile = folder / "profile.yaml"
    arguments = [str(folder / "map.json"), "--model", str(folder / "llama"), "-o", str(profile)]
    assert CliRunner().invoke(adopt, arguments, standalone_mode=False).return_value == 0
    plan = run_pipeline(Request(path=Path(profile))).plan
    expected = device_map if len(set(device_map.values())) > 1 else {"": next(iter(device_map.values()))}
    assert plan.device_map == expected


POSITIONS = st.just(()) | st.sets(st.integers(0, 40), max_size=3)
OTHERS = st.sampled_from(["", ".", "...", "model.layers.1*", "(a)|x", "(", "model-x", "\ud800", "x" * 50, "modél"])


def with_dots(text, places):
    return "".join("." if place in places else character for place, character in enumerate(text))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["llama", "mixture"]), st.data())
def test_a_device_map_is_read_as_transformers_reads_it(graphs, name, data):
    graph = graphs[name]
    names = st.sampled_from(sorted({*map(str, graph.tensors), *map(str, graph.modules)}))
    pieces = st.builds(lambda name, length, dots: with_dots(name[:length], dots), names, st.integers(0, 60), POSITIONS)
    device_map = {key: number for number, key in enumerate(data.draw(st.sets(names | pieces | OTHERS, min_size=1)))}
    reading = read_as_transformers(device_map, graph)
    try:
        devices = expand_device_map(device_map, list(graph.tensors))
    except (KeyError, re.error):
        assert reading.fatal
        return
    assert not reading.fatal
    taken = {name: device_map[key] for name, key in reading.taken_by.items()}
    assert devices == {name: taken.get(name, "cpu") for name in graph.tensors}
