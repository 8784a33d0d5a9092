"""How fast bytes go from one device to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.devices import DISK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from fractions import Fraction

    from devmap_config.devices import Device
    from devmap_config.hardware.inventory import InventoryDevice
    from devmap_config.profile.schema import Link as LinkSpecification

NANOSECONDS_PER_SECOND = 10**9

LATENCY_NANOSECONDS = 10_000
"""Until a copy begins, where the profile does not say: 10 µs a peer hop (aiconfigurator)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way for bytes, one direction at a time."""

    bytes_per_second: int
    latency_nanoseconds: int = LATENCY_NANOSECONDS

    def nanoseconds(self, size_bytes: int, copies: int = 1) -> int:
        """How long it takes to copy this much, in so many pieces."""
        return copies * self.latency_nanoseconds + size_bytes * NANOSECONDS_PER_SECOND // self.bytes_per_second

    def then(self, other: Link) -> Link:
        """One link after the other: what takes two copies."""
        both = self.bytes_per_second * other.bytes_per_second // (self.bytes_per_second + other.bytes_per_second)
        return Link(
            bytes_per_second=max(both, 1), latency_nanoseconds=self.latency_nanoseconds + other.latency_nanoseconds
        )


def links_between(
    devices: Sequence[InventoryDevice], specified: Mapping[str, LinkSpecification]
) -> dict[tuple[Device, Device], Link]:
    """The link of every ordered pair of devices of which it is known: the profile's, else the catalogue's.

    A pair by name comes before `peer`, `host` and `disk`. Accelerators that cannot reach each other go through the
    host's memory, and what is on the disk through it as well.
    """
    given = {name: _given(specification) for name, specification in specified.items()}
    links: dict[tuple[Device, Device], Link] = {}
    for source in devices:
        for target in devices:
            if source is not target:
                pair = given.get(f"{source.id}-{target.id}") or given.get(f"{target.id}-{source.id}")
                if (link := pair or _usual(source, target, given)) is not None:
                    links[source.id, target.id] = link
    return links


def _given(specification: LinkSpecification) -> Link:
    latency = specification.latency
    return Link(
        bytes_per_second=specification.bandwidth,
        latency_nanoseconds=LATENCY_NANOSECONDS if latency is None else int(latency),
    )


def _usual(source: InventoryDevice, target: InventoryDevice, given: Mapping[str, Link]) -> Link | None:
    if source.id.is_accelerator and target.id.is_accelerator:
        return given.get("peer") or _peer(source, target) or _in_turn(_host(source, given), _host(target, given))
    accelerator = next((device for device in (source, target) if device.id.is_accelerator), None)
    disk = next((device for device in (source, target) if device.id == DISK), None)
    reading = None if disk is None else given.get("disk") or _reading(disk)
    if accelerator is None:
        return reading
    host = _host(accelerator, given)
    return host if disk is None else _in_turn(reading, host)


def _in_turn(first: Link | None, second: Link | None) -> Link | None:
    return None if first is None or second is None else first.then(second)


def _peer(source: InventoryDevice, target: InventoryDevice) -> Link | None:
    rates = [
        _share(device.accelerator.peer_link_bytes_per_second, device.accelerator.link_efficiency)
        for device in (source, target)
        if device.accelerator is not None and device.accelerator.peer_link_bytes_per_second is not None
    ]
    return Link(bytes_per_second=min(rates)) if len(rates) == 2 else None


def _host(device: InventoryDevice, given: Mapping[str, Link]) -> Link | None:
    if "host" in given:
        return given["host"]
    card = device.accelerator
    if card is None or card.host_link_bytes_per_second is None:
        return None
    return Link(bytes_per_second=_share(card.host_link_bytes_per_second, card.link_efficiency))


def _reading(disk: InventoryDevice) -> Link | None:
    rate = disk.bandwidth_bytes_per_second
    return None if rate is None else Link(bytes_per_second=_share(rate, disk.memory_efficiency))


def _share(rate: int | None, efficiency: Fraction) -> int:
    return int((rate or 0) * efficiency)
