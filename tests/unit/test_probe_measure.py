"""`devmap probe --measure`: memory and disk are really read; cards are measured in `on_simulated_accelerator.py`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner

from devmap_config import compile_profile
from devmap_config.amounts import MEBIBYTE
from devmap_config.cli.probe import probe as probe_command
from devmap_config.devices import CPU, Device
from devmap_config.probe import rates, torch_rates
from devmap_config.probe.measuring import peer_links
from devmap_config.probe.rates import SHARE_OF_FREE, NotMeasuredError, disk_bandwidth, fastest_pass, memory_bandwidth
from devmap_config.probe.torch_rates import Devices

SMALL = {"MEMORY_BUFFER_BYTES": 8 * MEBIBYTE, "DISK_FILE_BYTES": 16 * MEBIBYTE}


class Clock:
    """Time that passes by a second whenever it is asked for."""

    def __init__(self, step=1.0):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def test_memory_is_read_and_its_rate_is_the_best_pass():
    rate = memory_bandwidth(2**40, 2, buffer_bytes=8 * MEBIBYTE, clock=Clock())
    assert (rate.per_second, rate.method) == (8 * MEBIBYTE, "2 threads read 8 MiB")
    assert memory_bandwidth(2**40, 2, buffer_bytes=8 * MEBIBYTE).per_second > 10 * MEBIBYTE


def test_passes_end_with_the_time_or_after_a_few():
    passes = []
    fastest_pass(lambda: passes.append("slow"), Clock(), limit_seconds=3.0)
    fastest_pass(lambda: passes.append("quick"), Clock(0.001), limit_seconds=3.0)
    assert (passes.count("slow"), passes.count("quick")) == (2, rates.PASSES)


def test_an_accelerator_is_waited_for_after_each_pass(monkeypatch):
    done = []
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(synchronize=lambda index: done.append(f"waited for {index}")))
    Devices(Clock())._fastest(lambda: done.append("given"), CPU, Device("xpu", 1))
    assert done == ["given", "waited for 1"] * 2


def test_memory_that_is_not_free_is_not_taken():
    assert memory_bandwidth(16 * MEBIBYTE, 1, clock=Clock()).method == "1 threads read 2 MiB"
    with pytest.raises(NotMeasuredError, match="too little memory"):
        memory_bandwidth(MEBIBYTE, 1)


def test_the_disk_is_read_and_left_as_it_was(tmp_path):
    rate = disk_bandwidth(tmp_path, 2**40, file_bytes=16 * MEBIBYTE)
    assert rate.per_second > 0
    assert rate.method.startswith("16 MiB read ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_and_read_is_bounded_by_time_and_by_what_is_free(tmp_path):
    slow = disk_bandwidth(tmp_path, 2**40, file_bytes=2**40, clock=Clock())
    assert slow.method.startswith("24 MiB read ")  # three seconds, of one for each block
    little = disk_bandwidth(tmp_path, 64 * MEBIBYTE, clock=Clock())
    assert little.method.startswith("8 MiB read ")
    with pytest.raises(NotMeasuredError, match="too little room"):
        disk_bandwidth(tmp_path, 63 * MEBIBYTE)


@pytest.mark.skipif(sys.platform != "linux", reason="how a cache is avoided is the system's")
def test_the_cache_is_avoided_by_what_the_file_system_lets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments[1:]))
    open_file = os.open
    try:  # not every file system can
        os.close(open_file(tmp_path / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        expected = "8 MiB read around the cache (O_DIRECT)"
    except OSError:
        expected = "8 MiB read after its pages were dropped from the cache (posix_fadvise)"
    assert disk_bandwidth(tmp_path, 2**40, file_bytes=8 * MEBIBYTE).method == expected

    def refuse_direct(path, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return open_file(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse_direct)
    dropped = disk_bandwidth(tmp_path, 2**40, file_bytes=8 * MEBIBYTE)
    assert dropped.method == "8 MiB read after its pages were dropped from the cache (posix_fadvise)"
    assert (0, 0, os.POSIX_FADV_DONTNEED) in asked
    monkeypatch.delattr(os, "posix_fadvise")
    plain = disk_bandwidth(tmp_path, 2**40, file_bytes=8 * MEBIBYTE)
    assert plain.method == "8 MiB read with the file system's cache, which could not be avoided"


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(NotMeasuredError, match="No such file or directory"):
        disk_bandwidth(tmp_path / "nowhere", 2**40)


def test_layers_grow_until_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(torch_rates, "LARGEST_MATRIX", 512)
    quick = Devices(Clock(0.001)).flops(CPU)
    assert quick.method == "bfloat16 linear layers of 512 by 512"
    slow = Devices(Clock()).flops(CPU)
    assert slow.per_second == 2 * torch_rates.SMALLEST_MATRIX**3


def test_the_cpu_is_as_fast_as_its_layers_read_their_weights():
    rate = Devices(Clock()).layer_bandwidth(3 * SHARE_OF_FREE * torch_rates.LAYER_BYTES)
    assert rate.per_second == 3 * torch_rates.LAYER_BYTES
    assert rate.method == "3 linear layers of 4096 by 4096, one token"
    with pytest.raises(NotMeasuredError, match="too little memory"):
        Devices(Clock()).layer_bandwidth(torch_rates.LAYER_BYTES)


def test_nothing_is_said_of_a_machine_that_is_busy(small, monkeypatch):
    monkeypatch.setattr(torch_rates, "QUIET", 1.5)  # of one thread, more than there is
    done = CliRunner().invoke(probe_command, ["--measure"], standalone_mode=False)
    assert done.return_value == 5
    assert "error[too-noisy]: nothing is said of this machine: other work takes the CPU: of one thread" in " ".join(
        done.stderr.split()
    )
    assert done.stdout == ""


def test_the_host_is_as_fast_as_it_asks_for_the_operations_of_a_model_with_next_to_nothing_to_compute(small):
    rate = Devices(Clock()).dispatches(CPU)
    count = int(rate.method.split()[0])
    assert rate.method == f"{count} operations of a Llama with {torch_rates.NARROW['num_hidden_layers']} narrow layers"
    assert rate.per_second == count  # in a second of this clock
    assert 60 < count / torch_rates.NARROW["num_hidden_layers"] < 90  # what a layer of a Llama asks for


def test_pairs_with_a_bridge_have_a_line_of_their_own():
    rates = {"cuda:0-cuda:1": 50, "cuda:0-cuda:2": 10, "cuda:1-cuda:2": 11}
    assert peer_links(rates) == {"peer": 10, "cuda:0-cuda:1": 50}


@pytest.fixture
def small(monkeypatch):
    """Little is measured: defaults are bound where the functions are made."""
    monkeypatch.setitem(memory_bandwidth.__kwdefaults__, "buffer_bytes", SMALL["MEMORY_BUFFER_BYTES"])
    monkeypatch.setitem(disk_bandwidth.__kwdefaults__, "file_bytes", SMALL["DISK_FILE_BYTES"])
    monkeypatch.setattr(torch_rates, "LARGEST_MATRIX", 256)
    monkeypatch.setattr(torch_rates, "LAYERS_BYTES", torch_rates.LAYER_BYTES)
    monkeypatch.setattr(torch_rates, "QUIET", 0)  # other tests run beside this one


def test_the_block_has_what_was_measured_and_plans_are_predicted_by_it(small, workspace):
    done = CliRunner().invoke(probe_command, ["--measure"], standalone_mode=False)
    assert done.return_value == 0
    hardware = yaml.safe_load(done.stdout)["hardware"]
    assert set(hardware["devices"]["cpu"]) == {"memory", "bandwidth", "flops"}
    assert hardware["devices"]["disk"]["bandwidth"] == hardware["links"]["disk"]
    comments = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    measured = ["operations that the host dispatches", "weights on the CPU", "disk", "layers on the CPU"]
    assert [line[2:].partition(":")[0] for line in comments] == measured
    assert hardware["host"]["dispatch"].endswith("us measured")
    assert done.stderr == ""

    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: llama}\nworkload: {context_length: 64}\nplacement: {strategy: fastest}\n"
        + done.stdout
    )
    prediction = compile_profile("profile.yaml").prediction
    assert prediction.decode_nanoseconds_per_token is not None
    assert prediction.prefill_nanoseconds is not None


def test_what_cannot_be_measured_is_a_warning_and_the_rest_is_printed(small, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rates.tempfile, "NamedTemporaryFile", refuse)
    done = CliRunner().invoke(probe_command, ["--measure", "--format", "json"], standalone_mode=False)
    value = json.loads(done.stdout)
    assert [each["code"] for each in value["diagnostics"]] == ["not-measured"]
    assert value["diagnostics"][0]["message"].startswith("disk could not be measured: nothing can be written to ")
    assert set(value["measured"]) == {
        "weights on the CPU",
        "operations that the host dispatches",
        "layers on the CPU",
    }
    assert "links" not in value["hardware"]


def test_a_terminal_sees_the_progress_on_stderr_and_a_pipe_does_not(tmp_path):
    code = (
        "from devmap_config.probe import measuring, torch_rates\n"
        "from devmap_config.probe.rates import Rate\n"
        "measuring.memory_bandwidth = measuring.disk_bandwidth = lambda *a: Rate(10**9, 'said')\n"
        "torch_rates.Devices.is_there = False\n"
        "from devmap_config.cli.probe import probe\n"
        "probe.main(['--measure'], standalone_mode=False)\n"
    )
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    shown = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.close(theirs)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    assert "memory" in seen
    assert "disk" in seen
    assert shown.stdout.splitlines()[:2] == piped.stdout.splitlines()[:2] == ["hardware:", "  devices:"]


def test_against_and_measure_are_two_questions():
    done = CliRunner().invoke(probe_command, ["--against", "x.lock.json", "--measure"])
    assert done.exit_code == 2
