"""`Inventory`: the devices of the described machine, with what a plan may put on each."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from devmap_config.amounts import format_bytes
from devmap_config.hardware.catalogue import Accelerator, load_catalogue, nearest
from devmap_config.hardware.links import links_between
from devmap_config.profile.quantities import QuantityError, Share, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.hardware.links import Link
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.located import Located
    from devmap_config.profile.schema import Device as DeviceSpecification


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device. `capacity_bytes` is what a plan may use of its `memory_bytes`; `overhead_bytes` its context takes.

    `bandwidth_bytes_per_second` and `flops_per_second` are `None` where neither profile nor catalogue tells; of them
    the efficiencies are reached.
    """

    id: str
    memory_bytes: int
    capacity_bytes: int
    overhead_bytes: int = 0
    accelerator: Accelerator | None = None
    bandwidth_bytes_per_second: int | None = None
    flops_per_second: int | None = None
    memory_efficiency: Fraction = Fraction(1)
    compute_efficiency: Fraction = Fraction(1)

    @property
    def is_accelerator(self) -> bool:
        """Whether it is anything but the CPU and the disk."""
        return self.id not in ("cpu", "disk")


@dataclass(frozen=True)
class Inventory:
    """The devices in the order in which they are filled: accelerators by index, the CPU, the disk."""

    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)

    @property
    def capacities(self) -> dict[str, int]:
        """Capacity by device, in bytes."""
        return {device.id: device.capacity_bytes for device in self.devices}

    @property
    def kind(self) -> str:
        """The kind of the accelerators; `cuda` where there are none."""
        return next((device.id.partition(":")[0] for device in self.devices if device.is_accelerator), "cuda")

    def accelerators_to_json(self) -> dict[str, dict[str, object]]:
        """What a machine is held to before it loads a plan: for the lock, outside of the digest of the hardware."""
        return {
            device.id: {
                "accelerator": None if device.accelerator is None else device.accelerator.name,
                "memory_bytes": device.memory_bytes,
                "overhead_bytes": device.overhead_bytes,
            }
            for device in self.devices
            if device.is_accelerator
        }

    def to_json(self) -> dict[str, object]:
        """As plain data, for digests."""
        devices = [
            {
                "id": device.id,
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
    specifications = loaded.profile.hardware.devices.value
    devices = [
        device
        for name, specification in specifications.items()
        if (device := _device(name, specification, loaded, sink)) is not None
    ]
    _check_kinds(tuple(specifications), loaded, sink)
    _check_max_memory(loaded, sink)
    _check_links(loaded, sink)
    ordered = tuple(sorted(devices, key=lambda device: fill_order(device.id)))
    return Inventory(ordered, links_between(ordered, loaded.profile.hardware.links))


def fill_order(device: str) -> tuple[int, str, int]:
    """Sorts devices as they are filled: accelerators by index, then `cpu`, then `disk`."""
    kind, _, index = device.partition(":")
    return ({"cpu": 1, "disk": 2}.get(device, 0), kind, int(index or 0))


def _device(name: str, specification: DeviceSpecification, loaded: LoadedProfile, sink: Sink) -> Device | None:
    accelerator = _accelerator(name, specification.accelerator, sink)
    if specification.accelerator.value is not None and accelerator is None:
        return None
    memory = specification.memory.value
    if isinstance(memory, Share):
        if accelerator is None:
            sink.error(
                "bad-quantity",
                f"the memory of {name} is a share of nothing",
                specification.memory.span,
                help="write it in bytes, such as `24GiB`, or name the `accelerator`",
            )
            return None
        memory = int(accelerator.memory_bytes * memory.fraction)
    if memory is None and accelerator is None:
        if specification.is_sound:
            sink.error(
                "missing-memory",
                f"{name} has no memory",
                specification.key_span,
                help=f"write `{name}: {{memory: 24GiB}}`"
                + ("" if name in ("cpu", "disk") else ", or an accelerator that `devmap hardware` lists"),
            )
        return None
    memory_bytes = accelerator.memory_bytes if memory is None and accelerator is not None else int(memory or 0)
    if accelerator is not None and memory_bytes > accelerator.most_memory_bytes:
        sink.error(
            "memory-beyond-card",
            f"{name} is given {format_bytes(memory_bytes)},"
            f" and a {accelerator.name} has {format_bytes(accelerator.most_memory_bytes)}",
            specification.memory.span,
            help="lower it, or name another accelerator; without `memory` the catalogue's is taken",
        )
    capacity_bytes = _capacity_bytes(memory_bytes, accelerator, specification)
    if capacity_bytes <= 0:
        sink.error(
            "no-capacity",
            f"nothing is left of the memory of {name} once slack, reserve and overhead are taken off",
            specification.key_span,
            help="lower its `reserve`, `overhead` or `slack`, or leave the device out",
        )
        return None
    cap = loaded.profile.placement.max_memory.get(name)
    if cap is not None:
        capacity_bytes = min(capacity_bytes, _absolute(cap.value, memory_bytes))
    if specification.efficiency is not None:
        reached = (specification.efficiency, specification.efficiency)
    elif accelerator is not None:
        reached = (accelerator.memory_efficiency, accelerator.compute_efficiency)
    else:
        reached = (Fraction(1), Fraction(1))
    return Device(
        id=name,
        memory_bytes=memory_bytes,
        capacity_bytes=capacity_bytes,
        overhead_bytes=_overhead_bytes(memory_bytes, accelerator, specification),
        accelerator=accelerator,
        bandwidth_bytes_per_second=specification.bandwidth
        or (accelerator.memory_bandwidth_bytes_per_second if accelerator else None),
        flops_per_second=specification.flops or (accelerator.dense_bf16_flops_per_second if accelerator else None),
        memory_efficiency=reached[0],
        compute_efficiency=reached[1],
    )


def _capacity_bytes(memory_bytes: int, accelerator: Accelerator | None, specification: DeviceSpecification) -> int:
    """`memory × (1 − slack) − reserve − overhead`, to whole bytes."""
    slack = specification.slack
    if slack is None:
        slack = accelerator.slack if accelerator else Fraction(0)
    overhead_bytes = _overhead_bytes(memory_bytes, accelerator, specification)
    return int(memory_bytes * (1 - slack)) - _absolute(specification.reserve, memory_bytes) - overhead_bytes


def _overhead_bytes(memory_bytes: int, accelerator: Accelerator | None, specification: DeviceSpecification) -> int:
    if specification.overhead is not None:
        return _absolute(specification.overhead, memory_bytes)
    return accelerator.overhead_bytes if accelerator else 0


def _absolute(quantity: int | Share, memory_bytes: int) -> int:
    return int(memory_bytes * quantity.fraction) if isinstance(quantity, Share) else quantity


def _accelerator(name: str, named: Located[str | None], sink: Sink) -> Accelerator | None:
    if named.value is None:
        return None
    span = named.span
    if name in ("cpu", "disk"):
        sink.error(
            "unknown-accelerator",
            f"{name} is no accelerator",
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
    if found.kind != name.partition(":")[0]:
        sink.error(
            "unknown-accelerator",
            f"a {found.name} is no {name.partition(':')[0]} device",
            span,
            help=f"it is named `{found.kind}{'' if found.kind == 'mps' else ':0'}`",
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


def _check_kinds(names: tuple[str, ...], loaded: LoadedProfile, sink: Sink) -> None:
    kinds: Mapping[str, str] = {name.partition(":")[0]: name for name in reversed(names) if name not in ("cpu", "disk")}
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
    for name, cap in loaded.profile.placement.max_memory.items():
        if name not in known:
            sink.error(
                "unknown-device",
                f"`max_memory` caps {name}, which the profile does not list",
                cap.key_span,
                help=f"list it under `hardware.devices`, or remove the cap; listed are {', '.join(known)}",
            )


LINKS = ("host", "peer", "disk", "network")


def _check_links(loaded: LoadedProfile, sink: Sink) -> None:
    known = declared_devices(loaded)
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


def declared_devices(loaded: LoadedProfile) -> tuple[str, ...]:
    """Every device that the profile lists, also those whose description is wrong."""
    return tuple(sorted(loaded.profile.hardware.devices.value, key=fill_order))
