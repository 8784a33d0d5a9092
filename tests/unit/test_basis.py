"""Predicted times state the basis of the rates that they use: stated, measured, or calibrated."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from conftest import REPOSITORY

from devmap_config.cli import devmap
from devmap_config.compiler import Request, run_pipeline
from devmap_config.hardware.constants import SPREADS
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import time_bases
from devmap_config.profile.quantities import Spread
from devmap_config.profile.schema import Hardware
from devmap_config.profile.writing import device_text, link_lines
from devmap_config.runner.receipts import FOLDER

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware: {HARDWARE}
placement: {strategy: STRATEGY}
"""
CPU = "devices: {cpu: {memory: 9GiB, bandwidth: 9GB/s READ, flops: 90GFLOP/s COMPUTED}}, host: {dispatch: 4us GIVEN}"


def compiled(hardware, strategy="fastest"):
    Path("p.yaml").write_text(PROFILE.replace("HARDWARE", hardware).replace("STRATEGY", strategy))
    return run_pipeline(Request(path=Path("p.yaml")))


def cpu(read="", computed="", given=""):
    return CPU.replace("READ", read).replace("COMPUTED", computed).replace("GIVEN", given)


def rates_of(hardware, strategy="fastest"):
    found = compiled(hardware, strategy)
    return {phase: each.rates for phase, each in time_bases(found.plan, found.graph, found.inventory).items()}


@pytest.mark.parametrize(
    ("hardware", "basis"),
    [
        (cpu(), "stated"),
        (cpu("measured", "measured", "measured"), "measured"),
        (cpu("measured", "measured"), "stated"),
        (cpu("measured", "", "measured"), "stated"),
        (cpu("calibrated", "calibrated", "calibrated"), "calibrated"),
        (cpu("calibrated", "measured", "calibrated"), "measured"),
        (cpu("measured", "measured", "measured").partition(", host")[0], "stated"),
    ],
)
def test_the_basis_of_a_time_is_that_of_its_weakest_rate(workspace, hardware, basis):
    assert rates_of(hardware) == {"decode": basis, "prefill": basis}


def test_a_link_counts_only_if_something_crosses_it(workspace):
    card = "cuda:0: {memory: 9GiB, bandwidth: 9GB/s measured, flops: 9TFLOP/s measured}, cpu: {memory: 9GiB}"
    machine = f"devices: {{{card}}}, host: {{dispatch: 9us measured}}, links: {{host: 9GB/s"
    head_on_cpu = "manual, device_map: {model: cuda:0, lm_head: cpu}"
    assert rates_of(machine + "}")["decode"] == "measured"
    assert rates_of(machine + "}", head_on_cpu)["decode"] == "stated"
    assert rates_of(machine + " measured}", head_on_cpu)["decode"] == "measured"


def test_measured_rates_are_not_reduced_by_the_catalogues_efficiency(workspace):
    card = "devices: {cuda:0: {accelerator: rtx-4090, bandwidth: 800GB/sWORD}}"
    stated, measured = (compiled(card.replace("WORD", word)).inventory for word in ("", " measured"))
    assert stated.devices[0].reached("bandwidth_bytes_per_second") == 640 * 10**9
    assert measured.devices[0].reached("bandwidth_bytes_per_second") == 800 * 10**9
    flops = [each.devices[0].reached("flops_per_second") for each in (stated, measured)]
    assert flops[0] == flops[1]
    assert stated.to_json() != measured.to_json()


def test_a_lock_does_not_depend_on_the_basis_of_rates(workspace):
    from devmap_config.plan.inputs import inputs_of

    said = [inputs_of(compiled(hardware)).to_json() for hardware in (cpu(), cpu("measured", "calibrated", "measured"))]
    assert said[0] == said[1]


def test_the_basis_of_stages_is_the_weakest_rate_of_devices_and_links(workspace):
    card = "memory: 1GiB, flops: 9TFLOP/s measured, bandwidth: 9GB/s"
    machine = f"devices: {{cuda:0: {{{card} measured}}, cuda:1: {{{card} READ}}}}, links: {{peer: 9GB/s LINK}}"
    for read, link, basis in (("", "", "stated"), ("measured", "measured", "measured"), ("measured", "", "stated")):
        text = PROFILE.replace("HARDWARE", machine.replace("READ", read).replace("LINK", link))
        pins = "[{match: 'model.layers.[0-2]', device: 'cuda:0'}, {match: 'model.layers.[3-5]', device: 'cuda:1'}]"
        text = text.replace("STRATEGY", f"fastest, pins: {pins}")
        Path("p.yaml").write_text(text + "targets: [vllm]\n")
        found = run_pipeline(Request(path=Path("p.yaml")))
        assert len(found.plan.pipeline.stages) == 2
        assert {phase: each.rates for phase, each in found.time_bases.items()} == dict.fromkeys(
            ("decode", "prefill"), basis
        )
        assert f"these times rest on {basis} rates; of vLLM no run was seen" in run("compile", "p.yaml", "--dry-run")


def said_by_diff(*sides):
    found = json.loads(run("diff", *sides, "--format", "json"))["diff"]["basis"]
    return found["decode"]["before"], found["decode"]["after"], run("diff", *sides).splitlines()[-1]


def test_diff_states_the_basis_of_both_plans(workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    measured = cpu("measured", "measured", "measured").replace("90G", "99G")
    for name, hardware in (("own.yaml", cpu()), ("seen.yaml", measured), ("plain.yaml", cpu().partition(", host")[0])):
        compiled(hardware)
        Path("p.yaml").rename(name)
        run("compile", name, "-q", "--no-simulate")
    assert said_by_diff("own.yaml", "seen.yaml") == (
        "stated",
        "measured",
        "the times before rest on stated rates, the times after rest on measured rates",
    )
    assert said_by_diff("plain.yaml", "own.yaml")[2] == "these times rest on stated rates"
    # A lock holds no basis; but a rate that its profile does not give can only be stated.
    assert said_by_diff("plain.lock.json", "seen.yaml")[:2] == ("stated", "measured")
    before, _, said = said_by_diff("own.lock.json", "seen.yaml")
    assert before is None
    assert said.startswith("the times before rest on rates of which its lock does not say how they are known, the ")
    markdown = run("diff", "own.yaml", "seen.yaml", "--format", "markdown").splitlines()
    assert markdown[-1] == "The times before rest on stated rates, the times after rest on measured rates."


def test_the_basis_of_an_alternative_includes_both_places(workspace):
    card = "cuda:0: {memory: 9GiB, bandwidth: 9GB/s measured, flops: 9TFLOP/s measured}, cpu: {memory: 9GiB}"
    compiled(f"devices: {{{card}}}, host: {{dispatch: 9us measured}}, links: {{host: 9GB/s}}")
    told = json.loads(run("explain", "p.yaml", "lm_head", "--format", "json"))
    assert told["plan"]["basis"]["decode"]["rates"] == "measured"
    rates = {str(each["location"]): each["rates"] for each in told["alternatives"] if each["slower_nanoseconds"]}
    assert set(rates.values()) == {"stated"}  # all of them take the link
    assert told["explanation"][-1] == "These times rest on stated rates."


@pytest.mark.parametrize(
    ("rate", "help"),
    [("9GB/s measurd", "`9GB/s measured`"), ("9GB/s calibrate", "`9GB/s calibrated`"), ("9GB/s often", "`25GB/s`")],
)
def test_an_unknown_word_for_the_basis_of_a_rate_is_refused(workspace, rate, help):
    [found] = compiled(f"devices: {{cpu: {{memory: 9GiB, bandwidth: {rate}}}}}", "auto").diagnostics
    assert (found.code, help in found.help) == ("bad-quantity", True)


def test_a_written_machine_keeps_the_basis_of_its_rates():
    described = {
        "devices": {"cpu": {"memory": "9GiB", "bandwidth": "9GB/s measured", "flops": "90GFLOP/s"}},
        "links": {"host": "25GB/s calibrated", "disk": "2GB/s"},
        "host": {"dispatch": "4us measured"},
        "spread": {"decode": "90-120%"},
    }
    hardware = Hardware.model_validate(described)
    [cpu] = hardware.devices.value.values()
    assert device_text(cpu) == "{memory: 9GiB, bandwidth: 9GB/s measured, flops: 90GFLOP/s}"
    assert link_lines(hardware) == [
        "links:",
        "  host: 25GB/s calibrated",
        "  disk: 2GB/s",
        "host: {dispatch: 4000ns measured}",
        "spread: {decode: 90-120%}",
    ]


def run(*arguments):
    return CliRunner().invoke(devmap, arguments, standalone_mode=False, catch_exceptions=False).stdout


def test_a_plan_states_the_basis_of_its_times_and_the_spread_of_such_runs(workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    calibrated = cpu("calibrated", "calibrated", "calibrated") + ", spread: {decode: 90-120%}"
    plan = compiled(calibrated).plan
    shown = run("compile", "p.yaml", "--dry-run", "--no-simulate")
    assert max(map(len, shown.splitlines())) <= 80
    said = "hese times rest on calibrated rates; measured runs took 0.90 to 1.20 times the prediction for a token"
    assert f"t{said} " in " ".join(shown.split())
    told = json.loads(run("compile", "p.yaml", "--dry-run", "--no-simulate", "--format", "json"))["plan"]["basis"]
    token = plan.prediction.decode_nanoseconds_per_token
    assert told["decode"] == {
        "rates": "calibrated",
        "kind": None,
        "least_nanoseconds": token * 90 // 100,
        "most_nanoseconds": token * 120 // 100,
    }
    assert told["prefill"] == {
        "rates": "calibrated",
        "kind": None,
        "least_nanoseconds": None,
        "most_nanoseconds": None,
    }
    assert f"T{said}." in " ".join(run("explain", "p.yaml").split())


def test_the_spread_of_calibrated_rates_is_stated_only_for_them(workspace):
    found = compiled(cpu() + ", spread: {decode: 90-120%}")
    assert time_bases(found.plan, found.graph, found.inventory)["decode"].least_nanoseconds is None


def test_prefill_and_decode_can_have_different_bases(workspace):
    attention = ", attention: {decode: 9GFLOP/s measured, prefill: 90GFLOP/s}"
    hardware = cpu("measured", f"measured{attention}", "measured")
    Path("p.yaml").write_text(PROFILE.replace("llama}", "llama, dtype: bfloat16}").replace("HARDWARE", hardware))
    Path("p.yaml").write_text(Path("p.yaml").read_text().replace("STRATEGY", "fastest"))
    shown = run("compile", "p.yaml", "--dry-run", "--no-simulate")
    assert "a token rests on measured rates, a prefill rests on stated rates" in " ".join(shown.split())


ROW = re.compile(r"\| (?P<run>.*) \| (?P<phase>decode|prefill) \| (?P<predicted>[\d.]+) \| [\d.]+ \| [-+]\d+% \|")
RATIO = re.compile(r"\| .* \| (?P<phase>decode|prefill) \| [\d.]+ \| (?P<least>[\d.]+) to (?P<most>[\d.]+) \|")
PAGE = (REPOSITORY / "docs" / "fidelity.md").read_text(encoding="utf-8")
SECONDS = {"decode": "decode_seconds_per_token", "prefill": "prefill_seconds"}


def runs_on_cards():
    """Yield the kind and the phase of each run on cards with measured ÷ predicted; receipts count one by one."""
    predicted = {(row["run"], row["phase"]): float(row["predicted"]) for row in ROW.finditer(PAGE)}
    cases = {(path.stem, case["case"]): case for path in FOLDER.glob("*.json") for case in read_cases(path)}
    for run in yaml.safe_load((REPOSITORY / "benchmarks" / "published_runs.yaml").read_text(encoding="utf-8")):
        for phase, milliseconds in run["milliseconds"].items():
            receipts = [cases[receipt].get("generation")[SECONDS[phase]] for receipt in run.get("receipts", {}).items()]
            measured = [1000 * seconds for seconds in receipts] or [milliseconds]
            assert statistics.median(measured) == pytest.approx(milliseconds, rel=0.04)
            for each in measured:
                yield run.get("kind"), phase, each / predicted[run["name"], phase]


def runs_on_a_cpu():
    """Yield the same of the runs on a CPU with measured rates: of the page's table, and of `receipts/`."""
    for row in RATIO.finditer(PAGE):
        yield from ((None, row["phase"], 1 / float(row[end])) for end in ("least", "most"))
    for path in (REPOSITORY / "receipts").glob("*.json"):
        for case in read_cases(path):
            predicted, kind = case["predicted"], "torchao Int8WeightOnlyConfig" if "torchao" in case["case"] else None
            assert {basis["rates"] for basis in predicted["basis"].values()} == {"measured"}
            for phase in predicted["basis"]:
                nanoseconds = case["generation"][SECONDS[phase]] * 1e9
                yield kind, phase, nanoseconds / predicted["prediction"][OWN[phase]]


def read_cases(path):
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def test_no_run_is_outside_the_range_that_is_told_of_such_runs_nor_is_a_range_wider():
    seen = {}
    for rates, device, runs in (("stated", "cuda", runs_on_cards()), ("measured", "cpu", runs_on_a_cpu())):
        for kind, phase, ratio in runs:
            seen.setdefault((rates, device, kind), {}).setdefault(phase, []).append(100 * ratio)
    assert {
        kind: {phase: Spread(int(min(each)), -int(-max(each) // 1)) for phase, each in phases.items()}
        for kind, phases in seen.items()
    } == SPREADS
    for (rates, _, kind), phases in SPREADS.items():
        shown = [f"{each.least_percent} % to {each.most_percent} %" for each in (phases["decode"], phases["prefill"])]
        assert f"| {rates} | " in PAGE
        assert f" | {kind or 'dense weights'} | {' | '.join(shown)} | " in PAGE


def test_every_receipt_of_the_package_to_which_a_range_applies_is_among_these_runs():
    runs = yaml.safe_load((REPOSITORY / "benchmarks" / "published_runs.yaml").read_text(encoding="utf-8"))
    compared = {receipt for run in runs for receipt in run.get("receipts", {}).items()}
    for path in FOLDER.glob("*.json"):
        for case in read_cases(path):
            # What a plan computes on the CPU, plain transformers does not.
            is_on_cards = "failed" not in case and (not case["compute"] or case["by"].startswith("transformers"))
            assert ((path.stem, case["case"]) in compared) == is_on_cards


STATED_CARD = "devices: {cuda:0: {memory: 9GiB, bandwidth: 900GB/s, flops: 9TFLOP/s}}"
IN_4_BIT = "llama, dtype: bfloat16, quantization: {method: bitsandbytes, load_in_4bit: true, bnb_4bit_compute_dtype: "


@pytest.mark.parametrize(
    ("model", "cache", "said"),
    [
        (
            "llama",
            "dynamic",
            (
                "measured runs took 0.83 to 2.41 times the prediction for a token, 1.02 to 1.44 times for a"
                " prefill (always slower)"
            ),
        ),
        (
            "llama",
            "static",
            (
                "measured runs with `cache: static` took 0.37 to 0.38 times the prediction for a token"
                " (always faster), 1.10 to 1.14 times for a prefill (always slower)"
            ),
        ),
        (
            IN_4_BIT + "float32}",
            "dynamic",
            (
                "measured runs with bitsandbytes fp4 4 bit in float32 took 0.96 to 1.88 times"
                " the prediction for a token, 1.09 to 10.92 times for a prefill (always slower)"
            ),
        ),
        (
            IN_4_BIT + "bfloat16}",
            "dynamic",
            "no run with bitsandbytes fp4 4 bit in bfloat16 was compared with such a prediction",
        ),
        (
            IN_4_BIT + "float32}",
            "offloaded",
            "no run with bitsandbytes fp4 4 bit in float32 and `cache: offloaded` was compared with such a prediction",
        ),
    ],
)
def test_a_range_is_told_of_no_kind_of_runs_but_its_own(workspace, model, cache, said):
    text = PROFILE.replace("HARDWARE", STATED_CARD.replace("}}", "}, cpu: {memory: 9GiB}}, links: {host: 9GB/s}"))
    text = text.replace("STRATEGY", "single").replace("64}", f"64, cache: {cache}}}")
    Path("p.yaml").write_text(text.replace("source: llama", f"source: {model}"))
    shown = " ".join(run("compile", "p.yaml", "--dry-run", "--no-simulate").split())
    assert f"these times rest on stated rates; {said}" in shown
