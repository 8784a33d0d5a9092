"""`devmap fit` compares the plans of one profile on several machines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from devmap_config.cli import devmap
from devmap_config.cli.fit import Row
from devmap_config.plan.plan import Prediction

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware: {devices: {cuda:0: rtx-4090}}
placement: {strategy: fastest}
"""

SMALL_BOX = """\
hardware:
  devices:
    "cuda:[0-1]": {memory: 400KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}
    cpu: {memory: 1GiB}
  links: {host: 25GB/s, peer: 25GB/s}
"""


def fit(*machines, profile="profile.yaml"):
    """Return the rows that the command prints as JSON, and its exit code."""
    named = [argument for machine in machines for argument in ("--on", machine)]
    done = CliRunner().invoke(devmap, ["fit", profile, *named, "--format", "json"], standalone_mode=False)
    return json.loads(done.stdout)["machines"], done.return_value


def shown(*machines, profile="profile.yaml"):
    named = [argument for machine in machines for argument in ("--on", machine)]
    return CliRunner().invoke(devmap, ["fit", profile, *named], standalone_mode=False).output


@pytest.fixture(autouse=True)
def profile(workspace):
    Path("profile.yaml").write_text(PROFILE)
    Path("box.yaml").write_text(SMALL_BOX)
    return Path("profile.yaml")


def test_fit_gives_a_row_for_each_machine():
    Path("tiny.yaml").write_text("hardware: {devices: {cuda:0: {memory: 200KiB, bandwidth: 1TB/s}}}\n")
    rows, code = fit("h100-sxm,2xt4,tiny.yaml")
    assert [row["machine"] for row in rows] == ["h100-sxm", "2xt4", "tiny.yaml"]
    assert [row["fits"] for row in rows] == [True, False, False]
    assert rows[0]["prediction"]["decode_nanoseconds_per_token"] > 0
    assert "does not compute in bfloat16" in rows[1]["reason"]
    assert "find no place" in rows[2]["reason"]
    assert code == 0


def test_fit_states_the_basis_of_its_times():
    measured = re.sub(r"[TG]B/s|TFLOP/s", r"\g<0> measured", SMALL_BOX) + "  host: {dispatch: 4us measured}\n"
    Path("measured.yaml").write_text(measured)
    assert "these times rest on stated rates; measured prefills were slower" in shown("h100-sxm")
    assert "rest on" not in shown("24GiB")
    output = " ".join(shown("h100-sxm", "measured.yaml").split())
    assert "h100-sxm: its times rest on stated rates, measured prefills were slower" in output
    assert "measured.yaml, speed: 2 of 3 devices are used, its times rest on measured rates" in output
    [row], _ = fit("h100-sxm")
    assert row["basis"]["decode"]["rates"] == "stated"


def test_fit_gives_the_context_at_full_speed_and_the_longest_with_its_speed():
    [row], _ = fit("box.yaml")
    assert (row["strategy"], row["longest_context"]["strategy"]) == ("fastest", "longest-context")
    fastest, longest = row["prediction"], row["longest_context"]["prediction"]
    assert fastest["longest_context"] < longest["longest_context"]
    assert fastest["decode_nanoseconds_per_token"] < longest["decode_nanoseconds_per_token"]
    lines = shown("box.yaml").splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["box.yaml", "speed"], ["context", lines[3].split()[1]]]
    assert f"{fastest['longest_context']:,}" in lines[2]
    assert f"{longest['longest_context']:,}" in lines[3]


def test_fit_prints_one_line_if_one_plan_is_fastest_and_longest():
    lines = shown("h100-sxm").splitlines()
    assert len(lines) == 4
    assert lines[2].split()[:2] == ["h100-sxm", "both"]


def test_fit_shows_the_plan_for_the_longest_context_if_it_is_longer():
    found = [SimpleNamespace(plan=SimpleNamespace(prediction=Prediction(longest_context=length))) for length in (9, 8)]
    assert Row("box", fastest=found[0], longest=found[1]).plans == {"both": found[0]}
    assert list(Row("box", fastest=found[1], longest=found[0]).plans) == ["speed", "context"]


def test_fit_ignores_the_strategy_of_the_profile(profile):
    rows = fit("box.yaml")
    for strategy in ("longest-context", "sequential", "fewest-devices"):
        profile.write_text(PROFILE.replace("fastest", strategy))
        assert fit("box.yaml") == rows


def test_a_cpu_of_unknown_bandwidth_is_said_to_compute_in_no_plan(profile):
    box = SMALL_BOX.replace("cuda:[0-1]", "cuda:0").replace(", peer: 25GB/s", "")
    Path("one.yaml").write_text(box)
    Path("other.yaml").write_text(box.replace("1GiB", "1GiB, bandwidth: 50GB/s"))
    told = " ".join(shown("one.yaml", "other.yaml").split())
    assert "one.yaml: that the CPU computes with the weights that it stores, which may be faster, was not" in told
    assert "write (for example) `cpu: {memory: 1GiB, bandwidth: 50GB/s}`" in told
    assert "other.yaml: that the CPU" not in told
    profile.write_text(PROFILE.partition("hardware")[0] + box + "placement: {strategy: fastest}\n")
    compiled = CliRunner().invoke(devmap, ["compile", "profile.yaml", "--dry-run"], standalone_mode=False).output
    assert "no plan in the search space, without the CPU computing, is below" in " ".join(compiled.split())


def test_a_machine_without_rates_is_not_reported_as_too_small():
    [row], code = fit("2x24GiB")
    assert (row["fits"], row["strategy"], code) == (True, "fewest-devices", 0)
    for plan in (row, row["longest_context"]):
        assert plan["prediction"]["decode_nanoseconds_per_token"] is None
        assert plan["prediction"]["longest_context"] > 64
    assert "?" in shown("2x24GiB")


def test_fit_without_a_workload_gives_no_context(profile):
    profile.write_text(PROFILE.replace("workload: {context_length: 64}\n", ""))
    [row], code = fit("2x24GiB")
    assert (row["fits"], row["longest_context"], code) == (True, None, 0)
    assert "the profile names no workload" in shown("2x24GiB")


def test_fit_on_a_machine_with_a_disk_needs_no_offload_folder():
    devices = (
        "cuda:0: {memory: 250KiB, bandwidth: 1TB/s}, cpu: {memory: 250KiB}, disk: {memory: 1GiB, bandwidth: 1GB/s}"
    )
    Path("small.yaml").write_text(f"hardware: {{devices: {{{devices}}}, links: {{host: 25GB/s}}}}\n")
    [row], _ = fit("small.yaml")
    assert (row["reason"], row["fits"]) == (None, True)
    assert row["devices"][-1]["weights_bytes"] > 0


STRATEGIES = ("sequential", "single", "fastest", "longest-context", "fewest-devices")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_machine_with_only_a_disk_is_refused(strategy, profile):
    disk = "disk: {memory: 1TiB, bandwidth: 6GB/s}"
    offload = "{" + f"strategy: {strategy}, offload: {{folder: ./offload}}" + "}"
    profile.write_text(PROFILE.replace("cuda:0: rtx-4090", disk).replace("{strategy: fastest}", offload))
    done = CliRunner().invoke(
        devmap, ["compile", "profile.yaml", "--dry-run", "--format", "json"], standalone_mode=False
    )
    assert [found["code"] for found in json.loads(done.stdout)["diagnostics"]] == ["unlisted-device"]
    [row], code = fit("disk:1TiB")
    assert (row["fits"], row["reason"], code) == (False, "cpu is not a device of the profile", 1)


def test_fit_on_a_machine_file_equals_a_profile_with_this_machine(profile):
    profile.write_text(PROFILE.replace("hardware: {devices: {cuda:0: rtx-4090}}\n", SMALL_BOX))
    [row], _ = fit("box.yaml")
    compiled = CliRunner().invoke(
        devmap, ["compile", "profile.yaml", "--no-simulate", "--format", "json"], standalone_mode=False
    )
    assert json.loads(compiled.stdout)["plan"]["devices"] == row["devices"]


def test_fit_reads_machine_files_that_extend_others_and_have_ranges():
    Path("base.yaml").write_text('hardware: {devices: {"cuda:[0-3]": rtx-4090}}\n')
    Path("more.yaml").write_text("extends: [base.yaml]\nhardware: {devices: {cuda:1: null, cpu: {memory: 8GiB}}}\n")
    [row], _ = fit("more.yaml")
    assert [device["id"] for device in row["devices"]] == ["cuda:0", "cuda:2", "cuda:3", "cpu"]


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ("h1000", "did you mean `h100-sxm`?"),
        ("2xrtx-4090+64GB/s", "`64GB/s` is not a part of a machine"),
        ("2x24G", "write `24GiB` or `24GB`"),
        ("24", "write `24GiB`"),
        ("rtx-4090+cpu", "write `cpu:64GiB`"),
        ("rtx-4099+cpu", "(did you mean `rtx-4090`?); it does not say how much memory its cpu has: write `cpu:64GiB`"),
        ("box.json", "a file that describes one is YAML"),
        ("missing.yaml", "`missing.yaml` does not exist = help"),
        ("wrong.yaml", "did you mean `memory`?"),
    ],
)
def test_an_invalid_machine_is_an_error(machine, said):
    Path("wrong.yaml").write_text("hardware: {devices: {cuda:0: {memry: 1GiB}}}\n")
    done = CliRunner().invoke(devmap, ["fit", "profile.yaml", "--on", machine], standalone_mode=False)
    message = done.exception.format_message() if done.exception else done.stderr
    assert said in " ".join(message.split())
    assert done.return_value in (2, None)


def test_an_error_of_the_profile_is_not_attributed_to_the_machine(profile):
    profile.write_text(PROFILE.replace("fastest}", "fastest, pins: [{match: lm_haed, device: cuda:0}]}"))
    rows, code = fit("h100-sxm,l4")
    assert (rows, code) == (None, 1)
    profile.write_text(PROFILE.replace("fastest}", "fastest, pins: [{match: lm_head, device: cuda:1}]}"))
    rows, code = fit("h100-sxm,2xl4")
    assert ([row["fits"] for row in rows], code) == ([False, True], 0)


CARDS = """\
hardware:
  devices: {"cuda:[0-1]": {memory: 16MiB, bandwidth: 100MB/s, flops: 1TFLOP/s}}
  links: {host: 25GB/s, peer: PEER}
"""

PART_ON_CPU = """\
hardware:
  devices: {cuda:0: {memory: 400KiB, bandwidth: 1TB/s, flops: 9TFLOP/s}, cpu: {memory: 8MiB, bandwidth: 500GB/s}}
  links: {host: 100MB/s}
"""


def plan_of(text):
    """Return the plan that a profile compiles to."""
    Path("other.yaml").write_text(text)
    done = CliRunner().invoke(
        devmap, ["compile", "other.yaml", "--no-simulate", "--dry-run", "--format", "json"], standalone_mode=False
    )
    return json.loads(done.stdout)["plan"]


def test_fit_suggests_vllm_for_equal_cards_that_can_split_layers(profile):
    Path("cards.yaml").write_text(CARDS.replace("PEER", "25GB/s"))
    [row], _ = fit("cards.yaml")
    other = row["other_engine"]
    assert (other["name"], other["settings"]["placement"]) == ("vLLM", {"groups": ["cuda:[0-1]"]})
    # The settings, once they are written, give what was promised.
    settings = {"targets": ["vllm"], "placement": {"strategy": "fastest", **other["settings"]["placement"]}}
    machine = CARDS.replace("PEER", "25GB/s")
    made = plan_of(f"{PROFILE.partition('hardware')[0]}{machine}{json.dumps(settings)[1:-1]}\n".replace('], "', ']\n"'))
    assert made["pipeline"] == other["pipeline"]
    assert made["prediction"] == other["prediction"]
    said = " ".join(shown("cards.yaml").split())
    assert 'cards.yaml suits vLLM better, by `targets: [vllm]` and `groups: ["cuda:[0-1]"]`' in said
    assert f"a cache of {16 * made['pipeline']['blocks']:,} tokens" in said
    # Where they reach each other slowly, sharing takes longer than one card after the other.
    Path("cards.yaml").write_text(CARDS.replace("PEER", "100kB/s"))
    [row], _ = fit("cards.yaml")
    assert (row["fits"], row["other_engine"]) == (True, None)


def test_fit_suggests_no_other_engine_if_one_card_holds_the_model():
    rows, _ = fit("h100-sxm,2x24GiB")
    assert [row["other_engine"] for row in rows] == [None, None]
    assert "suits" not in shown("h100-sxm,2x24GiB")


def test_fit_suggests_vllm_for_several_hosts():
    Path("hosts.yaml").write_text(
        "hardware: {hosts: {a: {devices: {cuda:0: rtx-4090}, network: 1GB/s}, b: {devices: {cuda:0: rtx-4090}}}}\n"
    )
    [row], code = fit("hosts.yaml")
    assert (row["fits"], row["other_engine"]["settings"], code) == (False, {"targets": ["vllm"]}, 1)
    assert "all layers on a/cuda:0" in row["other_engine"]["reason"]


def test_fit_suggests_transformers_with_offloading_if_vllm_has_no_room(profile):
    profile.write_text(
        PROFILE.replace("64}", "64, concurrency: 2}").replace("placement: {strategy: fastest}", "targets: [vllm]")
    )
    Path("small.yaml").write_text(SMALL_BOX.replace("[0-1]", "0"))
    [row], code = fit("small.yaml")
    other = row["other_engine"]
    assert (row["fits"], other["name"], code) == (False, "transformers", 1)
    assert other["settings"] == {"targets": ["transformers"], "workload": {"batch_size": 2}}
    text = PROFILE.replace("64}", "64, batch_size: 2}").partition("hardware")[0]
    made = plan_of(f"{text}{SMALL_BOX.replace('[0-1]', '0')}placement: {{strategy: fastest}}\n")
    assert made["prediction"] == other["prediction"]
    assert "are copied to cuda:0 at every forward" in other["reason"]


def test_fit_suggests_llama_cpp_for_experts_computed_on_the_cpu(profile):
    profile.write_text(PROFILE.replace("llama", "mixture"))
    Path("box.yaml").write_text(PART_ON_CPU)
    [row], _ = fit("box.yaml")
    other = row["other_engine"]
    assert (other["name"], other["prediction"]) == ("llama.cpp", row["prediction"])
    assert other["flags"][:4] == ["--fit", "off", "--device", "CUDA0"]
    assert "experts" in other["reason"]
    assert any("=CPU" in flag for flag in other["flags"])
    # Its names of another model are not known.
    config = json.loads(Path("mixture/config.json").read_text())
    Path("mixture/config.json").write_text(
        json.dumps({**config, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]})
    )
    [row], _ = fit("box.yaml")
    assert (row["fits"], row["other_engine"]) == (True, None)
