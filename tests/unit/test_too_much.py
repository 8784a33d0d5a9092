"""Profiles of up to a megabyte are answered quickly, whatever they have many of or make long.

Each of these took minutes before it had a limit, and takes a fraction of a second now.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from devmap_config.devices import CPU as CPU_DEVICE
from devmap_config.diagnostics.diagnostic import MAX_ERRORS, Diagnostic, Sink, TooManyErrorsError
from devmap_config.diagnostics.terminal import print_diagnostics
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName
from devmap_config.profile.document import whole_file
from devmap_config.profile.loading import load_profile
from devmap_config.profile.located import Located
from devmap_config.rules import matching, resolution
from devmap_config.rules.adoption import adopted_homes
from devmap_config.rules.pattern import parse_pattern
from devmap_config.rules.rule import Rule
from devmap_config.rules.written_map import MapEntry

MOST_SECONDS = 4
"""Of the processor: several times what the slowest takes."""

HEAD = "version: 1\nmodel: {source: good}\n"
CPU = HEAD + "hardware: {devices: {cpu: {memory: 1GiB}}}\n"


def devices(*keys):
    return HEAD + "hardware: {devices: {" + ", ".join(f"'{key}': h100-sxm" for key in keys) + "}}\n"


def some(count, item):
    return ", ".join(item(number) for number in range(count))


LONG = "y" * 900_000

PROFILES = {
    "devices": (devices(*(f"cuda:{number}" for number in range(9_000))), "too-large"),
    "ranges of devices": (devices(*(f"cuda:[{n}00-{n}99]" for n in range(9))), "too-large"),
    "a range of the same devices": (
        CPU + 'placement: {device: "cuda:[' + "0-127," * 1_300 + '0]"}\n',
        "bad-device-name",
    ),
    "caps": (CPU + "placement: {max_memory: {" + some(20_000, lambda n: f"{n}: 1GiB") + "}}\n", "too-large"),
    "values on one line": (
        CPU + "placement: {max_memory: {" + some(60_000, lambda n: f"{n}: 1GiB") + "}}\n",
        "too-large",
    ),
    "extended files": (CPU + "extends: [" + some(40_000, lambda _: "profile.yaml") + "]\n", "too-large"),
    "unknown keys": (CPU + "".join(f"k{number}: 1\n" for number in range(20_000)), "too-large"),
    "keys of a device": (
        HEAD + "hardware: {devices: {cpu: {memory: 1GiB, " + some(20_000, lambda n: f"k{n}: 1") + "}}}\n",
        "too-large",
    ),
    "wrong pins": (CPU + "placement: {pins: [" + some(30_000, lambda _: "{}") + "]}\n", "too-large"),
    "a key without a value": (CPU + LONG + "\n", "syntax"),
    "an open quote": (CPU + "name: '" + LONG, "syntax"),
    "a name": (CPU + f"name: {LONG}\n", "too-large"),
    "a path": (CPU.replace("good", "a/" * 400_000), "too-large"),
    "templates": (
        CPU + "placement: {pins: [" + some(9_000, lambda n: f'{{match: "{{{{ {n} }}}}", device: cpu}}') + "]}\n",
        "template-limit",
    ),
    "a pattern": (CPU + 'placement: {pins: [{match: "' + "**." * 300_000 + 'x", device: cpu}]}\n', "too-large"),
}


def findings(text):
    Path("profile.yaml").write_text(text)
    sink = Sink()
    try:
        load_profile(Path("profile.yaml"), sink)
    except TooManyErrorsError as error:
        return error.diagnostics, error.texts
    return sink.diagnostics, sink.texts


@pytest.mark.parametrize(("text", "code"), PROFILES.values(), ids=PROFILES.keys())
def test_excessive_profiles_are_refused_quickly(tmp_path, monkeypatch, text, code):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    diagnostics, texts = findings(text)
    stream = io.StringIO()
    print_diagnostics(diagnostics[:100], texts, Console(file=stream, width=120))
    assert time.process_time() - start < MOST_SECONDS
    assert code in [diagnostic.code for diagnostic in diagnostics]
    assert len(diagnostics) <= MAX_ERRORS + 1


def test_after_a_thousand_errors_the_search_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diagnostics, _ = findings(CPU + "".join(f"k{number}: 1\n" for number in range(1_200)))
    assert [diagnostic.code for diagnostic in diagnostics] == ["unknown-key"] * MAX_ERRORS + ["too-large"]


def test_slow_rules_are_refused_and_equal_patterns_are_matched_once(monkeypatch):
    leaves = tuple(Module(ModulePath(f"layers.{number}"), "Linear") for number in range(100))
    graph = ModelGraph(
        Module(ModulePath(""), "Model", children=(Module(ModulePath("layers"), "List", children=leaves),))
    )
    monkeypatch.setattr(matching, "MAX_STEPS", 3_000)
    monkeypatch.setattr(resolution, "MAX_STEPS", 3_000)

    def codes(*texts):
        sink = Sink()
        rules = [Rule(pattern=parse_pattern(text), source=Located(text), optional=True) for text in texts]
        resolution.resolve(tuple(rules), graph, "model", sink)
        return [diagnostic.code for diagnostic in sink.diagnostics if diagnostic.is_error]

    assert codes(*["**.*"] * 50) == []
    assert codes(*(f"layers.[{number}]" for number in range(50))) == ["too-large"]
    assert codes("**." * 100 + "x") == ["bad-pattern"]


def model_of_many_tensors(count):
    names = [TensorName(f"layers.{number}.weight") for number in range(count)]
    tensors = tuple(Tensor(name, (1,), "float32", size_bytes=4, planner_bytes=4, kind="parameter") for name in names)
    return ModelGraph(Module(ModulePath(""), "Model", parameters=tensors))


def test_many_equal_rules_are_applied_quickly():
    graph, pattern = model_of_many_tensors(2_000), parse_pattern("**")
    rules = tuple(Rule(pattern=pattern, source=Located("**"), origin="allow_new") for _ in range(100_000))
    start = time.process_time()
    assert len(resolution.resolve(rules, graph, "model", Sink()).new) == 2_000
    assert time.process_time() - start < MOST_SECONDS


@pytest.mark.parametrize("key", ["x{}.weight", "layers.{}.", ".*x{}.*y"])
def test_a_map_of_many_keys_is_read_quickly(key):
    graph = model_of_many_tensors(300)
    entries = {key.format(number): MapEntry(CPU_DEVICE, "cpu", whole_file("map")) for number in range(20_000)}
    start = time.process_time()
    adopted_homes(entries, graph, "map", Sink())
    assert time.process_time() - start < MOST_SECONDS


def test_long_names_are_shortened_in_messages():
    finding = Diagnostic.error("syntax", f"`{'x' * 9_000}` is wrong", help="y" * 9_000)
    assert len(finding.message) < 700
    assert len(finding.help) < 5_100
