"""Builds the inventory of the machine that a profile declares, and reports what is wrong with its description."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from devmap_config.amounts import KIBIBYTE, MEBIBYTE, format_bytes
from devmap_config.devices import Device, nth_accelerator
from devmap_config.hardware.catalogue import Accelerator, load_catalogue, nearest
from devmap_config.hardware.constants import DISPATCH_NANOSECONDS
from devmap_config.hardware.inventory import Inventory, InventoryDevice
from devmap_config.hardware.links import links_between, links_of_hosts
from devmap_config.profile.device_names import is_range, where_to_list
from devmap_config.profile.document import MappingNode, ScalarNode, is_null
from devmap_config.profile.quantities import QuantityError, Share, parse_bytes
from devmap_config.profile.writing import device_text
from devmap_config.wording import closest, number_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.located import Located
    from devmap_config.profile.schema import DeviceSection, Hardware, Link, Rates

T = TypeVar("T")


class Usual(NamedTuple):
    """The defaults of a device: the values of its accelerator in the catalogue, if any."""

    slack: Fraction = Fraction(0)
    overhead_bytes: int = 0
    bandwidth: int | None = None
    flops: int | None = None
    memory_efficiency: Fraction = Fraction(1)
    compute_efficiency: Fraction = Fraction(1)


def build_inventory(loaded: LoadedProfile, sink: Sink) -> Inventory:
    """Build the inventory from the profile's description of the machine and the catalogue.

    Args:
        loaded: the profile.
        sink: takes the diagnostics.

    Returns:
        The devices in the order of filling, with capacities in bytes, and rates and links per second.
    """
    _check_max_memory(loaded, sink)
    return machine_inventory(loaded.profile.hardware, loaded.profile.placement.max_memory, sink)


def machine_inventory(hardware: Hardware, caps: Mapping[Device, Located[int | Share]], sink: Sink) -> Inventory:
    """Build the inventory from the description of a machine, by itself, and caps on its memory."""
    by_host: dict[str | None, tuple[InventoryDevice, ...]] = {}
    for name, listing in hardware.listings.items():
        devices = [_device(device, section, caps.get(device), sink) for device, section in listing.value.items()]
        by_host[name] = tuple(sorted(filter(None, devices), key=lambda device: device.id))
    _check_kinds(hardware, sink)
    _check_links(hardware, sink)
    ordered = tuple(device for devices in by_host.values() for device in devices)
    spreads = {phase: spread for phase, spread in hardware.spread if spread is not None}
    together = hardware.links.get("together")
    return Inventory(
        ordered,
        links_between(ordered, hardware.links) if not hardware.hosts else links_of_hosts(by_host, hardware),
        _given(hardware.host.dispatch, DISPATCH_NANOSECONDS),
        spreads,
        together_bytes_per_second=None if together is None else together.bandwidth,
    )


def declared_devices(hardware: Hardware) -> tuple[Device, ...]:
    """Return every device that a profile lists, including those with a wrong description."""
    listings = hardware.listings.values()
    nodes = [listing.place.node for listing in listings]
    entries = [entry for node in nodes if isinstance(node, MappingNode) for entry in node.entries]
    keys = [entry.key for entry in entries if not is_null(entry.value)]
    named = (Device.from_text(key.text) for key in keys if not (key.is_unrendered or is_range(key.text)))
    return tuple(sorted({*(device for listing in listings for device in listing.value), *named}))


def _device(
    device: Device, section: DeviceSection, cap: Located[int | Share] | None, sink: Sink
) -> InventoryDevice | None:
    accelerator = _accelerator(device, section, sink)
    if section.accelerator.value is not None and accelerator is None:
        return None
    memory_bytes = _memory_bytes(device, section, accelerator, sink)
    if memory_bytes is None:
        return None
    usual = _usual(accelerator)
    overhead = section.overhead.value
    overhead_bytes = usual.overhead_bytes if overhead is None else _absolute(overhead, memory_bytes)
    reserve_bytes = _absolute(section.reserve.value, memory_bytes)
    slack_bytes = memory_bytes - int(memory_bytes * (1 - _given(section.slack.value, usual.slack)))
    capacity_bytes = memory_bytes - slack_bytes - reserve_bytes - overhead_bytes
    if capacity_bytes <= 0:
        taken = {"reserve": reserve_bytes, "overhead": overhead_bytes, "slack": slack_bytes}
        _report_no_capacity(device, section, memory_bytes, taken, sink)
        return None
    return InventoryDevice(
        id=device,
        memory_bytes=memory_bytes,
        capacity_bytes=capacity_bytes if cap is None else min(capacity_bytes, _absolute(cap.value, memory_bytes)),
        overhead_bytes=overhead_bytes,
        accelerator=accelerator,
        bandwidth_bytes_per_second=section.bandwidth or usual.bandwidth,
        flops_per_second=section.flops or usual.flops,
        memory_efficiency=_given(section.efficiency, usual.memory_efficiency),
        compute_efficiency=_given(section.efficiency, usual.compute_efficiency),
        decode_attention_per_second=section.attention.decode,
        prefill_attention_per_second=section.attention.prefill,
        experts_bytes_per_second=section.experts,
        decode_products_per_second=section.products.decode,
        prefill_products_per_second=section.products.prefill,
        by_dtype={dtype: _rates(rates, section, usual) for dtype, rates in section.dtypes.items()},
    )


def _report_no_capacity(
    device: Device, section: DeviceSection, memory_bytes: int, taken: Mapping[str, int], sink: Sink
) -> None:
    """Report that nothing is left of a device's memory, at the largest of the amounts that the profile leaves free."""
    given = {"reserve": section.reserve, "overhead": section.overhead, "slack": section.slack}
    written = {key: value for key, value in given.items() if value.is_written}
    largest = max(written, key=lambda key: taken[key], default=None)
    amounts = ", ".join(f"{key} takes {format_bytes(size_bytes)}" for key, size_bytes in taken.items() if size_bytes)
    lower = " or ".join(f"`{key}`" for key in written) or "`overhead` or `slack`"
    sink.error(
        "no-capacity",
        f"nothing is left of the {format_bytes(memory_bytes)} of {device}: {amounts}",
        section.key_span if largest is None else written[largest].span,
        help=f"lower its {lower}, or leave the device out",
    )


def _rates(rates: Rates, section: DeviceSection, usual: Usual) -> dict[str, int | None]:
    """Return the figures that depend on the dtype; a figure that is not given for a dtype is the same as for others."""
    bandwidth = rates.bandwidth or section.bandwidth or usual.bandwidth
    flops = rates.flops or section.flops or usual.flops
    products = section.products if rates.bandwidth is None else rates.products
    return {
        "bandwidth_bytes_per_second": bandwidth,
        "flops_per_second": flops,
        "experts_bytes_per_second": section.experts if rates.bandwidth is None else None,
        "decode_products_per_second": rates.products.decode or products.decode,
        "prefill_products_per_second": rates.products.prefill or products.prefill,
    }


def _memory_bytes(device: Device, section: DeviceSection, accelerator: Accelerator | None, sink: Sink) -> int | None:
    memory = section.memory.value
    if not section.doubtful:
        _warn_of_few_bytes(section.memory, str(device), sink)
    if accelerator is not None:
        memory_bytes = accelerator.memory_bytes if memory is None else _absolute(memory, accelerator.memory_bytes)
        if memory_bytes > accelerator.most_memory_bytes:
            sink.error(
                "memory-beyond-card",
                f"{device} is given {format_bytes(memory_bytes)},"
                f" and a {accelerator.name} has {format_bytes(accelerator.most_memory_bytes)}",
                section.memory.span,
                help=f"lower it, or leave it out; a card that was modified is described by itself:"
                f" `{device}: {_as_modified(section, accelerator)}`, and its links",
            )
        return memory_bytes
    if isinstance(memory, Share):
        sink.error(
            "bad-quantity",
            f"the memory of {device} is a share of an unknown amount",
            section.memory.span,
            help="write it in bytes, such as `24GiB`, or name the `accelerator`",
        )
        return None
    if memory is None and not section.doubtful & {"memory", "accelerator"}:
        sink.error(
            "missing-memory",
            f"{device} has no memory",
            section.key_span,
            help=f"write `{device}: {device_text(section.changed(memory=24 * 2**30))}`"
            + (", or an accelerator that `devmap hardware` lists" if device.is_accelerator else ""),
        )
    return memory


def _as_modified(section: DeviceSection, accelerator: Accelerator) -> str:
    """Return the lines that describe a card with more memory than its kind has, with all its other figures."""
    described = section.changed(
        accelerator=None,
        overhead=accelerator.overhead_bytes,
        slack=accelerator.slack,
        bandwidth=accelerator.memory_bandwidth_bytes_per_second,
        flops=accelerator.dense_bf16_flops_per_second,
        efficiency=accelerator.memory_efficiency,
    )
    return device_text(described)


def _usual(accelerator: Accelerator | None) -> Usual:
    if accelerator is None:
        return Usual()
    return Usual(
        slack=accelerator.slack,
        overhead_bytes=accelerator.overhead_bytes,
        bandwidth=accelerator.memory_bandwidth_bytes_per_second,
        flops=accelerator.dense_bf16_flops_per_second,
        memory_efficiency=accelerator.memory_efficiency,
        compute_efficiency=accelerator.compute_efficiency,
    )


def _given(value: T | None, usual: T) -> T:
    return usual if value is None else value


def _absolute(quantity: int | Share, memory_bytes: int) -> int:
    return int(memory_bytes * quantity.fraction) if isinstance(quantity, Share) else quantity


def _accelerator(device: Device, section: DeviceSection, sink: Sink) -> Accelerator | None:
    named = section.accelerator
    if named.value is None:
        return None
    accelerator, memory = load_catalogue().get(named.value), _as_memory(named.value)
    if not device.is_accelerator:
        given = {} if section.memory.is_written else {"memory": parse_bytes(memory or "64GiB")}
        described = device_text(section.changed(accelerator=None, **given))
        message, help = f"{device} is not an accelerator", f"write `{device}: {described}`"
    elif accelerator is None:
        close = nearest(named.value)
        message = f"the catalogue has no accelerator `{named.value}`"
        if memory:
            help = f"write `{device}: {{memory: {memory}}}`"
        elif close:
            help = f"did you mean `{close}`? `devmap hardware` lists them all"
        else:
            help = f"describe it: `{device}: {{memory: 12GiB, bandwidth: 650GB/s, flops: 110TFLOP/s}}`"
    elif accelerator.kind != device.kind:
        message = f"a {accelerator.name} is no {device.kind} device"
        help = f"it is named `{nth_accelerator(accelerator.kind, 0)}`"
    else:
        return accelerator
    sink.error("unknown-accelerator", message, named.span, help=help)
    return None


def _as_memory(text: str) -> str | None:
    """Return the text if it is an amount of memory, which then was meant for `memory`; else `None`."""
    try:
        parse_bytes(text)
    except QuantityError:
        return None
    return text


def _warn_of_few_bytes(memory: Located[Any], whose: str, sink: Sink) -> None:
    """Warn of a bare number that is too small to be meant as bytes."""
    node = memory.place.node
    number = number_in(node.text) if isinstance(node, ScalarNode) else None
    if isinstance(node, ScalarNode) and number is not None and 0 < number < MEBIBYTE:
        unit = "GiB" if number < KIBIBYTE else "MiB"
        sink.warning(
            "few-bytes",
            f"without a unit, {number:,} of {whose} are bytes",
            memory.span,
            help=f"write `{node.text}{unit}`, if that is meant; else `{node.text}B`",
        )


def _check_kinds(hardware: Hardware, sink: Sink) -> None:
    kinds = {device.kind: device for device in reversed(tuple(hardware.listed)) if device.is_accelerator}
    if len(kinds) > 1:
        listed = " and ".join(sorted(kinds))
        last = max(kinds.values(), key=hardware.device_span)
        sink.error(
            "mixed-accelerators",
            f"one {'pipeline' if hardware.hosts else 'machine'} cannot run {listed} devices together",
            hardware.device_span(last),
            help="torch is built for one kind: keep a profile for each",
        )


def _check_max_memory(loaded: LoadedProfile, sink: Sink) -> None:
    hardware = loaded.profile.hardware
    known = declared_devices(hardware)
    for device, cap in loaded.profile.placement.max_memory.items():
        _warn_of_few_bytes(cap, f"{device}'s cap", sink)
        if device not in known and hardware.knows_devices:
            sink.error(
                "unknown-device",
                f"`max_memory` caps {device}, which the profile does not list",
                cap.key_span,
                help=f"remove the cap, or {where_to_list(device, known)}",
            )


LINKS = ("host", "together", "unpinned", "peer", "disk", "network")

OTHER_LINKS = {
    "pcie": "host",
    "pci": "host",
    "cpu": "host",
    "nvlink": "peer",
    "p2p": "peer",
    "gpu": "peer",
    "nvme": "disk",
    "ssd": "disk",
    "ethernet": "network",
    "infiniband": "network",
}
"""The names of links by their other names."""


def _check_links(hardware: Hardware, sink: Sink) -> None:
    sections = [
        (hardware.links, declared_devices(hardware)),
        *((host.links, tuple(host.devices.value)) for host in hardware.hosts.values()),
    ]
    for links, reached in sections:
        known = {str(device.of_its_host) for device in reached}
        _check_names_of_links(links, known, sink, are_all=hardware.knows_devices)


def _check_names_of_links(links: Mapping[str, Link], known: set[str], sink: Sink, *, are_all: bool) -> None:
    for name, described in links.items():
        ends = name.split("-")
        if name in LINKS or (len(ends) == 2 and all(end in known or not are_all for end in ends)):
            continue
        close = OTHER_LINKS.get(name.lower()) or closest(name, LINKS)
        listed = f"links are {', '.join(f'`{link}`' for link in LINKS)}, and pairs of listed devices as `cuda:0-cuda:1`"
        sink.error(
            "unknown-key",
            f"`{name}` is not a link of this machine",
            described.key_span,
            help=f"did you mean `{close}`?" if close else listed,
        )
