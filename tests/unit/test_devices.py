"""Devices are values that compare, sort and print in one way, and only one module parses their names."""

from __future__ import annotations

import ast
import copy
import random

import pytest
from conftest import REPOSITORY

from devmap_config.devices import CPU, DISK, Device, nth_accelerator
from devmap_config.profile.device_names import device_meant, expand_devices

IN_ORDER = [Device("cuda", 0), Device("cuda", 2), Device("cuda", 10), Device("mps"), Device("xpu", 1), CPU, DISK]


def test_there_is_one_object_for_each_device():
    for device in IN_ORDER:
        assert Device(device.kind, device.index) is copy.deepcopy(device) is device
    assert len(set(IN_ORDER)) == len(IN_ORDER)


def test_a_device_does_not_change():
    with pytest.raises(AttributeError, match="`index` of a device cannot be set"):
        CPU.index = 1


def test_devices_sort_in_filling_order():
    shuffled = random.Random(0).sample(IN_ORDER, len(IN_ORDER))
    assert shuffled != IN_ORDER
    assert sorted(shuffled) == IN_ORDER


@pytest.mark.parametrize("device", IN_ORDER, ids=str)
def test_a_devices_text_is_its_name_in_locks_and_profiles(device):
    assert Device.from_text(str(device)) is device
    assert expand_devices(str(device), "npu") == (device,)


@pytest.mark.parametrize(
    ("device", "in_device_map", "is_accelerator"),
    [(Device("cuda", 2), 2, True), (Device("mps"), "mps", True), (CPU, "cpu", False), (DISK, "disk", False)],
    ids=str,
)
def test_the_name_of_a_device_for_transformers(device, in_device_map, is_accelerator):
    assert (device.in_device_map, device.is_accelerator) == (in_device_map, is_accelerator)


def test_a_number_is_an_accelerator_of_the_machines_kind():
    assert [device_meant(named, "xpu") for named in (1, Device("cuda", 1), CPU)] == [
        Device("xpu", 1),
        Device("cuda", 1),
        CPU,
    ]
    assert (nth_accelerator("mps", 0), nth_accelerator("mps", 1)) == (Device("mps"), Device("mps", 1))


# -- nobody else takes names apart -------------------------------------------------------------------------------------

PACKAGE = REPOSITORY / "devmap_config"

SOURCES = sorted(
    {*PACKAGE.rglob("*.py")}
    - {PACKAGE / "devices.py", PACKAGE / "profile" / "device_names.py"}
    - {PACKAGE / "exports" / "vllm_files" / "cluster.py"}  # which runs on hosts without this package
)

OTHER_COLONS = {"probe/cgroup.py", "probe/host.py", "cli/sides.py"}
"""Where other things are taken apart at colons: the kernel's lines, and `REVISION:PATH` of `devmap diff`."""

STORAGE = {"cpu", "disk"}


def colons(tree):
    """Return the places at which code splits a text at a colon."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            splits = node.func.attr in ("partition", "rpartition", "split", "rsplit")
            if splits and any(isinstance(each, ast.Constant) and each.value == ":" for each in node.args):
                yield ast.unparse(node)


def comparisons(tree):
    """Return the places at which code compares something with the text of a device; torch's devices have a `type`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} & STORAGE
            if texts and not ast.unparse(node.left).endswith(".type") and ast.unparse(node) not in OF_LINKS:
                yield ast.unparse(node)


OF_LINKS = {"'disk' in bandwidths"}
"""The name of a link, which may be that of a device."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_one_module_parses_device_names(path):
    tree = ast.parse(path.read_text())
    assert list(comparisons(tree)) == []
    assert bool(list(colons(tree))) == (str(path.relative_to(PACKAGE)) in OTHER_COLONS)


@pytest.mark.parametrize(
    "source",
    [
        "device.partition(':')",
        "use.id.split(':', 1)",
        "device in ('cpu', 'disk')",
        "device not in ['cpu', 'disk']",
        "device == 'cpu'",
        "'disk' in capacities",
        "stored_on == runs_on == 'cpu'",
    ],
)
def test_the_check_finds_each_way_of_parsing_a_name(source):
    tree = ast.parse(source)
    assert [*colons(tree), *comparisons(tree)] == [source]
