"""The context from which an offloaded cache is better is where compiling both plans changes their order."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import LLAMA

from devmap_config.cli import caches, devmap
from devmap_config.compiler import Compiled, Rejected, Request, run_pipeline
from devmap_config.graph import introspection, loading
from devmap_config.graph.serialization import graph_to_json

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: CONTEXT, prompt_length: 64, cache: CACHE}
hardware:
  devices: {cuda:0: {memory: MEMORY, bandwidth: 1TB/s, flops: 100TFLOP/s}, cpu: {memory: 1GiB}}
  links: {host: 100MB/s}
placement: {strategy: fastest}
"""


@pytest.fixture(autouse=True)
def few_contexts(workspace, monkeypatch):
    """A model with 1,024 positions."""
    Path("llama/config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 1024}))
    monkeypatch.setattr(caches, "HALVINGS", 1)


def written(*, context=64, cache="dynamic", memory="900KiB", text=PROFILE):
    text = text.replace("CONTEXT", str(context)).replace("CACHE", cache).replace("MEMORY", memory)
    Path("p.yaml").write_text(text)
    return Path("p.yaml")


def compared(profile):
    done = CliRunner().invoke(devmap, ["explain", str(profile), "--caches", "--format", "json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def nanoseconds_of(found):
    return [each and each["prediction"]["decode_nanoseconds_per_token"] for each in map(found.get, caches.CACHES)]


def test_the_stated_context_is_where_the_faster_of_both_plans_changes():
    told = compared(written())
    by_length = {each["context_length"]: each for each in told["caches"]}
    assert list(by_length) == [64, 544, 1024]
    assert [each["better"] for each in by_length.values()] == ["dynamic", "dynamic", "offloaded"]
    assert told["explanation"] == [
        "From a context of 1,024 tokens on, the cache is better offloaded; at 544 it is not yet."
    ]
    streamed = [each["dynamic"]["prediction"]["streamed_bytes_per_token"] for each in told["caches"]]
    assert all(before < after for before, after in pairwise(streamed))  # the weights make room for the cache
    for length in (544, 1024):
        profiles = (written(context=length, cache=cache) for cache in caches.CACHES)
        plans = [run_pipeline(Request(path=profile)).plan for profile in profiles]
        taken = [plan.prediction.decode_nanoseconds_per_token for plan in plans]
        assert taken == nanoseconds_of(by_length[length])
        assert (taken[1] < taken[0]) == (length == 1024)


def test_a_plan_that_mixes_both_is_shown_beside_them(monkeypatch):
    told = compared(written())["caches"]
    for each in told:
        taken = each["partly_offloaded"]["prediction"]["decode_nanoseconds_per_token"]
        assert taken <= min(nanoseconds_of(each))
    mixed = written(context=told[-1]["context_length"], cache="partly_offloaded")
    assert run_pipeline(Request(path=mixed)).plan.prediction.decode_nanoseconds_per_token == taken
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(devmap, ["explain", str(written()), "--caches"]).stdout.splitlines()
    assert shown[0].split() == ["context", "a", "token", "copied", "offloaded", "copied", "partly", "copied"]
    assert max(map(len, shown)) <= 80


@pytest.mark.parametrize("model", ["llama", "mixture", "learned"])
def test_caches_that_are_measured_alike_are_measured_once(model, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(loading, "build_graph", lambda *given, **names: measured.append(1) or build(*given, **names))
    build = introspection.build_graph

    def graph_of(cache, folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        path = written(cache=cache, text=PROFILE.replace("llama", model), memory="900MiB")
        return graph_to_json(run_pipeline(Request(path=path)).graph)

    apart = [graph_of(cache, cache) for cache in ("partly_offloaded", "offloaded", "dynamic")]
    assert len(measured) == 3
    assert [graph_of(cache, "shared") for cache in ("partly_offloaded", "offloaded", "dynamic")] == apart
    assert len(measured) == 4
    assert graph_of("dynamic", "offloaded") == apart[-1]
    assert len(measured) == 4


def test_a_cache_that_cannot_be_offloaded_is_reported_with_the_reason():
    profile = written(memory="2MiB", text=PROFILE.replace(", cpu: {memory: 1GiB}", ""))
    (said,) = compared(profile)["explanation"]
    assert said == (
        "With the cache offloaded, there is no plan: the cache should be on the CPU, but the profile does not list it:"
        " what is not listed does not exist."
    )


def test_without_rates_no_cache_is_called_better():
    text = PROFILE.replace(", bandwidth: 1TB/s, flops: 100TFLOP/s", "").replace("fastest", "fewest-devices")
    (said,) = compared(written(memory="8MiB", text=text))["explanation"]
    assert said.startswith("How long a token takes is not known")


def test_offloading_the_cache_is_proposed_if_it_fits():
    profile = written(context=1024, memory="850KiB")
    found = run_pipeline(Request(path=profile))
    assert isinstance(found, Rejected)
    (finding,) = (each for each in found.diagnostics if each.severity == "error")
    assert "; or write `cache: partly_offloaded`; or " in finding.help
    mended = written(context=1024, memory="850KiB", cache="partly_offloaded")
    assert isinstance(run_pipeline(Request(path=mended)), Compiled)
