"""Writes profiles: the YAML text of values, quoted if YAML or this language would read them differently."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from devmap_config.amounts import exact_amount
from devmap_config.devices import CPU, DISK
from devmap_config.profile.document import plain_value
from devmap_config.profile.quantities import BYTE_UNITS, FLOP_UNITS, Share, basis_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from devmap_config.devices import Device
    from devmap_config.profile.schema import DeviceSection, Hardware, Link, Products, Rates

PLAIN = re.compile(r"[A-Za-z0-9_./~-][A-Za-z0-9_./:~-]*")
"""Matches text that needs no quotes anywhere, not even in a flow mapping."""


def yaml_text(value: str) -> str:
    """Return a text as a YAML scalar that reads back as the same text.

    >>> yaml_text("model.norm"), yaml_text("layers.[0-3]")
    ('model.norm', '"layers.[0-3]"')
    """
    is_plain = PLAIN.fullmatch(value) and isinstance(plain_value(value), str) and not value.endswith(":")
    if is_plain:
        return value
    escaped = "".join(_escaped(character) for character in value)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\U{ord(character):08x}"


BANDWIDTH_UNITS = {f"{unit}/s": size for unit, size in BYTE_UNITS.items()}


def device_text(section: DeviceSection) -> str:
    """Return the description of a device in a profile: its catalogue name if that is all, else a flow mapping."""
    described = {
        "accelerator": section.accelerator.value,
        "memory": _quantity(section.memory.value),
        "reserve": _quantity(section.reserve.value or None),
        "overhead": _quantity(section.overhead.value),
        "slack": _share(section.slack.value),
        "bandwidth": _given(section.bandwidth, BANDWIDTH_UNITS),
        "flops": _flops(section.flops),
        "attention": _nested(decode=_flops(section.attention.decode), prefill=_flops(section.attention.prefill)),
        "experts": _given(section.experts, BANDWIDTH_UNITS),
        "products": _products(section.products),
        "dtypes": _nested(**{dtype: _rates(rates) for dtype, rates in section.dtypes.items()}),
        "efficiency": _share(section.efficiency),
    }
    given = {key: value for key, value in described.items() if value is not None}
    return given["accelerator"] if set(given) == {"accelerator"} else _flow(given)


EXAMPLE_RATES = {
    CPU.kind: {"bandwidth": 50 * 10**9, "flops": 10**12},
    DISK.kind: {"bandwidth": 6 * 10**9},
}
"""Rates of the usual order of magnitude, for hints about a rate that a profile does not give."""

EXAMPLE_RATES_OF_ACCELERATORS = {"bandwidth": 900 * 10**9, "flops": 150 * 10**12}


def example_with_rates(device: Device, section: DeviceSection, *names: str) -> str:
    """Return the entry of a device with example values of these rates added to what the profile says of it.

    For a CPU of which only the memory is known, with its bandwidth: `cpu: {memory: 64GiB, bandwidth: 50GB/s}`.
    """
    rates = EXAMPLE_RATES.get(device.kind, EXAMPLE_RATES_OF_ACCELERATORS)
    return f"{device.of_its_host}: {device_text(section.changed(**{name: rates[name] for name in names}))}"


def _rates(rates: Rates) -> str | None:
    return _nested(
        bandwidth=_given(rates.bandwidth, BANDWIDTH_UNITS),
        flops=_flops(rates.flops),
        products=_products(rates.products),
    )


def _products(products: Products) -> str | None:
    return _nested(decode=_given(products.decode, {"/s": 1}), prefill=_given(products.prefill, {"/s": 1}))


def _flops(value: int | None) -> str | None:
    return _given(value, FLOP_UNITS | {"": 1})


def _nested(**values: str | None) -> str | None:
    """Return the keys that have a value as a flow mapping, or `None` if none has."""
    given = {key: value for key, value in values.items() if value is not None}
    return _flow(given) if given else None


def link_lines(hardware: Hardware) -> list[str]:
    """Return the lines of a profile's `hardware` other than `devices`."""
    links = [f"  {yaml_text(name)}: {_link(link)}" for name, link in hardware.links.items()]
    dispatch = hardware.host.dispatch
    host = [] if dispatch is None else [f"host: {_flow({'dispatch': _amount(dispatch, {'ns': 1})})}"]
    spread = {phase: str(times) for phase, times in hardware.spread if times is not None}
    return [*(["links:", *links] if links else []), *host, *([f"spread: {_flow(spread)}"] if spread else [])]


def _link(link: Link) -> str:
    bandwidth = _amount(link.bandwidth, BANDWIDTH_UNITS)
    return bandwidth if link.latency is None else _flow({"bandwidth": bandwidth, "latency": f"{link.latency}ns"})


def _flow(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in values.items()) + "}"


def _quantity(value: int | Share | None) -> str | None:
    return _share(value.fraction) if isinstance(value, Share) else _given(value, BYTE_UNITS)


def _share(value: Fraction | None) -> str | None:
    return None if value is None else f"{float(100 * value):.15g}%"


def _given(value: int | None, units: Mapping[str, int]) -> str | None:
    return None if value is None else _amount(value, units)


def _amount(value: int, units: Mapping[str, int]) -> str:
    basis = basis_of(value)
    return exact_amount(value, units) + (f" {basis}" if basis != "stated" else "")
