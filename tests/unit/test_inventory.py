"""The inventory of a profile's machine: the capacity of each device, and the rates of devices and links."""

from __future__ import annotations

from fractions import Fraction

import pytest

from devmap_config.devices import Device
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.hardware.catalogue import load_catalogue
from devmap_config.hardware.constants import LATENCY_NANOSECONDS
from devmap_config.hardware.declared import build_inventory
from devmap_config.hardware.inventory import Inventory, InventoryLink
from devmap_config.hardware.scaling import RateName, scaled
from devmap_config.plan.values import values_of_hardware
from devmap_config.profile.loading import load_profile

GIB = 2**30
H100, A100, RTX_4090 = (load_catalogue()[name] for name in ("h100-sxm", "a100-sxm-80", "rtx-4090"))
CARDS = {"cuda:0": H100, "cuda:1": A100, "cuda:2": RTX_4090}


@pytest.fixture
def declared(tmp_path):
    """Return the inventory of valid devices."""

    def make(devices, more=""):
        path = tmp_path / "profile.yaml"
        path.write_text(f"version: 1\nmodel: {{source: llama}}\nhardware:\n  devices: {{{devices}}}\n{more}")
        sink = Sink()
        inventory = build_inventory(load_profile(path, sink), sink)
        assert sink.diagnostics == ()
        return inventory

    return make


def test_a_fully_described_device_needs_no_catalogue(declared):
    [device] = declared(
        "cuda:0: {memory: 10GiB, reserve: 1GiB, overhead: 1GiB, slack: 10%, bandwidth: 1GB/s, flops: 2TFLOP/s}"
    ).devices
    assert (device.memory_bytes, device.capacity_bytes, device.overhead_bytes) == (10 * GIB, 7 * GIB, GIB)
    assert (device.bandwidth_bytes_per_second, device.flops_per_second) == (10**9, 2 * 10**12)
    assert (device.accelerator, device.memory_efficiency, device.compute_efficiency) == (None, 1, 1)


def test_an_accelerator_of_the_catalogue_has_its_values(declared):
    [device] = declared("cuda:0: h100-sxm").devices
    assert device.memory_bytes == H100.memory_bytes
    assert device.capacity_bytes == int(H100.memory_bytes * (1 - H100.slack)) - H100.overhead_bytes
    assert device.bandwidth_bytes_per_second == H100.memory_bandwidth_bytes_per_second
    assert device.flops_per_second == H100.dense_bf16_flops_per_second
    efficiencies = (device.memory_efficiency, device.compute_efficiency)
    assert efficiencies == (H100.memory_efficiency, H100.compute_efficiency)


def test_the_profile_takes_precedence_over_the_catalogue(declared):
    described = "{accelerator: h100-sxm, memory: 50%, slack: 0%, overhead: 0, efficiency: 90%, flops: 1TFLOP/s}"
    [device] = declared(f"cuda:0: {described}").devices
    assert (device.memory_bytes, device.capacity_bytes) == (H100.memory_bytes // 2, H100.memory_bytes // 2)
    assert (device.memory_efficiency, device.compute_efficiency) == (Fraction(9, 10), Fraction(9, 10))
    assert device.flops_per_second == 10**12
    assert device.bandwidth_bytes_per_second == H100.memory_bandwidth_bytes_per_second


def test_max_memory_only_lowers_capacities(declared):
    capped = declared("cuda:0: {memory: 8GiB}, cuda:1: {memory: 8GiB}", "placement: {max_memory: {0: 25%, 1: 9GiB}}\n")
    assert [device.capacity_bytes for device in capped.devices] == [2 * GIB, 8 * GIB]


def test_devices_are_listed_in_filling_order(declared):
    memory = "{memory: 1GiB}"
    inventory = declared(f"disk: {memory}, cuda:10: {memory}, cpu: {memory}, cuda:9: {memory}")
    assert [str(device.id) for device in inventory.devices] == ["cuda:9", "cuda:10", "cpu", "disk"]


def rate(inventory, source, target):
    return inventory.links[Device.from_text(source), Device.from_text(target)].bytes_per_second


def test_links_of_the_catalogue(declared):
    """The slower of two peers; through the host if one has no peer link; the slower of disk and CPU."""
    inventory = declared(
        "cuda:0: h100-sxm, cuda:1: a100-sxm-80, cuda:2: rtx-4090, cpu: {memory: 1GiB},"
        " disk: {memory: 1GiB, bandwidth: 8GB/s}"
    )
    host = {name: int(card.host_link_bytes_per_second * card.link_efficiency) for name, card in CARDS.items()}
    assert rate(inventory, "cuda:0", "cuda:1") == int(A100.peer_link_bytes_per_second * A100.link_efficiency)
    assert rate(inventory, "cuda:1", "cuda:0") == rate(inventory, "cuda:0", "cuda:1")
    assert rate(inventory, "cpu", "cuda:2") == host["cuda:2"]
    in_turn = InventoryLink(bytes_per_second=host["cuda:0"]).then(InventoryLink(bytes_per_second=host["cuda:2"]))
    assert inventory.links[Device.from_text("cuda:0"), Device.from_text("cuda:2")] == in_turn
    assert rate(inventory, "disk", "cpu") == 8 * 10**9
    assert rate(inventory, "disk", "cuda:0") == 8 * 10**9


def test_links_of_the_profile_take_precedence_and_pairs_over_all(declared):
    inventory = declared(
        "cuda:0: h100-sxm, cuda:1: h100-sxm, cuda:2: h100-sxm, cpu: {memory: 1GiB}",
        "  links: {peer: 10GB/s, host: {bandwidth: 5GB/s, latency: 1ms}, cuda:1-cuda:0: 20GB/s}\n",
    )
    assert rate(inventory, "cuda:0", "cuda:1") == rate(inventory, "cuda:1", "cuda:0") == 20 * 10**9
    assert rate(inventory, "cuda:0", "cuda:2") == 10 * 10**9
    link = inventory.links[Device("cpu"), Device("cuda", 0)]
    assert (link.bytes_per_second, link.latency_nanoseconds) == (5 * 10**9, 10**6)
    assert link.nanoseconds(5 * 10**9, copies=2, is_pinned=True) == 2 * 10**6 + 10**9


@pytest.mark.parametrize(
    ("links", "unpinned"),
    [("host: 5GB/s", 2.5e9), ("host: 55GB/s", 10e9), ("host: 55GB/s, unpinned: 8GB/s", 8e9), ("unpinned: 8GB/s", 8e9)],
)
def test_unpinned_memory_is_copied_more_slowly(declared, links, unpinned):
    inventory = declared("cuda:0: h100-sxm, cpu: {memory: 1GiB}", f"  links: {{{links}}}\n")
    for pair in ((Device("cpu"), Device("cuda", 0)), (Device("cuda", 0), Device("cpu"))):
        assert inventory.links[pair].nanoseconds(10**9) == 10**18 // int(unpinned) + LATENCY_NANOSECONDS


@pytest.mark.parametrize(("links", "together"), [("host: 5GB/s", None), ("host: 5GB/s, together: 9GB/s", 9 * 10**9)])
def test_links_together_bring_as_much_as_stated_or_as_one_link(declared, links, together):
    inventory = declared("cuda:0: h100-sxm, cuda:1: h100-sxm, cpu: {memory: 1GiB}", f"  links: {{{links}}}\n")
    assert inventory.together_bytes_per_second == together
    assert inventory.to_json().get("together_bytes_per_second") == together  # without it, digests are as they were
    assert Inventory.from_json(inventory.to_json()).together_bytes_per_second == together
    assert values_of_hardware(inventory).get("links.together_bytes_per_second") == together
    assert scaled(inventory, {RateName("links", "host"): 2.0}).together_bytes_per_second == (together and 2 * together)


def test_an_undescribed_pair_has_no_link(declared):
    assert declared("cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}, cpu: {memory: 1GiB}").links == {}
