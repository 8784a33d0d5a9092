"""`devmap probe` describes a machine; NVML and torch are simulated, while CPU, control groups and disk are real."""

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
    """Set up a machine with these cards, NVIDIA's driver and a torch for the CPU; return the calls to torch."""

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
def test_without_torch_cards_are_numbered_by_bus_with_a_warning_if_uncertain(machine, cards, environment, is_certain):
    asked = machine(*cards)
    seen = probe_machine(environment, None)
    by_bus = sorted(cards, key=lambda each: each.bus)
    assert [(str(each.id), each.uuid) for each in seen.accelerators] == [
        (f"cuda:{index}", each.uuid) for index, each in enumerate(by_bus)
    ]
    assert [each.code for each in seen.notes] == ([] if is_certain else ["guessed-order"])
    assert asked == []
    assert machine.nvml.initialised == 0


def test_with_torch_cards_have_torchs_numbers_and_nvmls_memory(machine, monkeypatch):
    """CUDA's default order is the fastest first; how it ranks them is undocumented."""
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


def test_cards_hidden_by_the_environment_are_not_listed(machine):
    machine(A, built=["cuda"])
    assert probe_machine({"CUDA_VISIBLE_DEVICES": ""}, None).accelerators == ()


def test_cards_that_torch_cannot_use_are_listed_from_nvml(machine):
    """For example under a driver that is too old for this torch."""
    asked = machine(A, built=["cuda"])
    assert [each.uuid for each in probe_machine({}, None).accelerators] == [A.uuid]
    assert len(asked) == 1


@pytest.mark.parametrize("is_old", [False, True], ids=["second version", "first version"])
def test_memory_held_by_other_processes_is_reported(machine, is_old):
    machine(card("a", held_bytes=2 * GIB, driver_bytes=GIB // 2), is_old=is_old)
    [seen] = probe_machine({}, None).accelerators
    assert seen.memory_bytes == RTX_4090
    assert seen.free_bytes == RTX_4090 - 2 * GIB - GIB // 2
    assert seen.held_bytes == 2 * GIB + (GIB // 2 if is_old else 0)
    assert not seen.has_context


def test_a_context_of_this_process_is_recognised(machine):
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


def test_a_mig_slice_is_a_device_with_its_own_memory(machine):
    machine(a100(None, mig("x"), None))
    seen = probe_machine({}, None)
    [part] = seen.accelerators
    assert (str(part.id), part.uuid, part.memory_bytes, part.accelerator, part.is_slice) == (
        "cuda:0", "MIG-xxxxxxxx", 5 * GIB, None, True
    )  # fmt: skip
    assert hardware_block(seen)["devices"]["cuda:0"] == {"memory": "5120MiB"}
    assert seen.notes == ()


def test_several_mig_slices_give_a_warning(machine):
    machine(a100(mig("x"), mig("y")))
    seen = probe_machine({}, None)
    assert [each.uuid for each in seen.accelerators] == ["MIG-xxxxxxxx", "MIG-yyyyyyyy"]
    assert [each.code for each in seen.notes] == ["guessed-order"]


def test_a_mig_card_without_slices_is_not_listed(machine):
    machine(a100(), B)
    assert [each.uuid for each in probe_machine({}, None).accelerators] == [B.uuid]


def test_a_card_that_shares_the_hosts_memory_is_recognised(machine):
    machine(card("a", name="NVIDIA GB10", has_own_memory=False))
    seen = probe_machine({}, None)
    assert hardware_block(seen)["devices"]["cuda:0"] == "dgx-spark-gb10"


def test_torch_is_asked_if_nvml_fails(machine):
    asked = machine(card("a", is_lost=True), built=["cuda"])
    assert probe_machine({}, None).accelerators == ()
    assert len(asked) == 1


def test_a_driver_without_a_library_to_ask_is_a_warning(machine, monkeypatch):
    asked = machine(has_driver=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    seen = probe_machine({}, None)
    assert [(each.code, "nvidia-ml-py" in each.help) for each in seen.notes] == [("unseen-accelerator", True)]
    assert asked == []


def test_fake_nvml_has_the_names_of_the_real_library(monkeypatch):
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


def test_a_machine_without_accelerators_is_described_without_torch(machine):
    asked = machine(has_driver=False, drivers=("xpu",))
    seen = probe_machine({}, None)
    assert (seen.accelerators, seen.notes, asked) == ((), (), [])


@pytest.mark.parametrize("kind", ["hip", "xpu", "npu", "mps"])
def test_torch_is_asked_if_it_is_built_for_a_present_driver(machine, kind):
    asked = machine(drivers=("cuda", kind), built=[kind])
    probe_machine({}, None)
    assert asked == [()]


def fake_torch_backend(monkeypatch, kind, cards, **more):
    """Replace `torch.<kind>` by one with these cards, in torch's order."""
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
def test_torch_alone_describes_accelerators(monkeypatch, kind, name, memory_bytes, expected):
    fake_torch_backend(monkeypatch, kind, [card("a", name=name, memory_bytes=memory_bytes, held_bytes=GIB)])
    [seen] = torch_probe.torch_accelerators()
    assert (str(seen.id), seen.held_bytes, seen.has_context) == (f"{kind}:0", GIB, True)
    machine = SeenMachine(accelerators=(seen,), host=seen_host(), disk=None)
    assert hardware_block(machine)["devices"][f"{kind}:0"] == expected


def test_a_backend_that_does_not_report_free_memory(monkeypatch):
    def refuse(index):
        raise RuntimeError("The device does not support querying the available free memory")

    fake_torch_backend(monkeypatch, "xpu", [card("a")], mem_get_info=refuse)
    [seen] = torch_probe.torch_accelerators()
    assert (seen.memory_bytes, seen.free_bytes, seen.held_bytes, seen.has_context) == (RTX_4090, None, None, False)


def test_apples_gpu_is_described(monkeypatch):
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
def test_accelerators_are_recognised_by_name_and_memory(name, memory_bytes, kind, expected):
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


def test_torch_build_for_xpu_is_recognised(tmp_path, monkeypatch):
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
def test_drivers_are_found_by_their_files(tmp_path, file, expected):
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


def test_cgroups_v2_count_every_enclosing_group_without_cached_files(tmp_path):
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
def test_cgroups_v1_are_found_below_the_mount(tmp_path, cgroup, mounted):
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
def test_a_cgroup_outside_the_mount_is_taken_as_the_mounts_root(tmp_path, path):
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}
    found = groups(tmp_path, f"4:memory:{path}\n", MOUNT_1.format(group="/other"), files)
    assert found == (GroupMemory(GIB, 0),)


def test_a_machine_without_control_groups_has_no_limits(tmp_path):
    assert limiting_groups(tmp_path) == ()


def test_this_hosts_memory_and_threads_are_read():
    host = seen_host()
    assert 0 < host.available_bytes <= host.memory_bytes <= psutil.virtual_memory().total
    assert host.threads == len(os.sched_getaffinity(0))


def test_a_control_groups_limit_lowers_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(host_module, "limiting_groups", lambda: (GroupMemory(GIB, GIB // 4), GroupMemory(2 * GIB, 0)))
    host = seen_host()
    assert (host.memory_bytes, host.available_bytes, host.is_limited) == (GIB, GIB - GIB // 4, True)


def test_the_disk_of_a_missing_folder_is_that_of_its_parent(tmp_path):
    disk = seen_disk(tmp_path / "not" / "yet")
    assert 0 < disk.free_bytes <= disk.memory_bytes


def test_the_printed_hardware_block_can_be_extended_and_pasted(machine, workspace):
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


def test_json_has_the_hardware_block_and_the_findings(machine, tmp_path):
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


def test_an_unknown_device_is_named_in_a_comment(machine):
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
def test_printed_rates_parse_to_the_same_value(rate, text):
    from devmap_config.profile.quantities import parse_bandwidth

    assert profile_rate(rate) == text
    assert parse_bandwidth(text) == pytest.approx(rate, rel=0.01)


def test_probe_imports_no_torch_without_an_accelerator():
    if kinds_with_a_driver() & kinds_torch_is_built_for():
        pytest.skip("there may be one")
    code = (
        "import sys; from devmap_config.cli.probe import probe;"
        "probe.main([], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
