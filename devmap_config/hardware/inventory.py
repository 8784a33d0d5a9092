"""`Inventory`: the devices of the described machine, with what a plan may put on each, and the links between them."""

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
    """A way for bytes, one direction at a time.

    `unpinned_bytes_per_second` is what is reached where the CPU's memory at one end of it is not pinned.
    """

    bytes_per_second: int
    latency_nanoseconds: int = LATENCY_NANOSECONDS
    unpinned_bytes_per_second: int | None = None

    def nanoseconds(self, size_bytes: int, copies: int = 1, *, is_pinned: bool = False) -> int:
        """Return how long it takes to copy this much, in so many pieces."""
        rate = self.rate(is_pinned=is_pinned)
        return copies * self.latency_nanoseconds + size_bytes * NANOSECONDS_PER_SECOND // rate

    def rate(self, *, is_pinned: bool) -> int:
        """Return the bytes a second from memory that is pinned, or from other memory."""
        return (None if is_pinned else self.unpinned_bytes_per_second) or self.bytes_per_second

    @property
    def unpinned(self) -> InventoryLink:
        """The same from memory that is not pinned."""
        return InventoryLink(bytes_per_second=self.rate(is_pinned=False), latency_nanoseconds=self.latency_nanoseconds)

    @property
    def twice_as_fast(self) -> InventoryLink:
        """The same, were it so."""
        unpinned = self.unpinned_bytes_per_second
        return InventoryLink(
            bytes_per_second=2 * self.bytes_per_second,
            latency_nanoseconds=self.latency_nanoseconds // 2,
            unpinned_bytes_per_second=None if unpinned is None else 2 * unpinned,
        )

    def then(self, other: InventoryLink) -> InventoryLink:
        """Return one link after the other: what takes two copies."""
        both = self.bytes_per_second * other.bytes_per_second // (self.bytes_per_second + other.bytes_per_second)
        return InventoryLink(
            bytes_per_second=max(both, 1), latency_nanoseconds=self.latency_nanoseconds + other.latency_nanoseconds
        )


LARGEST = 10**18


def whole(value: Any) -> int:
    """Return an amount of plain data: a whole number that can be one.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise ValueError(f"{value!r} is not an amount")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryDevice:
    """One device. `capacity_bytes` is what a plan may use of its `memory_bytes`; `overhead_bytes` its context takes.

    `bandwidth_bytes_per_second` and `flops_per_second` are `None` if neither profile nor catalogue tells; of them
    the efficiencies are reached. Attention in half precision, and the experts that a token chooses, have rates of their
    own where the profile gives them. `by_dtype` are the figures that another dtype of the model changes.
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
        """All that tells how fast it is."""
        return (*(getattr(self, name) for name in (*RATES, *RATES_OF_A_PROFILE)), *self.seen)

    @property
    def seen(self) -> tuple[str, ...]:
        """The names of the rates of which all is reached, for they were seen, while of others a share is."""
        is_any = min(self.memory_efficiency, self.compute_efficiency) != 1
        return tuple(name for name in RATE_NAMES if is_any and basis_of(getattr(self, name) or 0) != "stated")

    def reached(self, name: str) -> KnownRate | None:
        """Return how much is reached of the rate of this name: of one that was seen, all."""
        rate: int | None = getattr(self, name)
        is_of_memory = name in ("bandwidth_bytes_per_second", "experts_bytes_per_second")
        efficiency = self.memory_efficiency if is_of_memory else self.compute_efficiency
        basis = basis_of(rate or 0)
        if not rate:
            return None
        return KnownRate(max(int(rate * (efficiency if basis == "stated" else 1)), 1), basis)

    def in_dtype(self, dtype: str) -> InventoryDevice:
        """Return the same with the rates that it has with a model of this dtype."""
        return replace(self, **self.by_dtype.get(dtype, {}), by_dtype={})  # type: ignore[arg-type]


RATES = ("bandwidth_bytes_per_second", "flops_per_second", "memory_efficiency", "compute_efficiency")
RATES_OF_A_PROFILE = (
    *("decode_attention_per_second", "prefill_attention_per_second", "experts_bytes_per_second"),
    *("decode_products_per_second", "prefill_products_per_second"),
)
"""Without these, constants stand in: no catalogue has them."""

RATE_NAMES = (*RATES[:2], *RATES_OF_A_PROFILE)


@dataclass(frozen=True)
class Inventory:
    """The devices in the order in which they are filled: accelerators by index, the CPU, the disk.

    `dispatch_nanoseconds` is what the host needs for each operation that torch is asked for. `spreads` are, by phase,
    those of runs whose times rest on calibrated rates; no plan depends on them. `together_bytes_per_second` is what the
    CPU's memory gives to all accelerators at once; without it, no more than to one of them.
    """

    devices: tuple[InventoryDevice, ...]
    links: Mapping[tuple[Device, Device], InventoryLink] = field(default_factory=dict)
    dispatch_nanoseconds: int = DISPATCH_NANOSECONDS
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    together_bytes_per_second: int | None = None

    @property
    def accelerators(self) -> tuple[InventoryDevice, ...]:
        """All but the CPU and the disk."""
        return tuple(device for device in self.devices if device.id.is_accelerator)

    @property
    def capacities(self) -> dict[Device, int]:
        """Capacity by device, in bytes."""
        return {device.id: device.capacity_bytes for device in self.devices}

    def in_dtype(self, dtype: str) -> Inventory:
        """Return the same machine as fast as it is with a model of this dtype."""
        return replace(self, devices=tuple(device.in_dtype(dtype) for device in self.devices))

    @property
    def kind(self) -> str:
        """The kind of the accelerators; `cuda` where there are none."""
        return next((device.id.kind for device in self.accelerators), "cuda")

    def accelerators_to_json(self) -> dict[str, dict[str, object]]:
        """Return the properties that a machine must have before it loads a plan, for the lock, outside of the
        hardware's digest.
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
        """Return as fast a machine as `to_json` made plain data of; which accelerators it has is not told there.

        Raises:
            KeyError, TypeError, ValueError: if something else is.
        """
        devices = []
        for each in value["devices"]:
            rates: dict[str, Any] = {name: whole(each[name]) for name in RATE_NAMES if each.get(name) is not None}
            rates |= {name: KnownRate(rates[name], "measured") for name in each.get("seen", "").split(" and ") if name}
            device = InventoryDevice(
                id=Device.from_text(each["id"]),
                memory_bytes=whole(each["memory_bytes"]),
                capacity_bytes=whole(each["capacity_bytes"]),
                memory_efficiency=min(Fraction(each["memory_efficiency"]), Fraction(1)),
                compute_efficiency=min(Fraction(each["compute_efficiency"]), Fraction(1)),
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
        """Return it as plain data, for digests."""
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
        if self.dispatch_nanoseconds != DISPATCH_NANOSECONDS:  # else no profile says it, and no machine has changed
            described["dispatch_nanoseconds"] = self.dispatch_nanoseconds
        if self.together_bytes_per_second is not None:
            described["together_bytes_per_second"] = self.together_bytes_per_second
        return described
