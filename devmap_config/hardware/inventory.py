"""`Inventory`: the devices of the described machine, with what a plan may put on each."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes
from devmap_config.devices import nth_accelerator
from devmap_config.hardware.catalogue import Accelerator, load_catalogue, nearest
from devmap_config.hardware.links import links_between
from devmap_config.profile.quantities import QuantityError, Share, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.hardware.links import Link
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.located import Located
    from devmap_config.profile.schema import DeviceSection


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryDevice:
    """One device. `capacity_bytes` is what a plan may use of its `memory_bytes`; `overhead_bytes` its context takes.

    `bandwidth_bytes_per_second` and `flops_per_second` are `None` where neither profile nor catalogue tells; of them
    the efficiencies are reached.
    """

    id: Device
    memory_bytes: int
    capacity_bytes: int
    overhead_bytes: int = 0
    accelerator: Accelerator | None = None
    bandwidth_bytes_per_second: int | None = None
    flops_per_second: int | None = None
    memory_efficiency: Fraction = Fraction(1)
    compute_efficiency: Fraction = Fraction(1)


@dataclass(frozen=True)
class Inventory:
    """The devices in the order in which they are filled: accelerators by index, the CPU, the disk."""

    devices: tuple[InventoryDevice, ...]
    links: Mapping[tuple[Device, Device], Link] = field(default_factory=dict)

    @property
    def accelerators(self) -> tuple[InventoryDevice, ...]:
        """All but the CPU and the disk."""
        return tuple(device for device in self.devices if device.id.is_accelerator)

    @property
    def capacities(self) -> dict[Device, int]:
        """Capacity by device, in bytes."""
        return {device.id: device.capacity_bytes for device in self.devices}

    @property
    def kind(self) -> str:
        """The kind of the accelerators; `cuda` where there are none."""
        return next((device.id.kind for device in self.accelerators), "cuda")

    def accelerators_to_json(self) -> dict[str, dict[str, object]]:
        """What a machine is held to before it loads a plan: for the lock, outside of the digest of the hardware."""
        return {
            str(device.id): {
                "accelerator": None if device.accelerator is None else device.accelerator.name,
                "memory_bytes": device.memory_bytes,
                "overhead_bytes": device.overhead_bytes,
            }
            for device in self.accelerators
        }

    def to_json(self) -> dict[str, object]:
        """As plain data, for digests."""
        devices = [
            {
                "id": str(device.id),
                "memory_bytes": device.memory_bytes,
                "capacity_bytes": device.capacity_bytes,
                "bandwidth_bytes_per_second": device.bandwidth_bytes_per_second,
                "flops_per_second": device.flops_per_second,
                "memory_efficiency": str(device.memory_efficiency),
                "compute_efficiency": str(device.compute_efficiency),
            }
            for device in self.devices
        ]
        links = {f"{source}-{target}": asdict(link) for (source, target), link in self.links.items()}
        return {"devices": devices, "links": links}


def build_inventory(loaded: LoadedProfile, sink: Sink) -> Inventory:
    """The machine that a profile describes; what is wrong with its description goes to the sink."""
    sections = loaded.profile.hardware.devices.value
    devices = [_device(device, section, loaded, sink) for device, section in sections.items()]
    _check_kinds(tuple(sections), loaded, sink)
    _check_max_memory(loaded, sink)
    _check_links(loaded, sink)
    ordered = tuple(sorted(filter(None, devices), key=lambda device: device.id))
    return Inventory(ordered, links_between(ordered, loaded.profile.hardware.links))


def _device(device: Device, section: DeviceSection, loaded: LoadedProfile, sink: Sink) -> InventoryDevice | None:
    accelerator = _accelerator(device, section.accelerator, sink)
    if section.accelerator.value is not None and accelerator is None:
        return None
    memory = section.memory.value
    if isinstance(memory, Share):
        if accelerator is None:
            sink.error(
                "bad-quantity",
                f"the memory of {device} is a share of nothing",
                section.memory.span,
                help="write it in bytes, such as `24GiB`, or name the `accelerator`",
            )
            return None
        memory = int(accelerator.memory_bytes * memory.fraction)
    if memory is None and accelerator is None:
        if section.is_sound:
            sink.error(
                "missing-memory",
                f"{device} has no memory",
                section.key_span,
                help=f"write `{device}: {{memory: 24GiB}}`"
                + (", or an accelerator that `devmap hardware` lists" if device.is_accelerator else ""),
            )
        return None
    memory_bytes = accelerator.memory_bytes if memory is None and accelerator is not None else int(memory or 0)
    if accelerator is not None and memory_bytes > accelerator.most_memory_bytes:
        sink.error(
            "memory-beyond-card",
            f"{device} is given {format_bytes(memory_bytes)},"
            f" and a {accelerator.name} has {format_bytes(accelerator.most_memory_bytes)}",
            section.memory.span,
            help="lower it, or name another accelerator; without `memory` the catalogue's is taken",
        )
    capacity_bytes = _capacity_bytes(memory_bytes, accelerator, section)
    if capacity_bytes <= 0:
        sink.error(
            "no-capacity",
            f"nothing is left of the memory of {device} once slack, reserve and overhead are taken off",
            section.key_span,
            help="lower its `reserve`, `overhead` or `slack`, or leave the device out",
        )
        return None
    cap = loaded.profile.placement.max_memory.get(device)
    if cap is not None:
        capacity_bytes = min(capacity_bytes, _absolute(cap.value, memory_bytes))
    if section.efficiency is not None:
        reached = (section.efficiency, section.efficiency)
    elif accelerator is not None:
        reached = (accelerator.memory_efficiency, accelerator.compute_efficiency)
    else:
        reached = (Fraction(1), Fraction(1))
    return InventoryDevice(
        id=device,
        memory_bytes=memory_bytes,
        capacity_bytes=capacity_bytes,
        overhead_bytes=_overhead_bytes(memory_bytes, accelerator, section),
        accelerator=accelerator,
        bandwidth_bytes_per_second=section.bandwidth
        or (accelerator.memory_bandwidth_bytes_per_second if accelerator else None),
        flops_per_second=section.flops or (accelerator.dense_bf16_flops_per_second if accelerator else None),
        memory_efficiency=reached[0],
        compute_efficiency=reached[1],
    )


def _capacity_bytes(memory_bytes: int, accelerator: Accelerator | None, section: DeviceSection) -> int:
    """`memory × (1 − slack) − reserve − overhead`, to whole bytes."""
    slack = section.slack
    if slack is None:
        slack = accelerator.slack if accelerator else Fraction(0)
    overhead_bytes = _overhead_bytes(memory_bytes, accelerator, section)
    return int(memory_bytes * (1 - slack)) - _absolute(section.reserve, memory_bytes) - overhead_bytes


def _overhead_bytes(memory_bytes: int, accelerator: Accelerator | None, section: DeviceSection) -> int:
    if section.overhead is not None:
        return _absolute(section.overhead, memory_bytes)
    return accelerator.overhead_bytes if accelerator else 0


def _absolute(quantity: int | Share, memory_bytes: int) -> int:
    return int(memory_bytes * quantity.fraction) if isinstance(quantity, Share) else quantity


def _accelerator(device: Device, named: Located[str | None], sink: Sink) -> Accelerator | None:
    if named.value is None:
        return None
    span = named.span
    if not device.is_accelerator:
        sink.error(
            "unknown-accelerator",
            f"{device} is no accelerator",
            span,
            help=f"describe it by `{{memory: {_as_memory(named.value) or '64GiB'}}}`",
        )
        return None
    found = load_catalogue().get(named.value)
    if found is None:
        meant = nearest(named.value)
        memory = _as_memory(named.value)
        advice = f"did you mean `{meant}`? " if meant else ""
        sink.error(
            "unknown-accelerator",
            f"the catalogue has no accelerator `{named.value}`",
            span,
            help=f"write `{{memory: {memory}}}`" if memory else f"{advice}`devmap hardware` lists them all",
        )
        return None
    if found.kind != device.kind:
        sink.error(
            "unknown-accelerator",
            f"a {found.name} is no {device.kind} device",
            span,
            help=f"it is named `{nth_accelerator(found.kind, 0)}`",
        )
        return None
    return found


def _as_memory(text: str) -> str | None:
    """The text, where it is an amount of memory that was meant for `memory`."""
    try:
        parse_bytes(text)
    except QuantityError:
        return None
    return text


def _check_kinds(devices: tuple[Device, ...], loaded: LoadedProfile, sink: Sink) -> None:
    kinds = {device.kind: device for device in reversed(devices) if device.is_accelerator}
    if len(kinds) > 1:
        listed = " and ".join(sorted(kinds))
        last = max(kinds.values(), key=loaded.profile.hardware.device_span)
        sink.error(
            "mixed-accelerators",
            f"one machine cannot run {listed} devices together",
            loaded.profile.hardware.device_span(last),
            help="torch is built for one kind: keep a profile for each",
        )


def _check_max_memory(loaded: LoadedProfile, sink: Sink) -> None:
    known = declared_devices(loaded)
    for device, cap in loaded.profile.placement.max_memory.items():
        if device not in known:
            sink.error(
                "unknown-device",
                f"`max_memory` caps {device}, which the profile does not list",
                cap.key_span,
                help=f"list it under `hardware.devices`, or remove the cap; listed are {', '.join(map(str, known))}",
            )


LINKS = ("host", "peer", "disk", "network")


def _check_links(loaded: LoadedProfile, sink: Sink) -> None:
    known = {str(device) for device in declared_devices(loaded)}
    for name, described in loaded.profile.hardware.links.items():
        ends = name.split("-")
        if name in LINKS or (len(ends) == 2 and all(end in known for end in ends)):
            continue
        close = difflib.get_close_matches(name, LINKS, n=1)
        listed = f"links are {', '.join(f'`{link}`' for link in LINKS)}, and pairs of listed devices as `cuda:0-cuda:1`"
        sink.error(
            "unknown-key",
            f"`{name}` is no link of this machine",
            described.key_span,
            help=f"did you mean `{close[0]}`?" if close else listed,
        )


def declared_devices(loaded: LoadedProfile) -> tuple[Device, ...]:
    """Every device that the profile lists, also those whose description is wrong."""
    return tuple(sorted(loaded.profile.hardware.devices.value))
