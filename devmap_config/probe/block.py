"""Makes the `hardware:` block of a probed machine: as data, and as YAML with the findings beside each device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from devmap_config.amounts import FLOPS_UNITS, counted, format_bytes, profile_bytes, profile_duration, profile_rate
from devmap_config.hardware.catalogue import load_catalogue
from devmap_config.profile.schema import Hardware

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.probe.machine import SeenAccelerator, SeenMachine
    from devmap_config.probe.rates import Rate

Route: TypeAlias = tuple[str, ...]
"""The keys that lead to a figure in the block: `("devices", "cpu", "bandwidth")`."""


def hardware_block(seen: SeenMachine, measured: Mapping[Route, Rate] | None = None) -> dict[str, Any]:
    """Return the `hardware` of a profile for this machine, with values in the form of a profile."""
    devices = {
        str(accelerator.id): _device(accelerator) for accelerator in seen.accelerators if is_described(accelerator)
    }
    devices["cpu"] = {"memory": profile_bytes(seen.host.memory_bytes)}
    if seen.disk is not None:
        devices["disk"] = {"memory": profile_bytes(seen.disk.free_bytes)}
    block: dict[str, Any] = {"devices": devices}
    for route, rate in (measured or {}).items():
        section = block
        for name in route[:-1]:
            section = section.setdefault(name, {})
        section[route[-1]] = f"{_amount(route, rate.per_second)} measured"
    alone = {name: what["accelerator"] for name, what in devices.items() if [*what] == ["accelerator"]}
    return block | {"devices": devices | alone}


def as_hardware(seen: SeenMachine) -> Hardware:
    """Return the validated `hardware` of a profile for this machine."""
    devices = {
        name: {"accelerator": what} if isinstance(what, str) else what
        for name, what in hardware_block(seen)["devices"].items()
    }
    return Hardware.model_validate({"devices": devices})


def is_described(seen: SeenAccelerator) -> bool:
    """Return whether a card's memory is known, from the catalogue or the card; a profile cannot describe other
    cards.
    """
    return seen.accelerator is not None or seen.memory_bytes is not None


def _device(seen: SeenAccelerator) -> dict[str, str]:
    named = {} if seen.accelerator is None else {"accelerator": seen.accelerator}
    usual = None if seen.accelerator is None else load_catalogue()[seen.accelerator].memory_bytes
    if seen.memory_bytes is None or seen.memory_bytes == usual:
        return named
    return named | {"memory": profile_bytes(seen.memory_bytes)}


def _amount(route: Route, per_second: int) -> str:
    if "products" in route:
        return f"{per_second}/s"
    if route[-1] == "dispatch":
        return profile_duration(10**9 // per_second)
    return profile_rate(per_second, FLOPS_UNITS) if {"flops", "attention"} & {*route} else profile_rate(per_second)


def block_text(seen: SeenMachine, block: Mapping[str, Any], measured: Mapping[Route, Rate] | None = None) -> str:
    """Return the block as YAML, to paste into a profile, or to keep in a file that profiles name in `extends`.

    Beside each figure is a comment on its device, or on how it was `measured`.
    """
    remarks: dict[Route, str] = {
        ("devices", str(accelerator.id)): _remark(accelerator) for accelerator in seen.accelerators
    }
    remarks["devices", "cpu"] = _host_remark(seen)
    if seen.disk is not None:
        remarks["devices", "disk"] = f"free of {format_bytes(seen.disk.memory_bytes)}"
    remarks |= {route: _spread(route, rate) for route, rate in (measured or {}).items()}
    lines = ["hardware:", *(line for key, value in block.items() for line in _lines((key,), value, remarks))]
    lines += [
        f"  # {accelerator.id} is left out, for nothing tells its memory: {_remark(accelerator)}"
        for accelerator in seen.accelerators
        if not is_described(accelerator)
    ]
    return "\n".join(lines) + "\n"


def _lines(route: Route, value: Any, remarks: Mapping[Route, str]) -> Iterator[str]:
    """Yield a key with its value, as a flow mapping unless something within has a remark."""
    remark = f"   # {remarks[route]}" if route in remarks else ""
    begin = f"{'  ' * len(route)}{route[-1]}:"
    if any(other[: len(route)] == route != other for other in remarks):
        yield f"{begin}{remark}"
        for key, item in value.items():
            yield from _lines((*route, key), item, remarks)
    else:
        yield f"{begin} {_flow(value)}{remark}"


def _spread(route: Route, rate: Rate) -> str:
    # The shortest time or the lowest rate comes first.
    ends = (rate.most, rate.least) if route[-1] == "dispatch" else (rate.least, rate.most)
    spread = " to ".join(_amount(route, per_second) for per_second in ends)
    return f"median of {counted(rate.passes, 'run')}, {spread}: {rate.method}"


def _flow(value: Mapping[str, str] | str) -> str:
    if isinstance(value, str):
        return value
    return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"


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
