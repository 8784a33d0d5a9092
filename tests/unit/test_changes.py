"""A stale lock names the changed value with its old and new content, and omits consequences of other changes."""

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


def test_an_unchanged_profile_has_no_changes(lock):
    assert changed_inputs(lock, compiled("# a comment\n" + PROFILE).inputs, {}) == ()
    change_config(transformers_version="6.0")
    assert changed_inputs(lock, compiled().inputs, {}) == ()


def test_a_changed_config_value_is_named(lock):
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
def test_a_changed_profile_value_is_named(lock, before, after, said):
    (phrase,) = changed_inputs(lock, compiled(PROFILE.replace(before, after)).inputs, {})
    assert phrase.startswith("the profile: ")
    assert said in phrase


def test_many_changed_values_are_counted(lock):
    change_config(a=1, b=2, c=3, d=4, e=5)
    (phrase,) = changed_inputs(lock, compiled().inputs, {})
    assert phrase.endswith("`c` is new: 3 and 2 more")


def test_a_changed_catalogue_value_is_named(workspace):
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


def test_the_host_counts_as_hardware_only_if_the_profile_states_its_rates(workspace):
    """Otherwise a new default host in this package would make every machine look changed."""
    profile = "version: 1\nmodel: {source: llama}\nhardware:\n  devices: {cuda:0: rtx-4090}\n"
    unsaid, said = (compiled(profile + host).inputs for host in ("", "  host: {dispatch: 3us}\n"))
    assert said.values["hardware"]["host.dispatch_nanoseconds"] == 3000
    assert "host.dispatch_nanoseconds" not in unsaid.values["hardware"]
    assert (unsaid.hardware == said.hardware, unsaid.hardware) == (False, compiled(profile).inputs.hardware)


def test_a_module_tree_changed_by_other_libraries_is_named(lock, monkeypatch):
    monkeypatch.setattr(changes, "library_versions", lambda: {"torch": "2.14"})
    now = replace(compiled().inputs, graph="sha256:0")
    assert changed_inputs(lock, now, {}) == ("the model's module tree changed (torch 2.13 → 2.14)",)


def test_a_changed_commit_is_named(lock):
    earlier = replace(lock, inputs={**lock.inputs, "commit": "a" * 40})
    now = replace(compiled().inputs, commit="b" * 40)
    assert changed_inputs(earlier, now, {}) == (
        f"the commit that the model's revision resolves to: {'a' * 40} → {'b' * 40}",
    )


def test_a_lock_without_values_names_the_changed_input(lock):
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


def test_long_values_and_local_paths_are_kept_as_digests():
    values = values_of(
        {"a": list(range(99)), "b": "x" * 199, "c": "/home/me/model", "d": {"e": [{"f": None}]}, "g": {}}
    )
    assert values["d.e[0].f"] is None
    assert values["g"] == "{}"
    assert values["a"].startswith("99 items, sha256:")
    assert values["b"].startswith("199 characters, sha256:")
    assert "/home" not in values["c"]
    assert values_of([1, "x"]) == {"": '[1, "x"]'}
