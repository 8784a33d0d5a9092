"""The text that people read of a plan: its summary, help, plurals, and missing times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from devmap_config import compile_profile
from devmap_config.amounts import counted
from devmap_config.cli import devmap
from devmap_config.cli.explain import alternatives_of, why
from devmap_config.cli.predictions import predicted
from devmap_config.compiler import Request, run_pipeline
from devmap_config.devices import Device
from devmap_config.execution.assignment import Location
from devmap_config.plan.plan import NotADeviceMapError, Prediction

PROFILE = """\
version: 1
model: {source: mixture}
workload: {context_length: 64}
hardware:
  devices: {cuda:0: {memory: 1GiB, bandwidth: 1TB/s}, cpu: {memory: 1GiB, bandwidth: 50GB/s}}
  links: {host: 25GB/s}
placement: {strategy: fastest, pins: [{match: "model.layers.[1-3].mlp.experts", device: cpu, compute: cpu}]}
"""


@pytest.fixture
def profile(workspace):
    (workspace / "p.yaml").write_text(PROFILE)
    return workspace / "p.yaml"


def run(*arguments):
    return CliRunner().invoke(devmap, arguments, standalone_mode=False)


def test_a_plans_text_lists_what_each_device_holds(profile):
    text = str(compile_profile(profile))
    assert text.startswith("plan by `fastest`:\n  cuda:0 ")
    assert "  computed on the CPU: model.layers.[1-3].mlp.experts" in text
    assert len(text.splitlines()) == 4


def test_a_plan_without_a_device_map_names_its_modules_and_the_loader(profile):
    plan = compile_profile(profile)
    with pytest.raises(NotADeviceMapError, match=r"say: model\.layers\.\[1-3\]\.mlp\.experts; .*load_model"):
        _ = plan.device_map
    done = run("compile", str(profile), "--dry-run", "--format", "device-map")
    assert (done.return_value, done.stdout) == (1, "")
    assert "model.layers.[1-3].mlp.experts" in done.stderr
    assert "devmap_config.load_model" in done.stderr


def test_the_help_of_commands_is_not_cut_off():
    shown = run("--help").output
    assert "..." not in shown.partition("Commands:")[2]
    assert all(made.get_short_help_str(limit=500) in " ".join(shown.split()) for made in devmap.commands.values())


@pytest.mark.parametrize("command", ["compile", "explain", "fit"])
def test_no_time_is_shown_as_zero(command, profile):
    profile.write_text(
        PROFILE.replace("mixture", "unmeasurable").replace("sequential", "fastest").split("placement")[0]
    )
    arguments = {"compile": ["--dry-run"], "fit": ["--on", "rtx-4090"]}.get(command, [])
    done = run(command, str(profile), *arguments)
    assert done.return_value == 0, done.output
    assert "0 ns" not in done.output


@pytest.mark.parametrize("command", ["compile", "explain", "fit"])
def test_a_missing_time_names_the_missing_rate(command, profile):
    box = profile.with_name("box.yaml")
    box.write_text(PROFILE[PROFILE.index("hardware:") : PROFILE.index("placement")])
    arguments = {"compile": ["--dry-run"], "fit": ["--on", str(box)]}.get(command, [])
    told = " ".join(run(command, str(profile), *arguments).stdout.split())
    assert "ithout the `flops` of cuda:0, cpu, no time of a prefill is predicted" in told
    entries = ("cuda:0: {memory: 1GiB, bandwidth: 1TB/s, flops: 150TFLOP/s}", "flops: 1TFLOP/s}")
    assert (
        f"(for example) `{entries[0]}` and `cpu: {{memory: 1GiB, bandwidth: 50GB/s, {entries[1]}`, or take what" in told
    )
    assert ("in a YAML file with a `hardware:` block" in told) == (command == "fit")
    profile.write_text(PROFILE.replace("1TB/s", "1TB/s, flops: 1TFLOP/s").replace("50GB/s", "50GB/s, flops: 1TFLOP/s"))
    box.write_text(profile.read_text()[PROFILE.index("hardware:") : profile.read_text().index("placement")])
    assert "ithout the" not in run(command, str(profile), *arguments).stdout


def test_a_part_of_a_split_block_is_explained_by_itself(workspace):
    split = "{match: model.layers.0.mlp, device: cpu, compute: cpu}"
    Path("p.yaml").write_text(PROFILE.replace("mixture", "llama").partition("pins")[0] + f"pins: [{split}]}}\n")
    compiled = run_pipeline(Request(path=Path("p.yaml")))
    told = " ".join(why(compiled, "model.layers.0.self_attn.q_proj"))
    assert "a part of the block `model.layers.0`, whose parts are on different devices in this plan" in told
    here = Device.from_text("cuda:0")
    others = alternatives_of(compiled, "model.layers.0.self_attn.q_proj")
    assert others
    assert Location(here, here) not in [other.location for other in others]
    assert "which is placed as a whole" in " ".join(why(compiled, "model.layers.1.self_attn.q_proj"))


def test_a_place_of_unknown_speed_says_which_figure_is_missing(workspace):
    Path("p.yaml").write_text(
        PROFILE.replace("mixture", "llama").partition("pins")[0].replace("bandwidth: 50GB/s", "reserve: 0") + "}\n"
    )
    compiled = run_pipeline(Request(path=Path("p.yaml")))
    missing = {str(other.location): other.missing for other in alternatives_of(compiled, "model.layers.1")}
    assert ("the `bandwidth` of cpu",) in missing.values()
    assert () in missing.values()


def test_counts_have_singular_and_plural():
    assert [counted(1, "tensor"), counted(2, "tensor")] == ["1 tensor", "2 tensors"]


def test_a_context_at_the_models_limit_is_said_to_end(workspace):
    Path("p.yaml").write_text(
        "version: 1\nmodel: {source: learned}\nworkload: {context_length: 256}\n"
        "hardware: {devices: {cpu: {memory: 1GiB}}}\n"
    )
    told = CliRunner().invoke(devmap, ["explain", "p.yaml"]).stdout
    assert "The context cannot grow beyond 256 tokens: the model's positions end." in told


@pytest.mark.parametrize(("fastest", "shown"), [(99_800_000, True), (100_000_000, False), (100_000_001, False)])
def test_the_fastest_plans_time_is_shown_if_it_differs_in_print(fastest, shown):
    prediction = Prediction(decode_nanoseconds_per_token=100_000_002, fastest_decode_nanoseconds_per_token=fastest)
    assert ("the fastest plan takes 99.8 ms" in predicted(SimpleNamespace(prediction=prediction))) == shown
    assert ("the fastest plan" in predicted(SimpleNamespace(prediction=prediction))) == shown
