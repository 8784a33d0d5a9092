"""The bandwidths between devices: those of the profile, or else of the catalogue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from devmap_config.devices import DISK
from devmap_config.hardware.constants import (
    LATENCY_NANOSECONDS,
    NETWORK_LATENCY_NANOSECONDS,
    UNPINNED_MOST_BYTES_PER_SECOND,
    UNPINNED_SHARE,
)
from devmap_config.hardware.inventory import InventoryLink

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from fractions import Fraction

    from devmap_config.devices import Device
    from devmap_config.hardware.inventory import InventoryDevice
    from devmap_config.profile.schema import Hardware
    from devmap_config.profile.schema import Link as LinkSpecification


def links_between(
    devices: Sequence[InventoryDevice], specified: Mapping[str, LinkSpecification]
) -> dict[tuple[Device, Device], InventoryLink]:
    """Return the link of every ordered pair of devices, if it is known: the profile's, or else the catalogue's.

    The name of a pair outranks `peer`, `host` and `disk`. Accelerators that cannot reach each other copy through the
    host's memory, and so do copies from the disk.
    """
    given = {name: _given(specification) for name, specification in specified.items()}
    links: dict[tuple[Device, Device], InventoryLink] = {}
    for source in devices:
        for target in devices:
            if source is not target:
                ends = (source.id.of_its_host, target.id.of_its_host)
                pair = given.get(f"{ends[0]}-{ends[1]}") or given.get(f"{ends[1]}-{ends[0]}")
                if (link := pair or _usual(source, target, given)) is not None:
                    links[source.id, target.id] = link
    return links


def links_of_hosts(
    by_host: Mapping[str | None, Sequence[InventoryDevice]], hardware: Hardware
) -> dict[tuple[Device, Device], InventoryLink]:
    """Return the links within each host, and between accelerators of two hosts, which the slower of their networks
    limits.
    """
    links: dict[tuple[Device, Device], InventoryLink] = {}
    for name, devices in by_host.items():
        own = {} if name is None else hardware.hosts[name].links
        links |= links_between(devices, {**hardware.links, **own})
    for source, devices in by_host.items():
        for target, others in by_host.items():
            if source is None or target is None or source == target:
                continue
            ends = _network(hardware, source), _network(hardware, target)
            if (link := _slower(*ends)) is not None:
                latency = max(end.latency_nanoseconds for end in ends if end is not None)
                between = InventoryLink(bytes_per_second=link.bytes_per_second, latency_nanoseconds=latency)
                links |= {
                    (device.id, other.id): between for device in devices for other in others if _talks(device, other)
                }
    return links


def _talks(device: InventoryDevice, other: InventoryDevice) -> bool:
    return DISK not in (device.id.of_its_host, other.id.of_its_host)


def _network(hardware: Hardware, host: str) -> InventoryLink | None:
    network, usual = hardware.hosts[host].network, hardware.links.get("network")
    bandwidth = network.bandwidth or (None if usual is None else usual.bandwidth)
    latency = network.latency if network.latency is not None or usual is None else usual.latency
    if bandwidth is None:
        return None
    return InventoryLink(
        bytes_per_second=bandwidth,
        latency_nanoseconds=NETWORK_LATENCY_NANOSECONDS if latency is None else int(latency),
    )


def _given(specification: LinkSpecification) -> InventoryLink:
    latency = specification.latency
    return InventoryLink(
        bytes_per_second=specification.bandwidth,
        latency_nanoseconds=LATENCY_NANOSECONDS if latency is None else int(latency),
    )


def _usual(
    source: InventoryDevice, target: InventoryDevice, given: Mapping[str, InventoryLink]
) -> InventoryLink | None:
    if source.id.is_accelerator and target.id.is_accelerator:
        hosts = _in_turn(_host(source, given), _host(target, given))
        return given.get("peer") or _slower(_peer(source), _peer(target)) or hosts
    accelerator = next((device for device in (source, target) if device.id.is_accelerator), None)
    disk = next((device for device in (source, target) if device.id.of_its_host == DISK), None)
    reading = None if disk is None else given.get("disk") or _reading(disk)
    if accelerator is None:
        return reading
    host = _host(accelerator, given)
    return host if disk is None or host is None else _slower(reading, host.unpinned)  # reading and copying overlap


def _in_turn(first: InventoryLink | None, second: InventoryLink | None) -> InventoryLink | None:
    return None if first is None or second is None else first.then(second)


def _slower(first: InventoryLink | None, second: InventoryLink | None) -> InventoryLink | None:
    if first is None or second is None:
        return None
    return min(first, second, key=lambda link: link.bytes_per_second)


def _peer(device: InventoryDevice) -> InventoryLink | None:
    card = device.accelerator
    return None if card is None else _reached(card.peer_link_bytes_per_second, card.link_efficiency)


def _host(device: InventoryDevice, given: Mapping[str, InventoryLink]) -> InventoryLink | None:
    card = device.accelerator
    usual = None if card is None else _reached(card.host_link_bytes_per_second, card.link_efficiency)
    return _unpinned(given.get("host") or usual, given.get("unpinned"))


def _unpinned(link: InventoryLink | None, given: InventoryLink | None) -> InventoryLink | None:
    """Return a link with its rate from memory that is not pinned."""
    if link is None:
        return None
    usual = max(min(int(link.bytes_per_second * UNPINNED_SHARE), UNPINNED_MOST_BYTES_PER_SECOND), 1)
    return replace(link, unpinned_bytes_per_second=usual if given is None else given.bytes_per_second)


def _reading(disk: InventoryDevice) -> InventoryLink | None:
    rate = disk.reached("bandwidth_bytes_per_second")
    return None if rate is None else InventoryLink(bytes_per_second=rate)


def _reached(rate: int | None, efficiency: Fraction) -> InventoryLink | None:
    return None if rate is None else InventoryLink(bytes_per_second=max(int(rate * efficiency), 1))
