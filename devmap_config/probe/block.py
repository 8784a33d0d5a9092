"""The `hardware:` block of a machine that was probed: as data, and as YAML with what was seen beside each device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import FLOPS_UNITS, format_bytes, profile_bytes, profile_duration, profile_rate
from devmap_config.devices import CPU, DISK
from devmap_config.hardware.catalogue import load_catalogue
from devmap_config.profile.schema import Hardware

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.probe.machine import SeenAccelerator, SeenMachine


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates that were measured: by device, and by link (`host`, `peer`, or a pair).

    `dispatches` are the operations a second that the host asks for.
    """

    bandwidths: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, int] = field(default_factory=dict)
    dispatches: int | None = None
    methods: Mapping[str, str] = field(default_factory=dict)
    """By device or link: how it was measured, in words."""


def hardware_block(seen: SeenMachine, measured: Measured | None = None) -> dict[str, Any]:
    """What a profile's `hardware` says of this machine; every value as a profile writes it."""
    measured = measured or Measured()
    devices: dict[str, Any] = {}
    for each in seen.accelerators:
        if (described := _device(each, measured)) is not None:
            devices[str(each.id)] = described
    devices["cpu"] = {"memory": profile_bytes(seen.host.memory_bytes), **_rates(CPU, measured)}
    if seen.disk is not None:
        devices["disk"] = {"memory": profile_bytes(seen.disk.free_bytes), **_rates(DISK, measured)}
    links = {name: f"{profile_rate(rate)} measured" for name, rate in measured.links.items()}
    dispatches = measured.dispatches
    host = {} if dispatches is None else {"dispatch": f"{profile_duration(10**9 // dispatches)} measured"}
    return {"devices": devices} | ({"links": links} if links else {}) | ({"host": host} if host else {})


def as_hardware(seen: SeenMachine) -> Hardware:
    """Return what a profile's `hardware` says of this machine, as it is read from there."""
    devices = {
        name: {"accelerator": what} if isinstance(what, str) else what
        for name, what in hardware_block(seen)["devices"].items()
    }
    return Hardware.model_validate({"devices": devices})


def _device(seen: SeenAccelerator, measured: Measured) -> dict[str, Any] | str | None:
    """A catalogue name alone where that says all; nothing where not even the memory is known."""
    rates = _rates(seen.id, measured)
    memory = None if seen.memory_bytes is None else profile_bytes(seen.memory_bytes)
    if seen.accelerator is None:
        return None if memory is None else {"memory": memory, **rates}
    if memory is None or seen.memory_bytes == load_catalogue()[seen.accelerator].memory_bytes:
        return {"accelerator": seen.accelerator, **rates} if rates else seen.accelerator
    return {"accelerator": seen.accelerator, "memory": memory, **rates}


def _rates(device: Device, measured: Measured) -> dict[str, str]:
    rates, name = {}, str(device)
    if name in measured.bandwidths:
        rates["bandwidth"] = f"{profile_rate(measured.bandwidths[name])} measured"
    if name in measured.flops:
        rates["flops"] = f"{profile_rate(measured.flops[name], FLOPS_UNITS)} measured"
    return rates


def block_text(seen: SeenMachine, block: Mapping[str, Any]) -> str:
    """The block as YAML: to be pasted into a profile, or kept in a file that profiles name in `extends`."""
    remarks = {str(each.id): _remark(each) for each in seen.accelerators}
    remarks["cpu"] = _host_remark(seen)
    if seen.disk is not None:
        remarks["disk"] = f"free of {format_bytes(seen.disk.memory_bytes)}"
    lines = ["hardware:", "  devices:"]
    lines += [f"    {device}: {_flow(what)}   # {remarks[device]}" for device, what in block["devices"].items()]
    if links := block.get("links"):
        lines.append(f"  links: {_flow(links)}")
    if host := block.get("host"):
        lines.append(f"  host: {_flow(host)}")
    left_out = [each for each in seen.accelerators if str(each.id) not in block["devices"]]
    lines += [f"  # {each.id} is left out, for nothing tells its memory: {remarks[str(each.id)]}" for each in left_out]
    return "\n".join(lines) + "\n"


def _flow(value: Mapping[str, str] | str) -> str:
    if isinstance(value, str):
        return value
    return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"


def _remark(seen: SeenAccelerator) -> str:
    parts = [
        " ".join(seen.name.split()),
        seen.uuid or "",
        "a slice: its speed is not the card's" if seen.is_slice else "",
    ]
    if seen.held_bytes:
        parts.append(f"{format_bytes(seen.held_bytes)} held by processes now")
    return ", ".join(part for part in parts if part)


def _host_remark(seen: SeenMachine) -> str:
    host = seen.host
    threads = f"{host.threads} thread{'' if host.threads == 1 else 's'}"
    limit = "as its container's limit" if host.is_limited else ""
    available = f"{format_bytes(host.available_bytes)} available now"
    return ", ".join(part for part in (host.name or "", threads, limit, available) if part)
