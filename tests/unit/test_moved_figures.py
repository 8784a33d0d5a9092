"""A lock made with other library versions stays valid while its plan holds, and changed measurements are reported.

Other versions are simulated by a changed measurement, and by the versions in the lock.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config import compiler
from devmap_config.cli import devmap
from devmap_config.graph.digest import digest
from devmap_config.graph.serialization import graph_to_json
from devmap_config.plan import changes

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  devices: {cuda:0: {memory: 700KiB, bandwidth: 1TB/s}, cpu: {memory: 1GiB, bandwidth: 50GB/s}}
  links: {host: 25GB/s}
placement: {strategy: STRATEGY}
"""


def run(*arguments):
    done = CliRunner().invoke(devmap, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    return done.return_value, " ".join(done.stderr.split()), done.stdout


@pytest.fixture(params=["sequential", "fastest"])
def strategy(request, workspace):
    Path("p.yaml").write_text(PROFILE.replace("STRATEGY", request.param))
    assert run("compile", "p.yaml", "-q", "--no-simulate")[0] == 0
    return request.param


def lock():
    return json.loads(Path("p.lock.json").read_text())


def reseal(value):
    sealed = {key: part for key, part in value.items() if key not in ("digest", "made_with")}
    Path("p.lock.json").write_text(json.dumps({**value, "digest": digest(sealed)}))


def make_early(graph):
    """Turn the lock into one from before measurements had a digest of their own."""
    value, then = lock(), graph_to_json(graph)
    del value["inputs"]["measurement"], then["schema"], then["measurement"]["positions"]
    value["inputs"]["graph"] = digest(then)
    reseal(value)


def graph_of_profile():
    return compiler.run_pipeline(compiler.Request(path=Path("p.yaml"))).model.graph


@pytest.fixture
def measured_by(monkeypatch):
    """Make later commands measure by this version, with larger activations and times."""

    def measure(version, more_bytes=0, **changed):
        found = compiler.load_model_graph
        now = {**changes.library_versions(), "transformers": version}
        monkeypatch.setattr(changes, "library_versions", lambda: now)

        def load(*arguments, **options):
            model = found(*arguments, **options)
            measurement = model.graph.measurement
            modules = tuple(_with_more(cost, more_bytes) for cost in measurement.modules)
            graph = replace(model.graph, measurement=replace(measurement, modules=modules), **changed)
            return replace(model, graph=graph)

        monkeypatch.setattr(compiler, "load_model_graph", load)

    return measure


def _with_more(cost, more_bytes):
    return replace(
        cost,
        prefill_peak_bytes=cost.prefill_peak_bytes + more_bytes,
        decode_dispatches=cost.decode_dispatches + more_bytes,
    )


@pytest.mark.parametrize("is_early", [False, True])
def test_a_lock_that_holds_with_new_measurements_is_a_warning(strategy, measured_by, is_early):
    if is_early:
        make_early(graph_of_profile())
        assert run("check", "p.yaml") == (0, "", "1 lock up to date\n")
    before = lock()["plan"]
    measured_by("9.9.9", more_bytes=4096)
    code, said, shown = run("check", "p.yaml")
    assert (code, shown) == (0, "1 lock up to date\n")
    made = lock()["made_with"]["transformers"]
    assert "warning[figures-moved]: the lock's plan holds, with other figures than it was made with" in said
    assert f"transformers {made} → 9.9.9 moves activations on cuda:0" in said
    assert "KiB → " in said
    assert ", predicted token " in said
    plan = json.loads(run("check", "p.yaml", "--format", "json")[2])["plan"]
    assert plan["device_map"] == before["device_map"]
    assert plan["devices"][0]["activation_bytes"] == before["devices"][0]["activation_bytes"] + 4096
    assert plan["prediction"]["bound_decode_nanoseconds_per_token"] is None
    code, said, _ = run("run", "p.yaml")
    assert (code, "error[no-weights]" in said) == (1, True)  # and not that the lock is stale


@pytest.mark.parametrize("is_early", [False, True])
def test_a_plan_that_no_longer_fits_with_new_measurements_is_stale(strategy, measured_by, is_early):
    if is_early:
        make_early(graph_of_profile())
    measured_by("9.9.9", more_bytes=400 * 1024)
    code, said, shown = run("check", "p.yaml")
    assert (code, shown) == (3, "1 lock is stale\n")
    assert "error[stale-lock]: `p.lock.json` is stale: transformers" in said
    assert "→ 9.9.9 moves activations on cuda:0" in said
    assert "more than it has" in said


def test_other_measurements_with_the_same_versions_make_a_lock_stale(strategy, measured_by):
    measured_by(lock()["made_with"]["transformers"], more_bytes=4096)
    code, said, _ = run("check", "p.yaml")
    assert (code, "what running the model was measured to take changed" in said) == (3, True)


@pytest.mark.parametrize("is_early", [False, True])
def test_another_module_tree_makes_a_lock_stale_with_any_versions(strategy, measured_by, is_early, monkeypatch):
    if is_early:
        make_early(graph_of_profile())
    graph = graph_of_profile()
    head = graph.root.children[-1]
    assert head.path == "lm_head"
    larger = replace(head.parameters[0], size_bytes=head.parameters[0].size_bytes + 2)
    root = replace(graph.root, children=(*graph.root.children[:-1], replace(head, parameters=(larger,))))
    measured_by("9.9.9", root=root)
    code, said, _ = run("check", "p.yaml")
    assert (code, "the model's module tree changed (transformers" in said) == (3, True)


def test_a_renamed_argument_changes_no_measurement(strategy, measured_by):
    """transformers 5.24 renamed the argument `past_key_values` to `cache`."""
    measured_by("9.9.9", skip_keys=("cash",))
    assert run("check", "p.yaml") == (0, "", "1 lock up to date\n")


def test_a_bound_is_not_proven_with_other_measurements(strategy, measured_by):
    assert run("check", "--prove", "p.yaml")[0] == 0
    measured_by("9.9.9", more_bytes=4096)
    code, said, _ = run("check", "--prove", "p.yaml")
    if strategy == "fastest":
        assert (code, "`plan.prediction.bound_decode_nanoseconds_per_token` is" in said) == (3, True)
    else:
        assert code == 0  # it proves none, and makes the same plan
