"""`devmap probe --measure` measures memory and disk for real; `on_simulated_accelerator.py` measures cards."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from itertools import chain
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
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.hardware.declared import build_inventory
from devmap_config.probe import measuring, rates, torch_rates
from devmap_config.probe.block import block_text, hardware_block
from devmap_config.probe.machine import SeenAccelerator, SeenHost, SeenMachine
from devmap_config.probe.measuring import measured, peer_links, steps
from devmap_config.probe.rates import (
    SHARE_OF_FREE,
    NotMeasuredError,
    Rate,
    TooNoisyError,
    disk_bandwidth,
    memory_bandwidth,
    passes,
)
from devmap_config.probe.torch_rates import Devices
from devmap_config.profile.loading import load_profile

SMALL = {"MEMORY_BUFFER_BYTES": 8 * MEBIBYTE, "DISK_FILE_BYTES": 16 * MEBIBYTE}


class Clock:
    """A clock that advances by a second whenever it is read."""

    def __init__(self, step=1.0):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def devices(step=1.0, working=1000.0):
    """Return devices on such a clock, while this number of threads of the process is running."""
    clock = Clock(step)
    return Devices(clock, lambda: working * clock.now)


def test_memory_bandwidth_is_measured():
    rate = memory_bandwidth(2**40, 2, buffer_bytes=8 * MEBIBYTE, clock=Clock())
    assert (rate.per_second, rate.method) == (8 * MEBIBYTE, "2 threads read 8 MiB")
    assert memory_bandwidth(2**40, 2, buffer_bytes=8 * MEBIBYTE).per_second > 10 * MEBIBYTE


def test_passes_are_repeated_while_time_allows_at_least_once():
    assert passes(lambda: None, Clock(10.0), limit_seconds=3.0) == [10.0]
    assert passes(lambda: None, Clock(0.25), limit_seconds=3.0) == [0.25] * 4  # of three readings of the clock


def test_many_measurements_share_the_time():
    for measurements, count in ((10, 3), (60, 2)):
        eight_cards = devices(0.125)
        eight_cards.share_time(measurements)
        assert len(eight_cards._seconds(lambda: None, CPU)) == count


def test_a_rate_is_the_median_of_its_passes():
    rate = Rate.of(600, [1.0, 6.0, 2.0], "said")
    assert rate == Rate(300, "said", least=100, most=600, passes=3)


def test_each_pass_waits_for_the_accelerator(monkeypatch):
    done = []
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(synchronize=lambda index: done.append(f"waited for {index}")))
    devices()._seconds(lambda: done.append("given"), CPU, Device("xpu", 1))
    assert done == ["given", "waited for 1"] * 2


def test_measuring_takes_only_free_memory():
    assert memory_bandwidth(16 * MEBIBYTE, 1, clock=Clock()).method == "1 threads read 2 MiB"
    with pytest.raises(NotMeasuredError, match="too little memory"):
        memory_bandwidth(MEBIBYTE, 1)


def test_measuring_a_disk_leaves_no_files(tmp_path):
    rate = disk_bandwidth(tmp_path, 2**40, file_bytes=16 * MEBIBYTE)
    assert rate.per_second > 0
    assert rate.method.startswith("16 MiB read ")
    assert list(tmp_path.iterdir()) == []


def test_measuring_a_disk_is_bounded_by_time_and_free_space(tmp_path):
    slow = disk_bandwidth(tmp_path, 2**40, file_bytes=2**40, clock=Clock())
    assert slow.method.startswith("8 MiB read ")  # three seconds, of one for each block
    little = disk_bandwidth(tmp_path, 64 * MEBIBYTE, clock=Clock())
    assert little.method.startswith("8 MiB read ")
    with pytest.raises(NotMeasuredError, match="too little room"):
        disk_bandwidth(tmp_path, 63 * MEBIBYTE)


@pytest.mark.skipif(sys.platform != "linux", reason="how a cache is avoided is the system's")
def test_measuring_a_disk_avoids_the_cache_as_the_file_system_allows(tmp_path, monkeypatch):
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


def test_a_disk_that_cannot_be_written_to_is_not_measured(tmp_path):
    with pytest.raises(NotMeasuredError, match="No such file or directory"):
        disk_bandwidth(tmp_path / "nowhere", 2**40)


def test_layers_grow_until_they_take_long_enough(monkeypatch):
    monkeypatch.setattr(torch_rates, "LARGEST_MATRIX", 512)
    monkeypatch.setattr(torch_rates, "LIMIT_SECONDS", 0)
    assert devices(0.001).flops(CPU).method == "bfloat16 linear layers of 512 by 512"
    slow = devices().flops(CPU, "float32")
    assert slow.per_second == 2 * torch_rates.SMALLEST_MATRIX**3
    assert slow.method == "float32 linear layers of 256 by 256"


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float32", 4)])
def test_bandwidth_is_measured_by_a_token_and_flops_by_a_prompt(small, dtype, itemsize):
    layers_bytes = itemsize * (64**2 + 128**2)
    bandwidth, flops, *_ = devices().layers(dtype, 4 * SHARE_OF_FREE * layers_bytes)
    assert bandwidth.per_second == 4 * layers_bytes  # in a second of this clock
    assert bandwidth.method == f"8 {dtype} linear layers of 64 by 64 and 128 by 128, one token"
    assert flops.per_second == int(2 * 16 * (64**2 + 128**2) / 0.75)  # a quarter of a second goes to reading
    with pytest.raises(NotMeasuredError, match="too little memory"):
        devices().layers(dtype, layers_bytes)


def test_narrow_layers_give_the_time_of_starting_a_product(small, monkeypatch):
    monkeypatch.setattr(torch_rates, "NARROW_TOKENS", 2)
    there_is = devices()
    bandwidth, flops, one_token, prompt = there_is.layers("bfloat16", 2**30)
    count = 2**16 // (2 * 32**2)
    reading_seconds = 2**16 / bandwidth.per_second  # of all these layers, which take a second of this clock
    assert 0.01 < reading_seconds < 0.1
    assert one_token.per_second == int(count / (1 - reading_seconds))
    computing_seconds = count * 2 * torch_rates.NARROW_TOKENS * 32**2 / flops.per_second
    assert 0.1 < computing_seconds < 0.5
    assert prompt.per_second == int(count / (1 - reading_seconds - computing_seconds))
    experts = there_is.experts(2**30)
    besides_seconds = 64 * 2 / one_token.per_second
    assert experts.per_second == int(64 * 2 * 3 * 64 * 32 / max(1 - besides_seconds, 0.5))


def test_narrow_layers_as_fast_as_wide_ones_give_no_rate(small, monkeypatch):
    monkeypatch.setattr(torch_rates, "NARROW_BYTES", 2**20)  # as much is read as of wide ones, in the same second
    assert devices().layers("bfloat16", 2**30)[2:] == (None, None)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", [4, 4, 4, 4]), ("float32", [1, 4, 1, 4])])
def test_one_thread_multiplies_a_token_in_float32(small, monkeypatch, dtype, expected):
    at_work = []

    def seconds(self, action, *devices, threads):
        at_work.append(threads)
        return [1.0]

    monkeypatch.setattr(Devices, "_threads", 4)
    monkeypatch.setattr(Devices, "_seconds", seconds)
    devices().layers(dtype, 2**30)
    assert at_work == expected


def test_attention_is_measured_for_one_query_and_for_a_prompt(small):
    one, prompt = (devices().attention(2**30, is_prefill=is_prefill) for is_prefill in (False, True))
    width = torch_rates.HEADS * torch_rates.HEAD_WIDTH
    assert one.per_second == torch_rates.LAYERS_WITH_A_CACHE * 4 * 128 * width
    assert prompt.per_second == 4 * 32 * 32 * width
    with pytest.raises(NotMeasuredError, match="too little memory"):
        devices().attention(2**10, is_prefill=False)


def test_experts_are_measured_with_different_ones_per_token(small, monkeypatch):
    chosen, grouped_mm = [], torch.nn.functional.grouped_mm

    def seen(rows, weights, offs):
        ends = [0, *offs.tolist()]
        chosen.append([expert for expert in range(len(offs)) if ends[expert] < ends[expert + 1]])
        assert rows.shape[0] == ends[-1] == torch_rates.CHOSEN
        return grouped_mm(rows, weights, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", seen)
    experts_bytes = 2 * 3 * 64 * 32
    rate = devices().experts(SHARE_OF_FREE * 31 * experts_bytes)
    assert rate.per_second == 24 * experts_bytes
    assert rate.method == "8 of 24 experts of 64 by 32 for each of 3 tokens, bfloat16"
    of_first, of_second = (sorted(chain.from_iterable(chosen[matrix:6:2])) for matrix in (0, 1))
    assert of_first == of_second == list(range(24))


@pytest.mark.parametrize(
    ("threads", "working", "said"), [(1, 0.85, "1 thread, this had 85%"), (4, 3, "4 threads, this had 75%")]
)
def test_a_machine_with_other_work_to_do_is_too_noisy(threads, working, said):
    assert devices(working=0.95 * threads)._seconds(lambda: None, CPU, threads=threads) == [1.0]
    with pytest.raises(TooNoisyError, match=f"other work takes the CPU: of {said}"):
        devices(working=working)._seconds(lambda: None, CPU, threads=threads)


@pytest.mark.parametrize(
    "measure",
    [
        lambda devices: devices.dispatches(CPU),
        lambda devices: devices.layers("float16", 2**30),
        lambda devices: devices.attention(2**30, is_prefill=False),
        lambda devices: devices.attention(2**30, is_prefill=True),
        lambda devices: devices.experts(2**30),
    ],
)
def test_nothing_is_measured_on_the_cpu_beside_other_work(small, measure, monkeypatch):
    monkeypatch.setattr(torch_rates, "QUIET", 0.9)
    monkeypatch.setattr(torch_rates, "QUIET_TOGETHER", 0.8)
    with pytest.raises(TooNoisyError):
        measure(devices(working=0.5))


def test_no_rates_are_given_on_a_busy_machine(small, monkeypatch):
    monkeypatch.setattr(torch_rates, "QUIET", 1.5)  # of one thread, more than there is
    done = CliRunner().invoke(probe_command, ["--measure"], standalone_mode=False)
    assert done.return_value == 5
    assert "error[too-noisy]: this machine was not measured: other work takes the CPU: of 1 thread" in " ".join(
        done.stderr.split()
    )
    assert done.stdout == ""


def test_the_hosts_rate_is_measured_by_a_tiny_models_operations(small):
    rate = devices().dispatches(CPU)
    count = int(rate.method.split()[0])
    assert rate.method == f"{count} operations of a Llama with {torch_rates.NARROW['num_hidden_layers']} narrow layers"
    assert rate.per_second == count  # in a second of this clock
    assert 60 < count / torch_rates.NARROW["num_hidden_layers"] < 90  # what a layer of a Llama asks for


PAIRS = {"0-cuda:1": 50, "0-cuda:2": 10, "1-cuda:2": 11}


def test_pairs_of_cards_with_a_bridge_are_listed():
    pairs = {("links", f"cuda:{pair}"): Rate.of(rate, [1], "") for pair, rate in PAIRS.items()}
    assert {route[1]: rate.per_second for route, rate in peer_links(pairs).items()} == {"peer": 10, "cuda:0-cuda:1": 50}


CARDS = tuple(SeenAccelerator(id=Device("cuda", index), name="", memory_bytes=2**40) for index in (0, 1))


class Buffer:
    """Memory of a device that records copies to it."""

    def __init__(self, noted, size_bytes, device):
        self.noted, self.size_bytes, self.device, self.is_pinned = noted, size_bytes, device, False

    def pin_memory(self):
        self.is_pinned = True
        return self

    def copy_(self, source, *, non_blocking):
        assert (source.device, source.is_pinned, source.size_bytes, non_blocking) == (CPU, True, self.size_bytes, True)
        self.noted.append(f"to {self.device}")


def test_copies_to_all_cards_run_at_once(monkeypatch):
    noted, timed = [], devices()
    monkeypatch.setattr(timed, "_buffer", lambda size_bytes, device: Buffer(noted, size_bytes, device))
    monkeypatch.setattr(timed, "_wait", lambda device: noted.append(f"wait for {device}"))
    rate = timed.from_host_at_once(CARDS, available_bytes=8 * 2**30)
    assert noted[:4] == ["to cuda:0", "to cuda:1", "wait for cuda:0", "wait for cuda:1"]
    assert rate.per_second == 2 * torch_rates.COPY_BYTES  # in a second of this clock
    assert timed.from_host_at_once(CARDS, available_bytes=64 * MEBIBYTE).per_second == 8 * MEBIBYTE


@pytest.mark.parametrize(("at_once", "is_told"), [(30, False), (31, True)])
def test_the_joint_rate_is_given_if_it_exceeds_one_link(monkeypatch, at_once, is_told):
    """Cards behind one switch share a link."""
    monkeypatch.setattr(Devices, "from_host", lambda *_, **__: Rate.of(25, [1], ""))
    monkeypatch.setattr(Devices, "from_host_at_once", lambda *_: Rate.of(at_once, [1], ""))
    host = SeenHost(memory_bytes=2**40, available_bytes=2**40, threads=2)
    planned = steps(SeenMachine(accelerators=CARDS, host=host, disk=None), Path(), devices())
    found, _ = measured(tuple(step for step in planned if step.words.startswith("copies from")), lambda _: None)
    assert {route[1] for route in found} == {"host", "unpinned", *(["together"] if is_told else [])}


@pytest.fixture
def small(monkeypatch):
    """Keep measurements small: defaults are bound when the functions are defined."""
    monkeypatch.setitem(memory_bandwidth.__kwdefaults__, "buffer_bytes", SMALL["MEMORY_BUFFER_BYTES"])
    monkeypatch.setitem(disk_bandwidth.__kwdefaults__, "file_bytes", SMALL["DISK_FILE_BYTES"])
    sizes = {"LARGEST_MATRIX": 256, "LAYER_WIDTHS": (64, 128), "LAYER_TOKENS": 16, "EXPERT_WIDTHS": (64, 32)}
    sizes |= {"NARROW_WIDTH": 32, "NARROW_BYTES": 2**16}
    lengths = {"PROMPT_TOKENS": 32, "CONTEXT_TOKENS": 128, "LAYERS_BYTES": 2**20, "LIMIT_SECONDS": 0.01}
    for name, value in (sizes | lengths).items():
        monkeypatch.setattr(torch_rates, name, value)
    for name in ("QUIET", "QUIET_TOGETHER"):
        monkeypatch.setattr(torch_rates, name, 0)  # other tests run beside this one


def test_the_hardware_block_has_measured_rates_that_plans_use(small, workspace):
    done = CliRunner().invoke(probe_command, ["--measure"], standalone_mode=False)
    assert done.return_value == 0
    hardware = yaml.safe_load(done.stdout)["hardware"]
    cpu = hardware["devices"]["cpu"]
    products = [cpu.pop("products", {}), *(each.pop("products", {}) for each in cpu["dtypes"].values())]
    assert list(cpu) == ["memory", "bandwidth", "flops", "dtypes", "attention", "experts"]
    assert set(cpu["attention"]) == {"decode", "prefill"}
    assert {dtype: set(rates) for dtype, rates in cpu["dtypes"].items()} == {
        "float16": {"bandwidth", "flops"},
        "float32": {"bandwidth", "flops"},
    }
    assert hardware["host"]["dispatch"].endswith("us measured")
    assert len(re.findall(r"   # median of \d+ runs?, \S+ to \S+: \S", done.stdout)) == 11 + sum(map(len, products))
    assert done.stderr == ""

    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: llama}\nworkload: {context_length: 64}\nplacement: {strategy: fastest}\n"
        + done.stdout
    )
    prediction = compile_profile("profile.yaml").prediction
    assert prediction.decode_nanoseconds_per_token is not None
    assert prediction.prefill_nanoseconds is not None


def test_a_profile_has_every_rate_that_was_measured(tmp_path):
    seen = SeenMachine(accelerators=(), host=SeenHost(memory_bytes=2**34, available_bytes=2**34, threads=2), disk=None)
    planned = measuring.steps(seen, tmp_path, Devices())
    routes = [route for step in planned for route in step.routes]
    rates = {route: Rate(10**9 * (place + 1), "said", 10**8, 10**10, 3) for place, route in enumerate(routes)}
    text = block_text(seen, hardware_block(seen, rates), rates)
    assert "      bandwidth: 2.00GB/s measured   # median of 3 runs, 100MB/s to 10.0GB/s: said\n" in text
    (tmp_path / "profile.yaml").write_text(f"version: 1\nmodel: {{source: x}}\n{text}")
    sink = Sink()
    inventory = build_inventory(load_profile(tmp_path / "profile.yaml", sink), sink)
    assert sink.diagnostics == ()
    [cpu] = inventory.devices
    usual, half, whole = (cpu.in_dtype(dtype) for dtype in ("bfloat16", "float16", "float32"))
    assert [
        (each.bandwidth_bytes_per_second // 10**9, each.flops_per_second // 10**9) for each in (usual, half, whole)
    ] == [
        (2, 3),
        (6, 7),
        (10, 11),
    ]
    products = [(each.decode_products_per_second, each.prefill_products_per_second) for each in (usual, half, whole)]
    assert products == [(4 * 10**9, 5 * 10**9), (8 * 10**9, 9 * 10**9), (12 * 10**9, 13 * 10**9)]
    assert cpu.decode_attention_per_second == 14 * 10**9
    assert cpu.prefill_attention_per_second == 15 * 10**9
    assert (usual.experts_bytes_per_second, half.experts_bytes_per_second) == (16 * 10**9, None)
    assert inventory.dispatch_nanoseconds == 1


def test_a_failed_measurement_is_a_warning(small, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rates.tempfile, "NamedTemporaryFile", refuse)
    done = CliRunner().invoke(probe_command, ["--measure", "--format", "json"], standalone_mode=False)
    value = json.loads(done.stdout)
    assert [each["code"] for each in value["diagnostics"]] == ["not-measured"]
    assert value["diagnostics"][0]["message"].startswith("disk could not be measured: nothing can be written to ")
    assert "devices.disk.bandwidth" not in value["measured"]
    assert set(value["measured"]["devices.cpu.experts"]) == {"per_second", "least", "most", "passes", "method"}
    assert "bandwidth" not in value["hardware"]["devices"]["disk"]


def test_progress_is_shown_on_a_terminal_only(tmp_path):
    code = (
        "from devmap_config.probe import measuring, torch_rates\n"
        "from devmap_config.probe.rates import Rate\n"
        "measuring.memory_bandwidth = measuring.disk_bandwidth = lambda *a: Rate.of(10**9, [1], 'said')\n"
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


def test_against_and_measure_exclude_each_other():
    done = CliRunner().invoke(probe_command, ["--against", "x.lock.json", "--measure"])
    assert done.exit_code == 2
