"""`probe --against` reports every reason why a machine cannot run a locked plan, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config.cli.compile import compile_command
from devmap_config.cli.probe import probe as probe_command
from devmap_config.devices import Device
from devmap_config.plan.lock import read_lock
from devmap_config.plan.readiness import demands, differences, kind_needed
from devmap_config.probe import probe as probe_module
from devmap_config.probe.machine import SeenAccelerator, SeenDisk, SeenHost, SeenMachine

GIB = 2**30

PROFILE = """\
version: 1
model: {source: llama}
hardware:
  devices:
    cuda:0: {accelerator: rtx-4090}
    cuda:1: {memory: 24GiB}
    cuda:2: {memory: 24GiB}
    cpu: {memory: 1GiB}
    disk: {memory: 1GiB}
placement:
  strategy: single
  pins:
    - {match: "model.layers.1", device: cuda:1}
    - {match: "model.layers.2", device: cpu}
    - {match: "model.layers.3", device: disk}
  offload: {folder: offload}
"""

CARDS = tuple(
    SeenAccelerator(
        id=Device("cuda", index),
        name=f"card {index}",
        memory_bytes=24 * GIB,
        free_bytes=23 * GIB,
        accelerator=accelerator,
    )
    for index, accelerator in enumerate(("rtx-4090", None))
)

MACHINE = SeenMachine(
    accelerators=CARDS,
    host=SeenHost(memory_bytes=8 * GIB, available_bytes=6 * GIB, threads=2),
    disk=SeenDisk(memory_bytes=100 * GIB, free_bytes=50 * GIB),
)


@pytest.fixture
def lock(workspace):
    Path("profile.yaml").write_text(PROFILE)
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    return read_lock(Path("profile.lock.json").read_text())


def with_card(index, **more):
    cards = list(CARDS)
    cards[index] = replace(cards[index], **more)
    return replace(MACHINE, accelerators=tuple(cards))


def codes(lock, seen, **more):
    return [(each.severity, each.code) for each in differences(lock, seen, **more)]


def test_a_machine_with_enough_of_everything_fits(lock):
    assert differences(lock, MACHINE) == ()
    assert kind_needed(lock) == "cuda"


def test_the_demands_of_a_lock_by_device(lock):
    wanted = {str(each.device): each for each in demands(lock, MACHINE)}
    assert list(wanted) == ["cuda:0", "cuda:1", "cpu", "disk"]
    weights = {use["id"]: use["weights_bytes"] for use in lock.plan["devices"]}
    assert wanted["cuda:1"].needed_bytes == weights["cuda:1"]
    assert wanted["cuda:0"].context_bytes == lock.hardware["cuda:0"]["overhead_bytes"] > 0
    assert wanted["cuda:1"].context_bytes == 0


def test_missing_devices_are_reported_together(lock):
    [finding] = differences(lock, replace(MACHINE, accelerators=()))
    assert finding.code == "device-missing"
    assert finding.message == "the plan uses cuda:0, cuda:1, and the number of cuda devices of this machine is 0"


def test_another_kind_of_accelerator_is_an_error(lock):
    other = SeenAccelerator(id=Device("xpu", 0), name="Arc", memory_bytes=GIB)
    [finding] = differences(lock, replace(MACHINE, accelerators=(other,)))
    assert (finding.severity, finding.code) == ("error", "other-accelerators")
    assert finding.message == "the plan is for cuda devices, and this machine has xpu:0"


def test_another_card_is_a_warning(lock):
    [finding] = differences(lock, with_card(0, accelerator="rtx-3090"))
    assert (finding.severity, finding.code) == ("warning", "another-card")
    assert finding.message == "cuda:0 is rtx-3090, and the plan was made for rtx-4090"


def needed(lock, device):
    demand = next(each for each in demands(lock, MACHINE) if str(each.device) == device)
    return demand.needed_bytes + demand.context_bytes


@pytest.mark.parametrize("device", [0, 1])
def test_memory_of_accelerators_is_compared_to_the_byte(lock, device):
    enough = needed(lock, f"cuda:{device}")
    assert codes(lock, with_card(device, memory_bytes=enough, free_bytes=enough)) == []
    assert codes(lock, with_card(device, memory_bytes=enough - 1, free_bytes=enough - 1)) == [
        ("error", "too-little-memory")
    ]
    assert codes(lock, with_card(device, free_bytes=enough - 1)) == [("error", "memory-held")]


def test_an_existing_context_is_not_counted_twice(lock):
    free_bytes = needed(lock, "cuda:0") - lock.hardware["cuda:0"]["overhead_bytes"]
    assert codes(lock, with_card(0, free_bytes=free_bytes)) == [("error", "memory-held")]
    assert codes(lock, with_card(0, free_bytes=free_bytes, has_context=True)) == []


def test_unknown_memory_is_not_compared(lock):
    assert codes(lock, with_card(0, memory_bytes=None, free_bytes=None)) == []


def test_memory_of_the_cpu_is_compared_to_the_byte(lock):
    enough = needed(lock, "cpu")

    def host(memory_bytes, available_bytes):
        return replace(MACHINE, host=SeenHost(memory_bytes=memory_bytes, available_bytes=available_bytes, threads=2))

    assert codes(lock, host(enough, enough)) == []
    assert codes(lock, host(enough - 1, enough - 1)) == [("error", "too-little-memory")]
    assert codes(lock, host(8 * GIB, enough - 1)) == [("error", "memory-held")]


def test_free_disk_is_compared_to_the_byte(lock):
    enough = needed(lock, "disk")

    def disk(free_bytes):
        return replace(MACHINE, disk=SeenDisk(memory_bytes=100 * GIB, free_bytes=free_bytes))

    assert codes(lock, disk(enough)) == []
    assert codes(lock, disk(enough - 1)) == [("error", "too-little-disk")]
    assert codes(lock, disk(enough - 1), disk_may_be_read_in_place=True) == [("warning", "too-little-disk")]


def test_all_reasons_are_reported_at_once(lock):
    seen = replace(
        with_card(0, free_bytes=0),
        host=SeenHost(memory_bytes=1, available_bytes=1, threads=1),
        disk=SeenDisk(memory_bytes=1, free_bytes=0),
    )
    assert [code for _, code in codes(lock, seen)] == ["memory-held", "too-little-memory", "too-little-disk"]


def test_an_older_lock_is_compared_without_contexts(lock):
    older = replace(lock, hardware={})  # locks had none at first
    assert {each.context_bytes for each in demands(older, MACHINE)} == {0}
    assert codes(older, with_card(0, accelerator="rtx-3090")) == []


def test_a_lock_keeps_the_accelerators_of_profile_and_catalogue(lock):
    assert read_lock(lock.to_text()) == lock
    assert list(lock.hardware) == ["cuda:0", "cuda:1", "cuda:2"]
    assert lock.hardware["cuda:0"]["accelerator"] == "rtx-4090"
    assert lock.hardware["cuda:1"] == {"accelerator": None, "memory_bytes": 24 * GIB, "overhead_bytes": 0}


def run(monkeypatch, seen, *arguments):
    monkeypatch.setattr(probe_module, "probe_machine", lambda environment, disk, **more: seen)
    return CliRunner().invoke(probe_command, ["--against", *arguments], standalone_mode=False)


def test_probe_against_reports_that_the_machine_fits(lock, monkeypatch):
    done = run(monkeypatch, MACHINE, "profile.lock.json")
    assert done.return_value == 0
    assert done.stdout.splitlines()[0] == "cuda:0 (card 0): 1.3 GiB needed, 24.0 GiB there, 23.0 GiB free now"
    assert done.stdout.splitlines()[-1] == "this machine can carry profile.lock.json"
    assert run(monkeypatch, MACHINE, "profile.yaml").stdout == done.stdout  # which names its lock


def test_probe_against_exits_with_4_and_names_the_lock(lock, monkeypatch):
    done = run(monkeypatch, replace(MACHINE, accelerators=()), "profile.lock.json", "--format", "json")
    value = json.loads(done.stdout)
    assert (done.return_value, value["fits"]) == (4, False)
    assert [(each["code"], each["file"]) for each in value["diagnostics"]] == [("device-missing", "profile.lock.json")]
    assert {each["id"]: each["is_there"] for each in value["needs"]} == {
        "cuda:0": False,
        "cuda:1": False,
        "cpu": True,
        "disk": True,
    }


def test_a_warning_does_not_change_the_exit_code(lock, monkeypatch):
    done = run(monkeypatch, with_card(0, accelerator="rtx-3090"), "profile.lock.json")
    assert done.return_value == 0
    assert "warning[another-card]" in done.stderr


def test_probe_against_a_missing_or_damaged_lock_is_an_error(lock, monkeypatch):
    missing = run(monkeypatch, MACHINE, "nothing.lock.json", "--format", "json")
    assert (missing.return_value, json.loads(missing.stdout)["diagnostics"][0]["code"]) == (2, "missing-file")
    Path("profile.lock.json").write_text(lock.to_text().replace("cuda:1", "cuda:2", 1))
    damaged = run(monkeypatch, MACHINE, "profile.lock.json", "--format", "json")
    assert (damaged.return_value, json.loads(damaged.stdout)["diagnostics"][0]["code"]) == (3, "unreadable-lock")
