"""The amounts of a forward (bytes, operations, kernels, dispatches and copies), and the times that they take.

The host dispatches operations to a device at its own pace. An accelerator works meanwhile, so that a segment takes the
longer of the two; a CPU does one after the other. On an accelerator a module takes the longer of reading its bytes and
computing its operations, at the rates that the machine reaches, plus a fixed time for every kernel; on a CPU the times
of reading and computing add up as well.
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
        figure: the key of a profile that is missing.
        device: the device of which it is a key; `None` if it is one of the machine.
    """

    def __init__(self, figure: str, device: Device | None = None) -> None:
        super().__init__(f"`{figure}`" if device is None else f"the `{figure}` of {device}")
        self.figure, self.device = figure, device


class ModuleWork(NamedTuple):
    """The work of one module without its children.

    Attributes:
        touched_bytes: bytes that are touched, except those of experts that a token chooses.
        chosen_bytes: bytes of experts that a token chooses.
        products: the matrix products, before each of which the threads of a CPU wait for each other.
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
        ahead: copies that overlap with the work; those that stand together are made at once.
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
        """Return what `to_json` made plain data of.

        Raises:
            KeyError, TypeError, ValueError: if something else is.
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
    """The time of a segment, alone or beside others that are copied ahead to other cards."""

    nanoseconds: int
    ahead: tuple[Ahead, ...] = ()

    def times(self, count: int) -> SegmentTime:
        """Return how long it takes so many times."""
        return SegmentTime(count * self.nanoseconds, tuple(each.times(count) for each in self.ahead))


def _card_of(ahead: Iterable[tuple[Copy, ...]]) -> Device | None:
    """Return the card to which all of this is copied from the CPU's memory; `None` if it is not all so."""
    ways = {(copy.source, copy.target) for copies in ahead for copy in copies}
    source, target = next(iter(ways)) if len(ways) == 1 else (CPU, CPU)
    return target if source == CPU and target.is_accelerator else None


@dataclass(frozen=True)
class MachineRates:
    """The times, in nanoseconds, that amounts take on a machine.

    A rate that is needed and not known is a `MissingFigureError`. In decoding that does not include the rate of
    computing: one token is bound by what is read.
    """

    inventory: Inventory
    phase: Phase

    def nanoseconds(self, *segments: Segment) -> int:
        """Return how long segments take, one after another, in a forward that is one of many."""
        return total_nanoseconds(map(self.time, segments))

    def time(self, segment: Segment) -> SegmentTime:
        """Return how long a segment takes."""
        elapsed = sum(map(self.copy_nanoseconds, segment.copies)) + sum(self.working(segment).values())
        copying = sum(max(map(self.copy_nanoseconds, together)) for together in segment.ahead)
        nanoseconds, card = max(elapsed, copying), _card_of(segment.ahead)
        if card is None or self.inventory.together_bytes_per_second is None:
            return SegmentTime(nanoseconds)
        link = self._link(CPU, card)
        together = replace(link, bytes_per_second=max(link.bytes_per_second, self.inventory.together_bytes_per_second))
        shared = sum(together.nanoseconds(copy.size_bytes, copy.copies, is_pinned=True) for (copy,) in segment.ahead)
        if max(elapsed, shared) == nanoseconds:  # other links bring nothing besides
            return SegmentTime(nanoseconds)
        return SegmentTime(0, (Ahead(self.phase, card, nanoseconds, max(elapsed, shared)),))

    def missing(self, segment: Segment) -> Iterator[MissingFigureError]:
        """Yield the figures that the time of a segment needs and the machine does not give."""
        for device, step in segment.steps:
            for part in (step, step._replace(touched_bytes=0, chosen_bytes=0)):  # what is read, and what is computed
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
        """Return how long each device works on a segment, with what it is given as fast as the host does it."""
        working: Counter[Device] = Counter()
        for (device, step), count in segment.steps.items():
            working[device] += count * self.step_nanoseconds(step, device)
        found = {}
        for device in dict.fromkeys([*working, *segment.dispatches]):
            both = (working[device], segment.dispatches[device] * self.inventory.dispatch_nanoseconds)
            found[device] = max(both) if device.is_accelerator else sum(both)
        return found

    def step_nanoseconds(self, step: ModuleWork, device: Device) -> int:
        """Return how long a device takes for what a module does."""
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
        """Return how long it takes at least, whichever device does it: at the highest rates of all."""
        amounts = ((step.touched_bytes, self._highest[0]), (step.operations, self._highest[1]))
        return max(amount * NANOSECONDS_PER_SECOND // rate if rate else 0 for amount, rate in amounts)

    @cached_property
    def _highest(self) -> tuple[int, int]:
        rates = self._reached.values()
        reading = max((rate for each in rates for rate in (each.reading, each.experts) if rate), default=0)
        return reading, max((rate for each in rates for rate in (each.computing, each.attention) if rate), default=0)

    def copy_nanoseconds(self, copy: Copy) -> int:
        """Return how long it takes to bring something from one device to another."""
        if copy.source == copy.target or not copy.copies:
            return 0
        link = self._link(copy.source, copy.target)
        return link.nanoseconds(copy.size_bytes, copy.copies, is_pinned=copy.is_pinned)

    def basis(self, segments: Iterable[Segment]) -> Basis:
        """Return on what the time of these rests: the weakest basis of all rates that it takes."""
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
    """The rates that a device reaches in bytes read and operations computed a second, as far as the machine states
    them.
    """

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
