"""`Device`: one device of a machine, a value that the whole package shares."""

from __future__ import annotations

from typing import ClassVar


class Device:
    """One device: `cuda:0`, `mps`, `cpu`, `disk`. Devices sort in the order of filling: accelerators, the CPU, the
    disk.

    If there are several machines, the name of the host comes first: `left/cuda:0`.

    Each device is one immutable object, so comparing and hashing are as cheap as for any plain object.

    Attributes:
        kind: torch's type of device, or `disk`.
        index: its number among the devices of its kind; `None` for a kind of which a machine has at most one.
        host: the name of its machine; `None` if there is only one.

    Example:
        >>> sorted([DISK, Device("cuda", 10), CPU, Device("cuda", 9)])
        [Device('cuda', 9), Device('cuda', 10), Device('cpu'), Device('disk')]
    """

    __slots__ = ("host", "index", "kind")
    kind: str
    index: int | None
    host: str | None
    _known: ClassVar[dict[tuple[str, int | None, str | None], Device]] = {}

    def __new__(cls, kind: str, index: int | None = None, host: str | None = None) -> Device:
        """Return the object that stands for this device."""
        device = object.__new__(cls)
        object.__setattr__(device, "kind", kind)
        object.__setattr__(device, "index", index)
        object.__setattr__(device, "host", host)
        return cls._known.setdefault((kind, index, host), device)

    @classmethod
    def from_text(cls, text: str) -> Device:
        """Return the device for a text that `str` made of it."""
        host, _, name = text.rpartition("/")
        kind, _, index = name.partition(":")
        return cls(kind, int(index) if index else None, host or None)

    def __reduce__(self) -> tuple[type[Device], tuple[str, int | None, str | None]]:
        return Device, (self.kind, self.index, self.host)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"`{name}` of a device cannot be set")

    def __str__(self) -> str:
        name = self.kind if self.index is None else f"{self.kind}:{self.index}"
        return name if self.host is None else f"{self.host}/{name}"

    def __repr__(self) -> str:
        host = "" if self.host is None else f", host={self.host!r}"
        return f"Device({self.kind!r}{'' if self.index is None else f', {self.index}'}{host})"

    def __lt__(self, other: Device) -> bool:
        return fill_order(self) < fill_order(other)

    @property
    def is_accelerator(self) -> bool:
        """True for all devices except `cpu` and `disk`."""
        return self.of_its_host not in STORAGE_DEVICES

    @property
    def of_its_host(self) -> Device:
        """The same device without its host's name."""
        return self if self.host is None else Device(self.kind, self.index)

    @property
    def in_device_map(self) -> int | str:
        """The device as transformers writes it: `1` for `cuda:1`; `mps`, `cpu`, `disk` and a device of a host stay."""
        return str(self) if self.index is None or self.host is not None else self.index


CPU = Device("cpu")
DISK = Device("disk")
STORAGE_DEVICES = (CPU, DISK)
"""The devices that are not accelerators, in the order of filling."""

COMPILING_KIND = "cuda"
"""The kind of accelerators on which compiled decoding was measured: devmap_config/runner/receipts."""

PINNING_KIND = "cuda"
"""The kind of accelerators to which weights are copied ahead, from pinned memory."""

OFFLOADING_KIND = "cuda"
"""The kind of accelerators from which transformers offloads a cache: its code waits for CUDA streams."""


def fill_order(device: Device) -> tuple[str, int, str, int]:
    """Return the sort key of a device: hosts together, accelerators by number, then the CPU and the disk."""
    place = 0 if device.is_accelerator else STORAGE_DEVICES.index(device.of_its_host) + 1
    return device.host or "", place, device.kind, device.index or 0


def nth_accelerator(kind: str, index: int) -> Device:
    """Return an accelerator by its number; Apple's has no number, as a machine has only one."""
    return Device(kind) if kind == "mps" and index == 0 else Device(kind, index)
