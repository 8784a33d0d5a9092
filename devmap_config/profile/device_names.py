"""The names that a profile gives devices: `cuda:0`, `0`, ranges such as `cuda:[0-7]`, `cpu`, `disk`.

The name of a host may stand before a device: `left/cuda:0`. The CPU of a host may be several devices, one for each rank
that vLLM runs on it: `left/cpu:[0-1]`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from devmap_config.devices import Device, nth_accelerator
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Collection

ACCELERATOR_KINDS = ("cuda", "xpu", "npu", "hpu", "mps")
"""torch's device types that a map may name; AMD's cards are `cuda` as well."""

MAX_DEVICES = 128
"""Twice the number of parts that the cards of a host can be split into (eight cards of seven parts each)."""

HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
"""Matches the name of a host, which also goes into names of files and devices."""

_NAME = re.compile(
    r"(?:(?P<kind>[a-z]+):)?(?:(?P<index>0|[1-9][0-9]{0,3})|\[(?P<items>[0-9]{1,4}(?:-[0-9]{1,4})?(?:,[0-9]{1,4}(?:-[0-9]{1,4})?)*)\])"
)


_BEYOND_ANY = re.compile(r"(?:[a-z]+:)?\[?[0-9,-]*[0-9]{5}[0-9,-]*\]?")
"""Matches a name or a range with a number that has more digits than any index."""

MEANT = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "amd": "cuda",
    "rocm": "cuda",
    "hip": "cuda",
    "intel": "xpu",
    "ascend": "npu",
    "gaudi": "hpu",
    "metal": "mps",
    "apple": "mps",
    "ram": "cpu",
    "host": "cpu",
    "ssd": "disk",
    "nvme": "disk",
    "hdd": "disk",
}
"""Other names of kinds of devices."""

_RANGE = re.compile(r"(?P<kind>[A-Za-z]+)[:_ -]?\[?(?P<first>[0-9]{1,4})[-:,](?P<last>[0-9]{1,4})\]?")

_OTHER = re.compile(r"(?P<kind>[A-Za-z]+)[:_ -]?(?P<index>0|[1-9][0-9]{0,3}|\[[0-9,-]+\])?")


class DeviceNameError(ValueError):
    """A text names no device; the message says why, `help` what to write."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.message = message
        self.help = help


def expand_devices(text: str, kind: str) -> tuple[Device, ...]:
    """Return the devices that a name or a range stands for; a bare number is of this kind.

    Example:
        >>> expand_devices("xpu:[0,2]", "cuda")
        (Device('xpu', 0), Device('xpu', 2))

    Raises:
        DeviceNameError: if it is neither.
    """
    host, slash, name = text.partition("/")
    if slash and HOST_NAME.fullmatch(host):
        return tuple(
            Device(device.kind, device.index, host) for device in _expanded(name, kind, (*ACCELERATOR_KINDS, "cpu"))
        )
    return _expanded(text, kind, ACCELERATOR_KINDS)


def _expanded(text: str, kind: str, kinds: tuple[str, ...]) -> tuple[Device, ...]:
    is_one = "cpu" not in kinds
    if text in ("cpu", "disk", "mps") or (text == "cpu:0" and is_one):
        return (Device(text.removesuffix(":0")),)
    match = _NAME.fullmatch(text)
    if match is None:
        if _BEYOND_ANY.fullmatch(text):
            raise DeviceNameError(f"`{text}` is beyond the devices of any machine", "name only devices that exist")
        if text in ACCELERATOR_KINDS:
            raise DeviceNameError(f"`{text}` does not say which one", f'write `{text}:0`, or `"{text}:[0-1]"` for two')
        raise DeviceNameError(f"`{text}` is not a device", _advice(text))
    kind = match["kind"] or kind
    if kind not in kinds:
        raise DeviceNameError(f"`{kind}` is not a kind of device", _advice(text))
    indices = [int(match["index"])] if match["index"] else _indices(match["items"])
    if kind == "mps" and indices != [0]:
        raise DeviceNameError(f"`{text}` does not exist: a machine has one `mps`", "write `mps`")
    return tuple(nth_accelerator(kind, index) for index in indices)


def _advice(text: str) -> str:
    """Return advice on an unknown name: the device that it was most likely meant to be."""
    if (several := _RANGE.fullmatch(text)) and (kind := MEANT.get(several["kind"].lower(), several["kind"].lower())):
        return f'write `"{kind}:[{several["first"]}-{several["last"]}]"`'
    other = _OTHER.fullmatch(text)
    kind = MEANT.get(other["kind"].lower(), other["kind"].lower()) if other else ""
    if kind in ("cpu", "disk", "mps"):
        return f"write `{kind}`: a machine has one"
    if other is not None and kind in ACCELERATOR_KINDS:
        return f"write `{kind}:{other['index'] or 0}`"
    kinds = ", ".join(f"`{known}:0`" for known in ACCELERATOR_KINDS if known != "mps")
    return f"devices are {kinds}, `mps`, `cpu` and `disk`; a number alone is an accelerator's"


def device_meant(named: Device | int, kind: str) -> Device:
    """Return the device that a profile names; a bare number names an accelerator of the machine's kind."""
    return nth_accelerator(kind, named) if isinstance(named, int) else named


def is_device_name(text: str) -> bool:
    """Return whether a text names a device, or a range of devices.

    >>> is_device_name("cuda:[0-3]"), is_device_name("disk"), is_device_name("gpu zero")
    (True, True, False)
    """
    try:
        return bool(expand_devices(text, "cuda"))
    except DeviceNameError:
        return False


def is_range(text: str) -> bool:
    """Return whether a name stands for several devices."""
    return "[" in text


def kind_of(text: str) -> str | None:
    """Return the kind of accelerator that a name or a range states, or `None`.

    >>> kind_of("cuda:[0-3]"), kind_of("cpu")
    ('cuda', None)
    """
    match = _NAME.fullmatch(text)
    kind = text if match is None else match["kind"]
    return kind if kind in ACCELERATOR_KINDS else None


def _indices(items: str) -> list[int]:
    indices: dict[int, None] = {}
    for item in items.split(","):
        first, _, last = item.partition("-")
        start, end = int(first), int(last or first)
        if end < start:
            raise DeviceNameError(
                f"the range `{item}` runs backwards", f"both ends are included: write `{end}-{start}`"
            )
        indices |= dict.fromkeys(range(start, end + 1))
        if len(indices) > MAX_DEVICES or items.count(",") >= MAX_DEVICES:
            raise DeviceNameError(f"`{items}` names more than {MAX_DEVICES} devices", "name only devices that exist")
    return list(indices)


def where_to_list(device: Device, listed: Collection[Device]) -> str:
    """Return advice on a device that a profile does not list: name its host, name another device, or list it.

    >>> where_to_list(Device("cpu"), [Device("cpu", host="left"), Device("cpu", host="right")])
    'name its host as well: `left/cpu`, `right/cpu`'
    >>> where_to_list(Device("cuda", 2), [Device("cuda", 0), Device("cuda", 1)])
    'list it under `hardware.devices`; listed are cuda:0, cuda:1'
    """
    if device.host is None and (named := [other for other in listed if other.host and other.of_its_host == device]):
        return f"name its host as well: {', '.join(f'`{other}`' for other in named)}"
    of_hosts = any(other.host is not None for other in listed)
    close = closest(str(device), map(str, listed)) if of_hosts else None
    hint = f"did you mean `{close}`? " if close is not None and device.host is not None else ""
    key = "the devices of its host" if of_hosts else "`hardware.devices`"
    return f"{hint}list it under {key}; listed are {', '.join(map(str, listed))}"
