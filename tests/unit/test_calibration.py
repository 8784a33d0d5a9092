"""Calibration recovers the rates that made the times of receipts, and refuses receipts that cannot be fitted."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from devmap_config.cli.calibrate import calibrate, hardware_block
from devmap_config.compiler import Request, run_pipeline
from devmap_config.devices import CPU, DISK, Device
from devmap_config.execution.segments import Copy, MachineRates, ModuleWork, Segment
from devmap_config.hardware.inventory import Inventory, InventoryDevice, InventoryLink
from devmap_config.plan.prediction import amounts
from devmap_config.runner.calibration import calibrate as fit
from devmap_config.runner.calibration import read_receipt
from devmap_config.runner.receipts import RECEIPT_VERSION

CARD = Device.from_text("cuda:0")


def machine(bandwidth, flops, dispatch, *, host=10, unpinned=5, disk=2):
    """Return a CPU, a card ten times as fast, and a disk; rates in G a second."""
    rates = {"memory_bytes": 2**36, "capacity_bytes": 2**36}
    devices = (
        InventoryDevice(
            id=CARD, bandwidth_bytes_per_second=bandwidth * 10**10, flops_per_second=flops * 10**10, **rates
        ),
        InventoryDevice(id=CPU, bandwidth_bytes_per_second=bandwidth * 10**9, flops_per_second=flops * 10**9, **rates),
        InventoryDevice(id=DISK, **rates),
    )
    link = InventoryLink(bytes_per_second=host * 10**9, unpinned_bytes_per_second=unpinned * 10**9)
    reading = InventoryLink(bytes_per_second=disk * 10**9)
    links = {
        **dict.fromkeys(((CPU, CARD), (CARD, CPU)), link),
        **dict.fromkeys(((CPU, DISK), (DISK, CPU), (CARD, DISK), (DISK, CARD)), reading),
    }
    return Inventory(devices, links, dispatch)


def forward(device, layers, width, tokens, copies=()):
    """Return the operations and bytes of a dense model's forward: some layers, and next to nothing outside."""
    step = ModuleWork(2 * width * width, 2 * tokens * width * width, launches=4)
    layer = Segment(Counter({(device, step): 4}), Counter({device: 60}), list(copies))
    return [(layer, layers), (Segment(dispatches=Counter({device: 76})), 1)]


def receipt(truth, believed, phases, **changes):
    """Return a receipt of runs with the times that they would have on the true machine."""
    predicted, seconds = ({}, {"prompt_tokens": 64, "new_tokens": 8})
    written = {}
    for phase, segments in phases.items():
        nanoseconds = [
            sum(count * MachineRates(each, phase).nanoseconds(segment) for segment, count in segments)
            for each in (believed, truth)
        ]
        predicted["decode_nanoseconds_per_token" if phase == "decode" else "prefill_nanoseconds"] = nanoseconds[0]
        seconds["decode_seconds_per_token" if phase == "decode" else "prefill_seconds"] = nanoseconds[1] / 1e9
        written[phase] = [{"count": count, **segment.to_json()} for segment, count in segments]
    seconds = {"decode_seconds_per_token": None, "prefill_seconds": None, **seconds}
    case = {"compiled": False, "predicted": {"prediction": predicted}, "forward": written, "generation": seconds}
    return {
        "receipt_version": RECEIPT_VERSION,
        "machine": {"processor": "a CPU", "threads": 2},
        "devices": {},
        "dtype": "bfloat16",
        "versions": {"torch": "2.13.0"},
        "inventory": {**believed.to_json(), "dispatch_nanoseconds": believed.dispatch_nanoseconds},
        "cases": [case],
        **changes,
    }


TRUTH, BELIEVED = machine(12, 300, 3400), machine(10, 200, 3000)
SIZES = ((8, 256), (16, 1024), (24, 2048), (12, 512))


def dense(layers, width, device=CPU, copies=()):
    return {
        phase: forward(device, layers, width, {"decode": 1, "prefill": 64}[phase], copies)
        for phase in ("decode", "prefill")
    }


def written(folder, *receipts):
    paths = [folder / f"{place}.json" for place in range(len(receipts))]
    for path, value in zip(paths, receipts, strict=True):
        path.write_text(json.dumps(value))
    return paths


def fitted(folder, *receipts):
    return fit([read_receipt(path) for path in written(folder, *receipts)])


def test_calibration_recovers_the_rates_of_a_cpu(tmp_path):
    found = fitted(tmp_path, *(receipt(TRUTH, BELIEVED, dense(*size)) for size in SIZES))
    cpu = found.inventory.devices[1]
    assert cpu.bandwidth_bytes_per_second == pytest.approx(12 * 10**9, rel=0.01)
    assert cpu.flops_per_second == pytest.approx(300 * 10**9, rel=0.01)
    assert found.inventory.dispatch_nanoseconds == pytest.approx(3400, rel=0.01)
    assert all(
        each.after_nanoseconds == pytest.approx(each.run.measured_nanoseconds, rel=0.01) for each in found.residuals
    )
    assert all(99 <= spread.least_percent <= spread.most_percent <= 101 for spread in found.spreads.values())
    assert set(found.spreads) == {"decode", "prefill"}


def test_the_spread_is_computed_from_runs_left_out_of_the_fit(tmp_path):
    """One token takes a third longer than all others predict; included in the fit, it would be half as far off."""
    receipts = [receipt(TRUTH, BELIEVED, dense(*size)) for size in SIZES]
    receipts[1]["cases"][0]["generation"]["decode_seconds_per_token"] *= 1.33
    found = fitted(tmp_path, *receipts)
    [odd] = [each for each in found.residuals if each.run.receipt.endswith("1.json") and each.run.phase == "decode"]
    assert odd.run.measured_nanoseconds / odd.left_out_nanoseconds == pytest.approx(1.33, rel=0.01)
    assert 1 < odd.run.measured_nanoseconds / odd.after_nanoseconds < 1.25
    assert found.spreads["decode"].most_percent >= 132


def test_calibration_recovers_a_cards_rates_hidden_behind_the_host(tmp_path):
    """The prior rates make the host the limit of every token; truly it limits only the small models."""
    truth, believed = machine(12, 300, 3000, unpinned=7), machine(14, 250, 900_000)
    sizes = ((8, 256), (16, 4096), (24, 8192), (12, 6144))
    copied = Copy(CPU, CARD, 10**8)
    whole = [receipt(truth, believed, dense(*size, CARD)) for size in sizes]
    streamed = receipt(truth, believed, dense(16, 4096, CARD, [copied]))
    found = fitted(tmp_path, *whole, streamed)
    card, link = found.inventory.devices[0], found.inventory.links[CPU, CARD]
    assert card.bandwidth_bytes_per_second == pytest.approx(12 * 10**10, rel=0.01)
    assert card.flops_per_second == pytest.approx(300 * 10**10, rel=0.01)
    assert found.inventory.dispatch_nanoseconds == pytest.approx(3000, rel=0.01)
    assert link.unpinned_bytes_per_second == pytest.approx(7 * 10**9, rel=0.01)
    assert link.bytes_per_second == 10 * 10**9  # on which no time depends
    assert set(hardware_block(found)["links"]) == {"unpinned"}


def test_links_are_fitted_and_printed_as_in_a_profile(tmp_path):
    """Weights copied ahead take the time of their link: from the CPU, and from the disk through it."""
    truth = replace(machine(12, 300, 3000, host=20, disk=3), together_bytes_per_second=30 * 10**9)
    believed = replace(machine(12, 300, 3000), together_bytes_per_second=15 * 10**9)
    from_cpu, from_disk = Copy(CPU, CARD, 10**8, is_pinned=True), Copy(DISK, CPU, 10**8)
    receipts = []
    for together in ([(from_cpu,)], [(from_disk, from_cpu)]):
        [(layer, count), outside] = forward(CARD, 16, 1024, 1)
        segments = [(replace(layer, ahead=together), count), outside]
        receipts.append(receipt(truth, believed, {"decode": segments}))
    links = hardware_block(fitted(tmp_path, *receipts))["links"]
    assert links == {"together": "30.0GB/s calibrated", "host": "20.0GB/s calibrated", "disk": "3.00GB/s calibrated"}


def test_one_receipt_fits_two_factors_and_says_so(tmp_path):
    found = fitted(tmp_path, receipt(TRUTH, BELIEVED, dense(16, 1024)))
    assert [[str(name) for name in group] for group in found.groups] == [
        ["cpu flops"],
        ["cpu bandwidth", "host dispatch"],
    ]
    assert all(
        each.after_nanoseconds == pytest.approx(each.run.measured_nanoseconds, rel=0.01) for each in found.residuals
    )
    assert found.spreads == {}


def test_one_time_fits_one_factor(tmp_path):
    phases = {"decode": dense(16, 1024)["decode"]}
    found = fitted(tmp_path, receipt(TRUTH, BELIEVED, phases))
    assert [len(group) for group in found.groups] == [3]


@pytest.mark.parametrize("map", ["cuda:0", "cpu"])
def test_fitted_amounts_are_those_of_the_plan(workspace, map):
    Path("p.yaml").write_text(
        "version: 1\nmodel: {source: llama}\nworkload: {context_length: 64}\n"
        "hardware: {devices: {cuda:0: rtx-4090, cpu: {memory: 9GiB, bandwidth: 9GB/s, flops: 1TFLOP/s}}}\n"
        f"placement: {{strategy: manual, device_map: {{'model': 'cuda:0', 'lm_head': '{map}'}}}}\n"
    )
    compiled = run_pipeline(Request(path=Path("p.yaml")))
    for phase, name in (("decode", "decode_nanoseconds_per_token"), ("prefill", "prefill_nanoseconds")):
        told = json.loads(json.dumps(amounts(compiled.plan, compiled.graph, compiled.inventory, phase)))
        rates = MachineRates(Inventory.from_json(compiled.inventory.to_json()), phase)
        times = [each["count"] * rates.nanoseconds(Segment.from_json(each)) for each in told]
        assert sum(times) == getattr(compiled.plan.prediction, name)


def run(*arguments):
    return CliRunner().invoke(calibrate, list(map(str, arguments)), standalone_mode=False, catch_exceptions=False)


def test_calibrate_prints_yaml_that_a_machine_can_extend(tmp_path, workspace):
    paths = written(Path(), *(receipt(TRUTH, BELIEVED, dense(*size)) for size in SIZES))
    done = run(*paths)
    assert done.return_value == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    block = yaml.safe_load(done.stdout)["hardware"]
    assert set(block.pop("spread")) == {"decode", "prefill"}
    assert block == {
        "devices": {"cpu": {"bandwidth": "12.0GB/s calibrated", "flops": "300GFLOP/s calibrated"}},
        "host": {"dispatch": "3.4us calibrated"},
    }
    Path("fitted.yaml").write_text(done.stdout)
    Path("p.yaml").write_text(
        "version: 1\nextends: [machine.yaml, fitted.yaml]\nmodel: {source: llama}\n"
        "workload: {context_length: 64}\nplacement: {strategy: fastest}\n"
    )
    Path("machine.yaml").write_text("hardware: {devices: {cpu: {memory: 9GiB, bandwidth: 9GB/s measured}}}\n")
    compiled = run_pipeline(Request(path=Path("p.yaml")))
    assert compiled.inventory.devices[0].bandwidth_bytes_per_second == 12 * 10**9


def test_json_has_the_factors_and_every_run(tmp_path):
    paths = written(tmp_path, *(receipt(TRUTH, BELIEVED, dense(*size)) for size in SIZES))
    value = json.loads(run(*paths, "--format", "json").stdout)
    assert [each["factor"] for each in value["factors"]] == pytest.approx([1.5, 1.2, 3000 / 3400], rel=0.01)
    assert len(value["runs"]) == 8
    assert all(
        each["left_out_nanoseconds"] == pytest.approx(each["measured_nanoseconds"], rel=0.01) for each in value["runs"]
    )


def test_rates_of_another_dtype_are_written_under_it(tmp_path):
    paths = written(tmp_path, *(receipt(TRUTH, BELIEVED, dense(*size), dtype="float32") for size in SIZES))
    assert set(yaml.safe_load(run(*paths).stdout)["hardware"]["devices"]["cpu"]) == {"dtypes"}


REFUSED = {
    "another machine": (
        {"machine": {"processor": "a CPU", "threads": 4}},
        "not of the same machine: 2 of a CPU, 2 threads and 1 of a CPU, 4 threads",
    ),
    "another dtype": ({"dtype": "float32"}, "not of the same dtype: 2 of bfloat16 and 1 of float32"),
    "earlier": ({"receipt_version": 1}, "does not say what a forward does: an earlier devmap-config wrote it"),
    "newer": ({"receipt_version": RECEIPT_VERSION + 1}, "was written by a newer devmap-config"),
    "nothing timed": ({"cases": []}, "has no time that was predicted and measured"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_receipts_that_cannot_be_fitted_together_are_refused(tmp_path, changes, message):
    phases = dense(16, 1024)
    changed = [changes, {}, {}]
    done = run(*written(tmp_path, *(receipt(TRUTH, BELIEVED, phases, **each) for each in changed)))
    assert done.return_value == 1
    assert "error[unfit-receipts]" in done.stderr
    assert message in " ".join(done.stderr.split())
    assert f"{tmp_path}/0.json" in "".join(done.stderr.split())  # the one that is not as the others
    assert f"{tmp_path}/1.json" not in "".join(done.stderr.split())
    assert done.stdout == ""


def test_a_rate_used_by_one_receipt_is_fitted_with_the_others(tmp_path):
    """Profiles of one machine name its disk only if a model is too large for the memory."""
    [whole, *others] = SIZES
    alone = Inventory(BELIEVED.devices[1:2], {}, BELIEVED.dispatch_nanoseconds)
    reading = dense(*whole, copies=[Copy(DISK, CPU, 10**8)])
    truth = replace(
        TRUTH, links={pair: replace(each, bytes_per_second=3 * 10**9) for pair, each in TRUTH.links.items()}
    )
    receipts = [receipt(truth, BELIEVED, reading), *(receipt(truth, alone, dense(*size)) for size in others)]
    found = fitted(tmp_path, *receipts)
    assert found.inventory.links[DISK, CPU].bytes_per_second == pytest.approx(3 * 10**9, rel=0.01)
    assert found.inventory.devices[1].bandwidth_bytes_per_second == pytest.approx(12 * 10**9, rel=0.01)
    believed = [each.left_out_nanoseconds for each in found.residuals if each.run.receipt.endswith("0.json")]
    assert all(time is not None for time in believed)  # without it, the disk is as fast as it was believed to be


def test_receipts_of_compiled_code_are_refused(tmp_path):
    value = receipt(TRUTH, BELIEVED, dense(16, 1024))
    value["cases"][0]["compiled"] = True
    done = run(*written(tmp_path, value))
    assert (done.return_value, "is of compiled code" in " ".join(done.stderr.split())) == (1, True)


def test_shipped_receipts_of_an_earlier_version_are_refused():
    from devmap_config.runner.receipts import FOLDER

    done = run(FOLDER / "llama-3.1-8b.json")
    assert (done.return_value, "an earlier devmap-config wrote it" in " ".join(done.stderr.split())) == (1, True)


@pytest.mark.parametrize("value", [-1, "9", [1], float("inf"), pytest.param(10**400, id="long")])
@pytest.mark.parametrize("where", ["rate", "link", "dispatch", "step", "count", "time"])
def test_an_impossible_amount_in_a_receipt_is_an_error(tmp_path, where, value):
    written_of = receipt(TRUTH, BELIEVED, dense(16, 1024))
    [case] = written_of["cases"]
    segment = case["forward"]["decode"][0]
    holder, key = {
        "rate": (written_of["inventory"]["devices"][1], "bandwidth_bytes_per_second"),
        "link": (written_of["inventory"]["links"]["cpu-cuda:0"], "bytes_per_second"),
        "dispatch": (written_of["inventory"], "dispatch_nanoseconds"),
        "step": (segment["steps"][0], 2),
        "count": (segment, "count"),
        "time": (case["generation"], "decode_seconds_per_token"),
    }[where]
    holder[key] = value
    done = run(*written(tmp_path, written_of))
    assert (done.return_value, "is not a receipt" in " ".join(done.stderr.split())) == (2, True)


@pytest.mark.parametrize("text", [None, "{", "{}", "[1]", '{"receipt_version": 2, "cases": [1]}'])
def test_a_file_that_is_no_receipt_is_an_error(tmp_path, text):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    assert run(path).return_value == 2
