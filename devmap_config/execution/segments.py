"""The amounts of a forward (bytes, operations, kernels, dispatches and copies), and the times that they take.

The host dispatches operations to a device at its own pace. An accelerator works meanwhile, so a segment takes the
longer of the two times; on a CPU they add up. On an accelerator, a module takes the longer of reading its bytes and
computing its operations, at the rates that the machine reaches, plus a fixed time for every kernel; on a CPU, the times
of reading and computing add up, too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from devmap_config.devices import CPU, DISK, Device
from devmap_config.execution.overlap import Ahead, total_nanoseconds
from devmap_config.hardware.constants import CPU_DECODE_ATTENTION, CPU_PREFILL_ATTENTION, KERNEL_NANOSECONDS
from devmap_config.hardware.inventory import NANOSECONDS_PER_SECOND, whole
from devmap_config.profile.quantities import weakest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.hardware.inventory import Inventory, InventoryDevice, InventoryLink
    from devmap_config.profile.quantities import Basis

Phase = Literal["prefill", "decode"]


class MissingFigureError(Exception):
    """The machine's description does not say how fast something is.

    Attributes:
        figure: the missing key of a profile.
        device: the device that the key belongs to; `None` if it belongs to the machine.
    """

    def __init__(self, figure: str, device: Device | None = None) -> None:
        super().__init__(f"`{figure}`" if device is None else f"the `{figure}` of {device}")
        self.figure, self.device = figure, device


class ModuleWork(NamedTuple):
    """The work of one module without its children.

    Attributes:
        touched_bytes: bytes that are read or written, except those of experts that a token chooses.
        chosen_bytes: bytes of experts that a token chooses.
        products: the number of matrix products, before each of which the threads of a CPU synchronise.
    """

    touched_bytes: int
    operations: int = 0
    attention_operations: int = 0
    launches: int = 0
    chosen_bytes: int = 0
    products: int = 0


class Copy(NamedTuple):
    """Bytes that go from one device to another, in a number of pieces."""

    source: Device
    target: Device
    size_bytes: int
    copies: int = 1
    is_pinned: bool = False


@dataclass
class Segment:
    """Work that is done before any other begins.

    Attributes:
        steps: by device, the work of modules and the number of modules that do the same.
        dispatches: by device, the operations that the host dispatches.
        copies: copies that the devices wait for.
        ahead: copies that overlap with the work; the copies of one entry are made at the same time.
    """

    steps: Counter[tuple[Device, ModuleWork]] = field(default_factory=Counter)
    dispatches: Counter[Device] = field(default_factory=Counter)
    copies: list[Copy] = field(default_factory=list)
    ahead: list[tuple[Copy, ...]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "steps": [[str(device), count, *step] for (device, step), count in self.steps.items()],
            "dispatches": {str(device): count for device, count in self.dispatches.items()},
            "copies": [_copy_to_json(copy) for copy in self.copies],
            "ahead": [[_copy_to_json(copy) for copy in together] for together in self.ahead],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Segment:
        """Return the segment that `to_json` made plain data of.

        Raises:
            KeyError, TypeError, ValueError: if the value is not one.
        """
        steps = (
            ((Device.from_text(name), ModuleWork(*map(whole, step))), whole(count))
            for name, count, *step in value["steps"]
        )
        return cls(
            steps=Counter(dict(steps)),
            dispatches=Counter({Device.from_text(name): whole(count) for name, count in value["dispatches"].items()}),
            copies=[_copy_from_json(*copy) for copy in value["copies"]],
            ahead=[tuple(_copy_from_json(*copy) for copy in together) for together in value["ahead"]],
        )


def _copy_to_json(copy: Copy) -> list[Any]:
    return [str(copy.source), str(copy.target), *copy[2:]]


def _copy_from_json(source: str, target: str, size_bytes: Any, copies: Any, is_pinned: Any) -> Copy:
    return Copy(Device.from_text(source), Device.from_text(target), whole(size_bytes), whole(copies), bool(is_pinned))


class SegmentTime(NamedTuple):
    """The time of a segment, by itself or overlapping with segments that are copied ahead to other cards."""

    nanoseconds: int
    ahead: tuple[Ahead, ...] = ()

    def times(self, count: int) -> SegmentTime:
        """Return the time of `count` such segments."""
        return SegmentTime(count * self.nanoseconds, tuple(block.times(count) for block in self.ahead))


def _card_of(ahead: Iterable[tuple[Copy, ...]]) -> Device | None:
    """Return the card to which everything is copied from the CPU's memory; `None` if some copies are different."""
    ways = {(copy.source, copy.target) for copies in ahead for copy in copies}
    source, target = next(iter(ways)) if len(ways) == 1 else (CPU, CPU)
    return target if source == CPU and target.is_accelerator else None


@dataclass(frozen=True)
class MachineRates:
    """The times, in nanoseconds, that amounts take on a machine.

    An unknown rate that is needed raises `MissingFigureError`. Decoding does not need the rate of computing, as one
    token is bound by memory.
    """

    inventory: Inventory
    phase: Phase

    def nanoseconds(self, *segments: Segment) -> int:
        """Return the time of segments, one after another, in one of many forwards."""
        return total_nanoseconds(map(self.time, segments))

    def time(self, segment: Segment) -> SegmentTime:
        """Return the time of a segment."""
        elapsed = sum(map(self.copy_nanoseconds, segment.copies)) + sum(self.working(segment).values())
        copying = sum(max(map(self.copy_nanoseconds, together)) for together in segment.ahead)
        nanoseconds, card = max(elapsed, copying), _card_of(segment.ahead)
        if card is None or self.inventory.together_bytes_per_second is None:
            return SegmentTime(nanoseconds)
        link = self._link(CPU, card)
        together = replace(link, bytes_per_second=max(link.bytes_per_second, self.inventory.together_bytes_per_second))
        shared = sum(together.nanoseconds(copy.size_bytes, copy.copies, is_pinned=True) for (copy,) in segment.ahead)
        if max(elapsed, shared) == nanoseconds:  # no other link limits it
            return SegmentTime(nanoseconds)
        return SegmentTime(0, (Ahead(self.phase, card, nanoseconds, max(elapsed, shared)),))

    def missing(self, segment: Segment) -> Iterator[MissingFigureError]:
        """Yield the figures that the time of a segment needs but the machine lacks."""
        for device, step in segment.steps:
            for part in (step, step._replace(touched_bytes=0, chosen_bytes=0)):  # reading, and computing
                try:
                    self.step_nanoseconds(part, device)
                except MissingFigureError as error:
                    yield error
        for copy in (*segment.copies, *chain.from_iterable(segment.ahead)):
            try:
                self.copy_nanoseconds(copy)
            except MissingFigureError as error:
                yield error

    def working(self, segment: Segment) -> dict[Device, int]:
        """Return the time that each device works on a segment, limited by how fast the host dispatches."""
        working: Counter[Device] = Counter()
        for (device, step), count in segment.steps.items():
            working[device] += count * self.step_nanoseconds(step, device)
        busy_nanoseconds = {}
        for device in dict.fromkeys([*working, *segment.dispatches]):
            both = (working[device], segment.dispatches[device] * self.inventory.dispatch_nanoseconds)
            busy_nanoseconds[device] = max(both) if device.is_accelerator else sum(both)
        return busy_nanoseconds

    def step_nanoseconds(self, step: ModuleWork, device: Device) -> int:
        """Return the time of a module's work on a device."""
        rates = self._reached.get(device, _Reached())
        reading = computing = 0
        if step.touched_bytes or step.chosen_bytes:
            if rates.reading is None:
                raise MissingFigureError("bandwidth", device)
            reading = step.touched_bytes * NANOSECONDS_PER_SECOND // rates.reading
            reading += step.chosen_bytes * NANOSECONDS_PER_SECOND // (rates.experts or rates.reading)
        operations = step.operations
        if step.attention_operations and rates.attention is not None:
            operations -= step.attention_operations
            computing = step.attention_operations * NANOSECONDS_PER_SECOND // rates.attention
        elif not device.is_accelerator:
            more = CPU_PREFILL_ATTENTION if self.phase == "prefill" else CPU_DECODE_ATTENTION
            operations += step.attention_operations * (more - 1)
        if operations and rates.computing is not None:
            computing += operations * NANOSECONDS_PER_SECOND // rates.computing
        elif operations and self.phase == "prefill":
            raise MissingFigureError("flops", device)
        if device.is_accelerator:
            return max(reading, computing) + step.launches * KERNEL_NANOSECONDS
        beginning = step.products * NANOSECONDS_PER_SECOND // rates.products if rates.products else 0
        return reading + computing + beginning

    def least_nanoseconds(self, step: ModuleWork) -> int:
        """Return a lower bound of the time on any device, by the highest rates of all."""
        amounts = ((step.touched_bytes, self._highest[0]), (step.operations, self._highest[1]))
        return max(amount * NANOSECONDS_PER_SECOND // rate if rate else 0 for amount, rate in amounts)

    @cached_property
    def _highest(self) -> tuple[int, int]:
        rates = self._reached.values()
        reading = max((rate for reached in rates for rate in (reached.reading, reached.experts) if rate), default=0)
        return reading, max(
            (rate for reached in rates for rate in (reached.computing, reached.attention) if rate), default=0
        )

    def copy_nanoseconds(self, copy: Copy) -> int:
        """Return the time to copy bytes from one device to another."""
        if copy.source == copy.target or not copy.copies:
            return 0
        link = self._link(copy.source, copy.target)
        return link.nanoseconds(copy.size_bytes, copy.copies, is_pinned=copy.is_pinned)

    def basis(self, segments: Iterable[Segment]) -> Basis:
        """Return the basis of the time of these segments: the weakest basis of all rates that it depends on."""
        rates: list[int | None] = []
        for segment in segments:
            for device, step in segment.steps:
                reached = self._reached.get(device, _Reached())
                rates += [reached.reading] if step.touched_bytes else []
                rates += [reached.experts or reached.reading] if step.chosen_bytes else []
                rates += [reached.computing] if step.operations > step.attention_operations else []
                rates += [reached.attention or reached.computing] if step.attention_operations else []
                rates += [reached.products] if step.products and not device.is_accelerator else []
            rates += [self.inventory.dispatch_nanoseconds] if any(segment.dispatches.values()) else []
            rates += [self.inventory.together_bytes_per_second] if self.time(segment).ahead else []
            for copy in (*segment.copies, *chain.from_iterable(segment.ahead)):
                if copy.source != copy.target and copy.copies:
                    rates.append(self._link(copy.source, copy.target).rate(is_pinned=copy.is_pinned))
        return weakest(rates)

    @cached_property
    def _reached(self) -> Mapping[Device, _Reached]:
        return {device.id: _Reached.of(device, self.phase) for device in self.inventory.devices}

    def _link(self, source: Device, target: Device) -> InventoryLink:
        link = self.inventory.links.get((source, target))
        if link is None:
            kind = "peer" if source.is_accelerator and target.is_accelerator else "host"
            if {source, target} == {CPU, DISK}:
                raise MissingFigureError("bandwidth", DISK)
            raise MissingFigureError(f"links: {{{kind}: …}}")
        return link


class _Reached(NamedTuple):
    """The rates that a device reaches, in bytes read and operations computed per second, if the machine states them."""

    reading: int | None = None
    computing: int | None = None
    attention: int | None = None
    experts: int | None = None
    products: int | None = None

    @classmethod
    def of(cls, device: InventoryDevice, phase: Phase) -> _Reached:
        return cls(
            reading=device.reached("bandwidth_bytes_per_second"),
            computing=device.reached("flops_per_second"),
            attention=device.reached(f"{phase}_attention_per_second"),
            experts=device.reached("experts_bytes_per_second"),
            products=device.reached(f"{phase}_products_per_second"),
        )
