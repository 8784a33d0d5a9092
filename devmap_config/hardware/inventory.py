"""`Inventory`: the devices of the described machine, with their capacities and rates, and the links between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.hardware.constants import DISPATCH_NANOSECONDS, LATENCY_NANOSECONDS
from devmap_config.profile.quantities import KnownRate, basis_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.hardware.catalogue import Accelerator
    from devmap_config.profile.quantities import Spread

NANOSECONDS_PER_SECOND = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryLink:
    """A connection that copies bytes from one device to another.

    `unpinned_bytes_per_second` is the rate of copies from memory of the CPU that is not pinned.
    """

    bytes_per_second: int
    latency_nanoseconds: int = LATENCY_NANOSECONDS
    unpinned_bytes_per_second: int | None = None

    def nanoseconds(self, size_bytes: int, copies: int = 1, *, is_pinned: bool = False) -> int:
        """Return the time to copy `size_bytes` in `copies` pieces."""
        rate = self.rate(is_pinned=is_pinned)
        return copies * self.latency_nanoseconds + size_bytes * NANOSECONDS_PER_SECOND // rate

    def rate(self, *, is_pinned: bool) -> int:
        """Return the bytes per second from pinned memory, or from other memory."""
        return (None if is_pinned else self.unpinned_bytes_per_second) or self.bytes_per_second

    @property
    def unpinned(self) -> InventoryLink:
        """The same link from memory that is not pinned."""
        return InventoryLink(bytes_per_second=self.rate(is_pinned=False), latency_nanoseconds=self.latency_nanoseconds)

    @property
    def twice_as_fast(self) -> InventoryLink:
        """The same link with twice the rates and half the latency."""
        unpinned = self.unpinned_bytes_per_second
        return InventoryLink(
            bytes_per_second=2 * self.bytes_per_second,
            latency_nanoseconds=self.latency_nanoseconds // 2,
            unpinned_bytes_per_second=None if unpinned is None else 2 * unpinned,
        )

    def then(self, other: InventoryLink) -> InventoryLink:
        """Return the link that two copies, one after the other, amount to."""
        both = self.bytes_per_second * other.bytes_per_second // (self.bytes_per_second + other.bytes_per_second)
        return InventoryLink(
            bytes_per_second=max(both, 1), latency_nanoseconds=self.latency_nanoseconds + other.latency_nanoseconds
        )


LARGEST = 10**18


def whole(value: Any) -> int:
    """Return an amount that was read from plain data, which must be a whole number and not negative.

    Raises:
        ValueError: if it is not one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r} is not an amount")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryDevice:
    """One device. A plan may use `capacity_bytes` of its `memory_bytes`; its context takes `overhead_bytes`.

    `bandwidth_bytes_per_second` and `flops_per_second` are `None` if neither the profile nor the catalogue states them;
    the efficiencies are the shares of them that are reached. Attention in half precision, and the experts that a token
    chooses, have rates of their own if the profile gives them. `by_dtype` holds the figures that differ for a dtype of
    the model.
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
    decode_attention_per_second: int | None = None
    prefill_attention_per_second: int | None = None
    experts_bytes_per_second: int | None = None
    decode_products_per_second: int | None = None
    prefill_products_per_second: int | None = None
    by_dtype: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)

    @property
    def rates(self) -> tuple[int | Fraction | str | None, ...]:
        """All figures that determine how fast it is."""
        return (*(getattr(self, name) for name in (*RATES, *RATES_OF_A_PROFILE)), *self.seen)

    @property
    def seen(self) -> tuple[str, ...]:
        """The names of the rates that are reached in full, because they were observed; of others, only a share is."""
        is_any = min(self.memory_efficiency, self.compute_efficiency) != 1
        return tuple(name for name in RATE_NAMES if is_any and basis_of(getattr(self, name) or 0) != "stated")

    def reached(self, name: str) -> KnownRate | None:
        """Return the part of a rate that is reached: all of an observed one, else a share."""
        rate: int | None = getattr(self, name)
        is_of_memory = name in ("bandwidth_bytes_per_second", "experts_bytes_per_second")
        efficiency = self.memory_efficiency if is_of_memory else self.compute_efficiency
        basis = basis_of(rate or 0)
        if not rate:
            return None
        return KnownRate(max(int(rate * (efficiency if basis == "stated" else 1)), 1), basis)

    def in_dtype(self, dtype: str) -> InventoryDevice:
        """Return the same device with its rates for a model of this dtype."""
        return replace(self, **self.by_dtype.get(dtype, {}), by_dtype={})  # type: ignore[arg-type]


RATES = ("bandwidth_bytes_per_second", "flops_per_second", "memory_efficiency", "compute_efficiency")
RATES_OF_A_PROFILE = (
    *("decode_attention_per_second", "prefill_attention_per_second", "experts_bytes_per_second"),
    *("decode_products_per_second", "prefill_products_per_second"),
)
"""Rates that the catalogue does not have; if the profile has none either, constants are used."""

RATE_NAMES = (*RATES[:2], *RATES_OF_A_PROFILE)


@dataclass(frozen=True)
class Inventory:
    """The devices in the order of filling: accelerators by index, the CPU, the disk.

    `dispatch_nanoseconds` is the host's time for each operation of torch. `spreads` holds, by phase, the spread of runs
    whose times rest on calibrated rates; no plan depends on it. `together_bytes_per_second` is the rate at which the
    CPU's memory serves all accelerators at once; without it, that of one accelerator is assumed.
    """

    devices: tuple[InventoryDevice, ...]
    links: Mapping[tuple[Device, Device], InventoryLink] = field(default_factory=dict)
    dispatch_nanoseconds: int = DISPATCH_NANOSECONDS
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    together_bytes_per_second: int | None = None

    @property
    def accelerators(self) -> tuple[InventoryDevice, ...]:
        """All devices except the CPU and the disk."""
        return tuple(device for device in self.devices if device.id.is_accelerator)

    @property
    def capacities(self) -> dict[Device, int]:
        """Capacity by device, in bytes."""
        return {device.id: device.capacity_bytes for device in self.devices}

    def in_dtype(self, dtype: str) -> Inventory:
        """Return the same machine with its rates for a model of this dtype."""
        return replace(self, devices=tuple(device.in_dtype(dtype) for device in self.devices))

    @property
    def kind(self) -> str:
        """The kind of the accelerators; `cuda` if there are none."""
        return next((device.id.kind for device in self.accelerators), "cuda")

    def accelerators_to_json(self) -> dict[str, dict[str, object]]:
        """Return the properties that a machine must have to load a plan; the lock holds them outside of the hardware's
        digest.
        """
        return {
            str(device.id): {
                "accelerator": None if device.accelerator is None else device.accelerator.name,
                "memory_bytes": device.memory_bytes,
                "overhead_bytes": device.overhead_bytes,
            }
            for device in self.accelerators
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Inventory:
        """Return the machine that `to_json` made plain data of, without the accelerators' names, which it leaves out.

        Raises:
            KeyError, TypeError, ValueError: if the value is not what `to_json` returns.
        """
        devices = []
        for described in value["devices"]:
            rates: dict[str, Any] = {
                name: whole(described[name]) for name in RATE_NAMES if described.get(name) is not None
            }
            rates |= {
                name: KnownRate(rates[name], "measured") for name in described.get("seen", "").split(" and ") if name
            }
            device = InventoryDevice(
                id=Device.from_text(described["id"]),
                memory_bytes=whole(described["memory_bytes"]),
                capacity_bytes=whole(described["capacity_bytes"]),
                memory_efficiency=min(Fraction(described["memory_efficiency"]), Fraction(1)),
                compute_efficiency=min(Fraction(described["compute_efficiency"]), Fraction(1)),
                **rates,
            )
            devices.append(device)
        links = {}
        for pair, figures in value["links"].items():
            source, target = map(Device.from_text, pair.split("-"))
            known = {name: whole(figure) for name, figure in figures.items() if figure is not None}
            links[source, target] = InventoryLink(**known)
        together = value.get("together_bytes_per_second")
        return cls(
            tuple(devices),
            links,
            whole(value.get("dispatch_nanoseconds", DISPATCH_NANOSECONDS)),
            together_bytes_per_second=None if together is None else whole(together),
        )

    def to_json(self) -> dict[str, object]:
        """Return the machine as plain data, for digests."""
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
            | {name: rate for name in RATES_OF_A_PROFILE if (rate := getattr(device, name)) is not None}
            | ({"seen": " and ".join(device.seen)} if device.seen else {})
            for device in self.devices
        ]
        links = {f"{source}-{target}": asdict(link) for (source, target), link in self.links.items()}
        described: dict[str, object] = {"devices": devices, "links": links}
        # The default is left out, so that digests from before this figure existed still hold.
        if self.dispatch_nanoseconds != DISPATCH_NANOSECONDS:
            described["dispatch_nanoseconds"] = self.dispatch_nanoseconds
        if self.together_bytes_per_second is not None:
            described["together_bytes_per_second"] = self.together_bytes_per_second
        return described
