"""The rates of a machine by name, and the same machine with some of them scaled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, overload

from devmap_config.devices import CPU, DISK
from devmap_config.hardware.inventory import RATE_NAMES, Inventory
from devmap_config.profile.quantities import KnownRate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.hardware.inventory import InventoryDevice


class RateName(NamedTuple):
    """A rate of a machine: of a device, of a link, or of the `host`."""

    subject: str
    name: str

    def __str__(self) -> str:
        """Return the name for people."""
        return f"{self.subject} {self.name.removesuffix('_bytes_per_second').removesuffix('_per_second')}"


def rate_names(inventory: Inventory) -> list[RateName]:
    """Return the names of a machine's rates; the rate of a disk is that of its link."""
    names = [
        RateName(str(device.id), name)
        for device in inventory.devices
        for name in RATE_NAMES
        if device.id != DISK and device.reached(name)
    ]
    links = {kind: None for pair in inventory.links for kind in _kinds(*pair)}
    return [*names, *(RateName("links", kind) for kind in links), DISPATCH]


DISPATCH = RateName("host", "dispatch")


def _kinds(source: Device, target: Device) -> tuple[str, ...]:
    """Return the links of a profile that connect two devices."""
    if source.is_accelerator and target.is_accelerator:
        return ("peer",)
    if {source, target} == {CPU, DISK}:
        return ("disk",)
    return ("host", "unpinned") if CPU in (source, target) else ()


def scaled(inventory: Inventory, factors: Mapping[RateName, float]) -> Inventory:
    """Return a machine with the named rates multiplied by their factors, and marked as calibrated."""
    links = {
        pair: replace(
            link,
            bytes_per_second=_times(link.bytes_per_second, factors.get(RateName("links", kinds[0]))),
            unpinned_bytes_per_second=_times(link.unpinned_bytes_per_second, factors.get(RateName("links", kinds[-1]))),
        )
        for pair, link in inventory.links.items()
        if (kinds := _kinds(*pair))
    }
    for pair, link in inventory.links.items():
        if pair not in links:  # from a disk to a card, as copying overlaps reading
            through = [links[CPU, device].unpinned for device in pair if (CPU, device) in links]
            links[pair] = min(through, key=lambda link: link.bytes_per_second, default=link)
    dispatch = factors.get(DISPATCH)
    return Inventory(
        tuple(_scaled_device(device, factors) for device in inventory.devices),
        links,
        _times(inventory.dispatch_nanoseconds, None if dispatch is None else 1 / dispatch),
        together_bytes_per_second=_times(inventory.together_bytes_per_second, factors.get(RateName("links", "host"))),
    )


def _scaled_device(device: InventoryDevice, factors: Mapping[RateName, float]) -> InventoryDevice:
    rates = {name: _times(device.reached(name), factors.get(RateName(str(device.id), name))) for name in RATE_NAMES}
    given = {
        name: rate for name, rate in rates.items() if rate is not None and RateName(str(device.id), name) in factors
    }
    return replace(device, **given)  # type: ignore[arg-type]


@overload
def _times(rate: int, factor: float | None) -> int: ...
@overload
def _times(rate: int | None, factor: float | None) -> int | None: ...
def _times(rate: int | None, factor: float | None) -> int | None:
    return rate if rate is None or factor is None else KnownRate(max(round(rate * factor), 1), "calibrated")
