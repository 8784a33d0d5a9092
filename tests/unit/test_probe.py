"""`devmap probe`: NVML and torch are simulated at their boundary; the CPU, its control groups and the disk are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from fake_nvml import FakeCard, FakeNvml

from devmap_config import compile_profile
from devmap_config.amounts import profile_rate
from devmap_config.cli.probe import probe as probe_command
from devmap_config.hardware.catalogue import load_catalogue
from devmap_config.probe import host as host_module
from devmap_config.probe import probe as probe_module
from devmap_config.probe import torch_probe
from devmap_config.probe.block import hardware_block
from devmap_config.probe.cgroup import GroupMemory, limiting_groups
from devmap_config.probe.drivers import kinds_torch_is_built_for, kinds_with_a_driver
from devmap_config.probe.host import seen_disk, seen_host
from devmap_config.probe.machine import SeenMachine
from devmap_config.probe.nvml import read_cards
from devmap_config.probe.probe import probe_machine
from devmap_config.probe.recognition import recognised

GIB = 2**30
RTX_4090 = 25757220864
"""What a card reports, as in the catalogue."""


def card(letter, *, name="NVIDIA GeForce RTX 4090", memory_bytes=RTX_4090, bus=1, **more):
    return FakeCard(f"{name}", f"GPU-{letter * 8}-0000-0000-0000-000000000000", bus, memory_bytes, **more)


A, B, C = card("a", bus=1), card("b", bus=2), card("c", bus=3)
SLOW = card("d", name="NVIDIA GeForce RTX 3060", memory_bytes=12884901888, bus=0)


@pytest.fixture
def machine(monkeypatch):
    """A machine with these cards, NVIDIA's driver and a torch for the CPU; gives what torch was asked."""

    def make(*cards, torch_sees=None, drivers=("cuda",), built=(), **more):
        asked = []

        def torch_accelerators(known):
            asked.append(known)
            return torch_sees(known) if torch_sees else ()

        nvml = FakeNvml(cards, **more)
        monkeypatch.setitem(sys.modules, "pynvml", nvml.module())
        monkeypatch.setattr(probe_module, "kinds_with_a_driver", lambda: frozenset(drivers))
        monkeypatch.setattr(probe_module, "kinds_torch_is_built_for", lambda: frozenset(built))
        monkeypatch.setattr(torch_probe, "torch_accelerators", torch_accelerators)
        make.nvml = nvml
        return asked

    return make


@pytest.mark.parametrize(
    ("cards", "environment", "is_certain"),
    [
        ((B, A, C), {}, True),
        ((A, SLOW), {}, False),
        ((A, SLOW), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, True),
        ((A, B), {"CUDA_VISIBLE_DEVICES": "1"}, False),
    ],
)
def test_without_torch_cards_are_numbered_by_the_bus_and_a_warning_says_where_that_is_a_guess(
    machine, cards, environment, is_certain
):
    asked = machine(*cards)
    seen = probe_machine(environment, None)
    by_bus = sorted(cards, key=lambda each: each.bus)
    assert [(str(each.id), each.uuid) for each in seen.accelerators] == [
        (f"cuda:{index}", each.uuid) for index, each in enumerate(by_bus)
    ]
    assert [each.code for each in seen.notes] == ([] if is_certain else ["guessed-order"])
    assert asked == []
    assert machine.nvml.initialised == 0


def test_where_torch_is_there_cards_are_as_it_numbers_them_with_the_memory_that_nvml_saw(machine, monkeypatch):
    """The fastest first is CUDA's default; what it takes for fast is not documented."""
    held = card("a", bus=1, held_bytes=3 * GIB)
    original = torch_probe.torch_accelerators
    machine(SLOW, held, built=["cuda"], torch_sees=original)
    fake_torch_backend(monkeypatch, "cuda", [held, SLOW])
    seen = probe_machine({}, None)
    assert [(str(each.id), each.uuid, each.held_bytes, each.has_context) for each in seen.accelerators] == [
        ("cuda:0", held.uuid, 3 * GIB, False),
        ("cuda:1", SLOW.uuid, 0, False),
    ]
    assert seen.notes == ()


def test_cards_that_the_environment_hides_from_torch_are_not_there(machine):
    machine(A, built=["cuda"])
    assert probe_machine({"CUDA_VISIBLE_DEVICES": ""}, None).accelerators == ()


def test_cards_that_torch_does_not_get_at_are_as_nvml_sees_them(machine):
    """As under a driver that is too old for this torch."""
    asked = machine(A, built=["cuda"])
    assert [each.uuid for each in probe_machine({}, None).accelerators] == [A.uuid]
    assert len(asked) == 1


@pytest.mark.parametrize("is_old", [False, True], ids=["second version", "first version"])
def test_memory_that_others_hold(machine, is_old):
    machine(card("a", held_bytes=2 * GIB, driver_bytes=GIB // 2), is_old=is_old)
    [seen] = probe_machine({}, None).accelerators
    assert seen.memory_bytes == RTX_4090
    assert seen.free_bytes == RTX_4090 - 2 * GIB - GIB // 2
    assert seen.held_bytes == 2 * GIB + (GIB // 2 if is_old else 0)
    assert not seen.has_context


def test_a_context_of_this_process_is_told_apart(machine):
    machine(card("a", held_bytes=GIB, own_process=True))
    [seen] = probe_machine({}, None).accelerators
    assert seen.has_context


def a100(*slices, uuid="a"):
    return card(
        uuid,
        name="NVIDIA A100-SXM4-40GB",
        memory_bytes=40 * GIB,
        bus=ord(uuid),
        is_partitioned=True,
        slices=slices,
    )


def mig(letter):
    return FakeCard("NVIDIA A100-SXM4-40GB MIG 1g.5gb", f"MIG-{letter * 8}", 0, 5 * GIB, knows_partitions=False)


def test_a_slice_is_a_device_with_its_own_memory_and_not_the_card_of_the_catalogue(machine):
    machine(a100(None, mig("x"), None))
    seen = probe_machine({}, None)
    [part] = seen.accelerators
    assert (str(part.id), part.uuid, part.memory_bytes, part.accelerator, part.is_slice) == (
        "cuda:0", "MIG-xxxxxxxx", 5 * GIB, None, True
    )  # fmt: skip
    assert hardware_block(seen)["devices"]["cuda:0"] == {"memory": "5120MiB"}
    assert seen.notes == ()


def test_of_several_slices_cuda_may_show_only_one(machine):
    machine(a100(mig("x"), mig("y")))
    seen = probe_machine({}, None)
    assert [each.uuid for each in seen.accelerators] == ["MIG-xxxxxxxx", "MIG-yyyyyyyy"]
    assert [each.code for each in seen.notes] == ["guessed-order"]


def test_a_partitioned_card_without_slices_is_of_no_use(machine):
    machine(a100(), B)
    assert [each.uuid for each in probe_machine({}, None).accelerators] == [B.uuid]


def test_a_card_that_shares_the_hosts_memory_is_the_one_of_the_catalogue(machine):
    machine(card("a", name="NVIDIA GB10", has_own_memory=False))
    seen = probe_machine({}, None)
    assert hardware_block(seen)["devices"]["cuda:0"] == "dgx-spark-gb10"


def test_nvml_that_fails_leaves_it_to_torch(machine):
    asked = machine(card("a", is_lost=True), built=["cuda"])
    assert probe_machine({}, None).accelerators == ()
    assert len(asked) == 1


def test_a_driver_that_nothing_can_ask_is_a_warning(machine, monkeypatch):
    asked = machine(has_driver=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    seen = probe_machine({}, None)
    assert [(each.code, "nvidia-ml-py" in each.help) for each in seen.notes] == [("unseen-accelerator", True)]
    assert asked == []


def test_the_simulated_library_has_the_names_of_the_real_one(monkeypatch):
    simulated = FakeNvml().module()
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    real = pytest.importorskip("pynvml")
    names = [name for name in vars(simulated) if not name.startswith("__")]
    assert [name for name in names if not hasattr(real, name)] == []
    assert (simulated.NVML_DEVICE_MIG_ENABLE, simulated.nvmlMemory_v2) == (
        real.NVML_DEVICE_MIG_ENABLE,
        real.nvmlMemory_v2,
    )
    if kinds_with_a_driver().isdisjoint({"cuda"}):
        assert read_cards() == ()


def test_a_laptop_is_described_without_asking_torch(machine):
    asked = machine(has_driver=False, drivers=("xpu",))
    seen = probe_machine({}, None)
    assert (seen.accelerators, seen.notes, asked) == ((), (), [])


@pytest.mark.parametrize("kind", ["hip", "xpu", "npu", "mps"])
def test_torch_is_asked_for_what_is_there_and_it_is_built_for(machine, kind):
    asked = machine(drivers=("cuda", kind), built=[kind])
    probe_machine({}, None)
    assert asked == [()]


def fake_torch_backend(monkeypatch, kind, cards, **more):
    """`torch.<kind>` with these cards, as torch numbers them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    functions = {
        "is_available": lambda: True,
        "device_count": lambda: len(cards),
        "get_device_name": lambda index: cards[index].name,
        "get_device_properties": lambda index: types.SimpleNamespace(
            total_memory=cards[index].memory_bytes, uuid=cards[index].uuid.removeprefix("GPU-")
        ),
        "mem_get_info": lambda index: (cards[index].memory_bytes - cards[index].held_bytes, cards[index].memory_bytes),
    }
    if kind == "cuda":
        for name, function in (functions | more).items():
            monkeypatch.setattr(torch.cuda, name, function, raising=False)
    else:
        monkeypatch.setattr(torch, kind, types.SimpleNamespace(**(functions | more)), raising=False)


@pytest.mark.parametrize(
    ("kind", "name", "memory_bytes", "expected"),
    [
        ("cuda", "AMD Instinct MI300X", 206141652992, "mi300x"),
        ("cuda", "NVIDIA GeForce RTX 4090", 25386352640, {"accelerator": "rtx-4090", "memory": "24210MiB"}),
        ("xpu", "Intel(R) Arc(TM) Pro B60 Graphics", 23520000000, "arc-pro-b60"),
        ("npu", "Ascend910B2", 64 * GIB, {"memory": "65536MiB"}),
    ],
)
def test_torch_alone(monkeypatch, kind, name, memory_bytes, expected):
    fake_torch_backend(monkeypatch, kind, [card("a", name=name, memory_bytes=memory_bytes, held_bytes=GIB)])
    [seen] = torch_probe.torch_accelerators()
    assert (str(seen.id), seen.held_bytes, seen.has_context) == (f"{kind}:0", GIB, True)
    machine = SeenMachine(accelerators=(seen,), host=seen_host(), disk=None)
    assert hardware_block(machine)["devices"][f"{kind}:0"] == expected


def test_a_backend_that_cannot_say_what_is_free(monkeypatch):
    def refuse(index):
        raise RuntimeError("The device does not support querying the available free memory")

    fake_torch_backend(monkeypatch, "xpu", [card("a")], mem_get_info=refuse)
    [seen] = torch_probe.torch_accelerators()
    assert (seen.memory_bytes, seen.free_bytes, seen.held_bytes, seen.has_context) == (RTX_4090, None, None, False)


def test_apple(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 96 * 10**9)
    monkeypatch.setattr(torch_probe, "_processor_name", lambda: "Apple M4 Max")
    [seen] = torch_probe.torch_accelerators()
    assert (str(seen.id), seen.accelerator, seen.memory_bytes) == ("mps", "m4-max", 96 * 10**9)


@pytest.mark.parametrize(
    ("name", "memory_bytes", "kind", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", RTX_4090, "cuda", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB, "cuda", None),
        ("NVIDIA GeForce RTX 4060 Ti", 16380 * 2**20, "cuda", "rtx-4060-ti-16"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188 * 2**20, "cuda", None),
        ("NVIDIA GeForce RTX 3080", 12 * GIB, "cuda", None),
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20, "cuda", "h100-sxm"),
        ("NVIDIA H100 PCIe", 81559 * 2**20, "cuda", "h100-pcie"),
        ("Tesla T4", 15843721216, "cuda", "t4"),
        ("Apple M4 Max", 27 * GIB, "mps", None),
        ("AMD Instinct MI300X", 206141652992, "xpu", None),
        ("NVIDIA GB10", None, "cuda", "dgx-spark-gb10"),
    ],
)
def test_recognition_by_name_and_memory(name, memory_bytes, kind, expected):
    assert recognised(name, memory_bytes, kind) == expected


def test_every_reported_name_is_of_an_accelerator_of_the_catalogue():
    from devmap_config.probe.recognition import _names

    assert set(_names().values()) <= set(load_catalogue())
    assert set(load_catalogue()) - set(_names().values()) == {"a100-pcie-40", "gaudi2", "gaudi3"} & set(
        load_catalogue()
    )


def test_torch_build_is_read_without_importing_it():
    code = (
        "import sys; from devmap_config.probe.drivers import kinds_torch_is_built_for as built;"
        "print(sorted(built()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = [kind for kind in ("cuda", "hip") if getattr(torch.version, kind, None)]
    assert done.stdout == f"{expected} False\n"


def test_torch_build_for_xpu(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch" / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.9.0+xpu'\n"
        "cuda: Optional[str] = None\nxpu: Optional[str] = '2025'\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "from devmap_config.probe.drivers import kinds_torch_is_built_for as built; print(*built())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "xpu\n"


@pytest.mark.skipif(sys.platform != "linux", reason="driver files are Linux's")
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("dev/nvidiactl", {"cuda"}),
        ("proc/driver/nvidia/version", {"cuda"}),
        ("dev/kfd", {"hip"}),
        ("dev/dri/renderD128", {"xpu"}),
        ("dev/davinci_manager", {"npu"}),
        ("dev/dxg", {"cuda", "hip", "xpu"}),
        ("dev/null", set()),
    ],
)
def test_driver_files(tmp_path, file, expected):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert kinds_with_a_driver(tmp_path) == expected


def groups(root, cgroup, mounts, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mounts)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return limiting_groups(root)


MOUNT_2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_1 = "35 31 0:32 {group} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"


def test_the_second_version_counts_every_group_around_and_not_what_is_cached(tmp_path):
    found = groups(
        tmp_path,
        "0::/user.slice/job\n",
        MOUNT_2,
        {
            "sys/fs/cgroup/memory.stat": "file 0\n",
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.high": f"{6 * GIB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/user.slice/job/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/user.slice/job/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/user.slice/job/memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
        },
    )
    assert found == (GroupMemory(8 * GIB, GIB // 2), GroupMemory(6 * GIB, 2 * GIB))
    assert [group.available_bytes for group in found] == [8 * GIB - GIB // 2, 4 * GIB]


@pytest.mark.parametrize(
    ("cgroup", "mounted"),
    [
        ("4:memory:/docker/abc/job\n0::/\n", "/docker/abc"),  # a container that sees the host's names
        ("4:cpuset,memory:/job\n", "/"),
    ],
)
def test_the_first_version_is_found_below_what_is_mounted(tmp_path, cgroup, mounted):
    found = groups(
        tmp_path,
        cgroup,
        MOUNT_1.format(group=mounted),
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert found == (GroupMemory(16 * GIB, 2 * GIB),)


@pytest.mark.parametrize("path", ["/../../elsewhere", "/docker/abc"])
def test_a_group_out_of_sight_is_the_top_of_what_is_seen(tmp_path, path):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}
    found = groups(tmp_path, f"4:memory:{path}\n", MOUNT_1.format(group="/other"), files)
    assert found == (GroupMemory(GIB, 0),)


def test_no_control_groups(tmp_path):
    assert limiting_groups(tmp_path) == ()


def test_this_host():
    host = seen_host()
    assert 0 < host.available_bytes <= host.memory_bytes <= psutil.virtual_memory().total
    assert host.threads == len(os.sched_getaffinity(0))


def test_a_limit_around_this_host_counts(monkeypatch):
    monkeypatch.setattr(host_module, "limiting_groups", lambda: (GroupMemory(GIB, GIB // 4), GroupMemory(2 * GIB, 0)))
    host = seen_host()
    assert (host.memory_bytes, host.available_bytes, host.is_limited) == (GIB, GIB - GIB // 4, True)


def test_the_disk_of_a_folder_that_is_yet_to_be_made(tmp_path):
    disk = seen_disk(tmp_path / "not" / "yet")
    assert 0 < disk.free_bytes <= disk.memory_bytes


def test_the_block_can_be_extended_and_pasted(machine, workspace):
    machine(card("a", held_bytes=GIB), card("b", bus=2, memory_bytes=24 * 10**9))
    done = CliRunner().invoke(probe_command, [], standalone_mode=False)
    assert done.return_value == 0
    first = done.stdout.splitlines()[2]
    assert first == f"    cuda:0: rtx-4090   # NVIDIA GeForce RTX 4090, {A.uuid}, 1.0 GiB held by processes now"
    block = yaml.safe_load(done.stdout)["hardware"]["devices"]
    assert block["cuda:1"] == {"accelerator": "rtx-4090", "memory": "22888MiB"}
    assert list(block) == ["cuda:0", "cuda:1", "cpu", "disk"]

    Path("box.yaml").write_text(done.stdout)
    Path("extending.yaml").write_text("version: 1\nextends: [box.yaml]\nmodel: {source: llama}\n")
    Path("pasted.yaml").write_text("version: 1\nmodel: {source: llama}\n" + done.stdout)
    devices = [str(use.id) for use in compile_profile("extending.yaml").devices]
    assert devices == [str(use.id) for use in compile_profile("pasted.yaml").devices] == list(block)


def test_json_has_the_block_and_what_was_seen(machine, tmp_path):
    machine(A, SLOW)
    done = CliRunner().invoke(probe_command, ["--format", "json", "--disk", str(tmp_path)], standalone_mode=False)
    value = json.loads(done.stdout)
    assert set(value) == {"diagnostics", "hardware", "seen", "measured"}
    assert [each["code"] for each in value["diagnostics"]] == ["guessed-order"]
    assert value["hardware"]["devices"]["cuda:1"] == "rtx-4090"
    assert value["seen"]["accelerators"][1]["uuid"] == A.uuid
    assert value["seen"]["disk"]["free_bytes"] // 2**20 == int(
        value["hardware"]["devices"]["disk"]["memory"].removesuffix("MiB")
    )


def test_a_device_of_which_nothing_is_known_is_named_in_a_comment(machine):
    machine(card("a", name="NVIDIA Orin", has_own_memory=False))
    done = CliRunner().invoke(probe_command, [], standalone_mode=False)
    assert "cuda:0" not in yaml.safe_load(done.stdout)["hardware"]["devices"]
    assert "# cuda:0 is left out, for nothing tells its memory: NVIDIA Orin" in done.stdout


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1_008_000_000_000, "1008GB/s"),
        (25_349_000_000, "25.3GB/s"),
        (9_876_543_210, "9.88GB/s"),
        (431_234_567, "431MB/s"),
        (9_999, "0.01MB/s"),
    ],
)
def test_rates_are_written_as_they_are_read(rate, text):
    from devmap_config.profile.quantities import parse_bandwidth

    assert profile_rate(rate) == text
    assert parse_bandwidth(text) == pytest.approx(rate, rel=0.01)


def test_the_command_imports_no_torch_where_there_is_no_accelerator():
    if kinds_with_a_driver() & kinds_torch_is_built_for():
        pytest.skip("there may be one")
    code = (
        "import sys; from devmap_config.cli.probe import probe;"
        "probe.main([], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
