"""`Device`: one device of a machine, as a value that every room has in common."""

from __future__ import annotations

from typing import ClassVar


class Device:
    """One device: `cuda:0`, `mps`, `cpu`, `disk`. Devices sort as they are filled: accelerators, the CPU, the disk.

    There is one object for each device, which never changes: comparing and hashing cost what they do for any object.

    Attributes:
        kind: torch's type of device, or `disk`.
        index: its number among those of its kind; `None` where a machine has one at most.

    Example:
        >>> sorted([DISK, Device("cuda", 10), CPU, Device("cuda", 9)])
        [Device('cuda', 9), Device('cuda', 10), Device('cpu'), Device('disk')]
    """

    __slots__ = ("index", "kind")
    kind: str
    index: int | None
    _known: ClassVar[dict[tuple[str, int | None], Device]] = {}

    def __new__(cls, kind: str, index: int | None = None) -> Device:
        """Return the object that stands for this device."""
        device = object.__new__(cls)
        object.__setattr__(device, "kind", kind)
        object.__setattr__(device, "index", index)
        return cls._known.setdefault((kind, index), device)

    @classmethod
    def from_text(cls, text: str) -> Device:
        """Return the device of which this is the text: what `str` gave."""
        kind, _, index = text.partition(":")
        return cls(kind, int(index) if index else None)

    def __reduce__(self) -> tuple[type[Device], tuple[str, int | None]]:
        return Device, (self.kind, self.index)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"`{name}` of a device cannot be set")

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    def __repr__(self) -> str:
        return f"Device({self.kind!r})" if self.index is None else f"Device({self.kind!r}, {self.index})"

    def __lt__(self, other: Device) -> bool:
        return fill_order(self) < fill_order(other)

    @property
    def is_accelerator(self) -> bool:
        """Whether modules on this device run there without being streamed: all but the CPU and the disk."""
        return self not in STORAGE_DEVICES

    @property
    def in_device_map(self) -> int | str:
        """The device as transformers writes it: `cuda:1` is `1`; `mps`, `cpu` and `disk` stay."""
        return self.kind if self.index is None else self.index


CPU = Device("cpu")
DISK = Device("disk")
STORAGE_DEVICES = (CPU, DISK)
"""What is not an accelerator, in the order in which it is filled."""

COMPILING_KIND = "cuda"
"""The kind of accelerators on which compiled decoding was measured: devmap_config/runner/receipts."""

PINNING_KIND = "cuda"
"""The kind of accelerators to which weights are copied ahead, from memory that is pinned for them."""

OFFLOADING_KIND = "cuda"
"""The kind of accelerators from which transformers offloads a cache: it waits for streams of CUDA's."""


def fill_order(device: Device) -> tuple[int, str, int]:
    """Return what devices are sorted by: accelerators by their numbers, then what is not one."""
    place = STORAGE_DEVICES.index(device) + 1 if device in STORAGE_DEVICES else 0
    return place, device.kind, device.index or 0


def nth_accelerator(kind: str, index: int) -> Device:
    """Return an accelerator by its number, which Apple's, of which a machine has one, goes without."""
    return Device(kind) if kind == "mps" and index == 0 else Device(kind, index)
