"""A stale lock says which value changed, from what to what; what follows from another change is not said again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph.digest import digest
from devmap_config.plan import changes
from devmap_config.plan.changes import changed_inputs
from devmap_config.plan.lock import lock_of, read_lock
from devmap_config.plan.values import values_of

MADE_WITH = {"accelerate": None, "torch": "2.13", "transformers": None}

PROFILE = """\
version: 1
model: {source: llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement:
  pins:
    - {match: lm_head, device: cpu}
    - {match: model.norm, device: cuda:1}
"""


def compiled(text=PROFILE):
    Path("profile.yaml").write_text(text)
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert isinstance(compilation, Compiled), compilation.diagnostics
    return compilation


@pytest.fixture
def lock(workspace):
    compilation = compiled()
    return lock_of(compilation.plan, compilation.inputs, {}, MADE_WITH)


def change_config(**changed):
    path = Path("llama/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_nothing_changed(lock):
    assert changed_inputs(lock, compiled("# a comment\n" + PROFILE).inputs, {}) == ()
    change_config(transformers_version="6.0")
    assert changed_inputs(lock, compiled().inputs, {}) == ()


def test_a_value_of_the_config(lock):
    change_config(num_hidden_layers=7, rope_theta=1e6)
    assert changed_inputs(lock, compiled().inputs, {}) == (
        "the model's config: `num_hidden_layers` 6 → 7, `rope_theta` is new: 1000000.0",
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("model.norm, device: cuda:1", "model.norm, device: cuda:0", "`placement.pins[1].device` cuda:1 → cuda:0"),
        ("model: {source: llama}", "model: {source: llama, dtype: float32}", "`model.dtype` is new: float32"),
        ("cuda:1: {memory: 1GiB}", "cuda:1: {memory: 2GiB}", "`hardware.devices.cuda:1.memory` 1,073,741,824 → 2,147"),
        ("    - {match: lm_head, device: cpu}\n", "", "`placement.pins[0].match` lm_head → model.norm"),
    ],
)
def test_a_value_of_the_profile(lock, before, after, said):
    (phrase,) = changed_inputs(lock, compiled(PROFILE.replace(before, after)).inputs, {})
    assert phrase.startswith("the profile: ")
    assert said in phrase


def test_many_values_are_counted(lock):
    change_config(a=1, b=2, c=3, d=4, e=5)
    (phrase,) = changed_inputs(lock, compiled().inputs, {})
    assert phrase.endswith("`c` is new: 3 and 2 more")


def test_a_figure_of_the_catalogue(workspace):
    profile = "version: 1\nmodel: {source: llama}\nhardware: {devices: {'cuda:[0-1]': rtx-4090}}\n"
    now = compiled(profile)
    lock = lock_of(now.plan, now.inputs, {}, {})
    hardware = dict(lock.values["hardware"])
    assert hardware["cuda:[0-1].memory_bytes"] > 2**34
    assert "cuda:0-cuda:1" in hardware
    hardware["cuda:[0-1].flops_per_second"] = 1
    earlier = replace(
        lock, values={**lock.values, "hardware": hardware}, inputs={**lock.inputs, "hardware": "sha256:0"}
    )
    (phrase,) = changed_inputs(earlier, now.inputs, {})
    assert phrase.startswith("the hardware: `cuda:[0-1].flops_per_second` 1 → 165,2")


def test_a_host_counts_as_hardware_where_a_profile_says_how_fast_it_is(workspace):
    """Else no machine has changed where this package takes another host to be usual."""
    profile = "version: 1\nmodel: {source: llama}\nhardware:\n  devices: {cuda:0: rtx-4090}\n"
    unsaid, said = (compiled(profile + host).inputs for host in ("", "  host: {dispatch: 3us}\n"))
    assert said.values["hardware"]["host.dispatch_nanoseconds"] == 3000
    assert "host.dispatch_nanoseconds" not in unsaid.values["hardware"]
    assert (unsaid.hardware == said.hardware, unsaid.hardware) == (False, compiled(profile).inputs.hardware)


def test_a_tree_that_other_libraries_read_otherwise(lock, monkeypatch):
    monkeypatch.setattr(changes, "library_versions", lambda: {"torch": "2.14"})
    now = replace(compiled().inputs, graph="sha256:0")
    assert changed_inputs(lock, now, {}) == ("the model's module tree changed (torch 2.13 → 2.14)",)


def test_the_commit(lock):
    earlier = replace(lock, inputs={**lock.inputs, "commit": "a" * 40})
    now = replace(compiled().inputs, commit="b" * 40)
    assert changed_inputs(earlier, now, {}) == (
        f"the commit that the model's revision resolves to: {'a' * 40} → {'b' * 40}",
    )


def test_a_lock_without_values_is_read_and_says_which_input_changed(lock):
    value = json.loads(lock.to_text())
    for key in ("digest", "values", "hardware", "made_with"):
        del value[key]
    del value["inputs"]["measurement"]
    earlier = read_lock(json.dumps({**value, "digest": digest(value), "made_with": MADE_WITH}))
    assert earlier.is_early
    change_config(num_hidden_layers=7)
    assert changed_inputs(earlier, compiled().inputs, {}) == (
        "the model's config changed",
        "the model's module tree changed",
    )


def test_what_is_long_or_a_path_of_one_machine_stands_as_a_digest():
    values = values_of(
        {"a": list(range(99)), "b": "x" * 199, "c": "/home/me/model", "d": {"e": [{"f": None}]}, "g": {}}
    )
    assert values["d.e[0].f"] is None
    assert values["g"] == "{}"
    assert values["a"].startswith("99 items, sha256:")
    assert values["b"].startswith("199 characters, sha256:")
    assert "/home" not in values["c"]
    assert values_of([1, "x"]) == {"": '[1, "x"]'}
