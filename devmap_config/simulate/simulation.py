"""The result of a dry run, as immutable data that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PlainValidator, TypeAdapter
from pydantic_core import to_jsonable_python

from devmap_config.devices import Device
from devmap_config.graph.failures import Cause  # noqa: TC001  pydantic reads the annotations

if TYPE_CHECKING:
    from collections.abc import Mapping

ReadDevice = Annotated[Device, PlainValidator(lambda value: Device.from_text(str(value)))]
"""A device, which is text in stored data."""

NOWHERE = Device("meta")
"""The device of a weight that is stored elsewhere and not copied in, as accelerate leaves it."""

Outcome = Literal["runs", "mismatch", "unsimulated"]
"""The plan runs; it does not run, because a tensor is on the wrong device; or it could not be tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MismatchedTensor:
    """A tensor of an operation that does not run: its device, its name, and the block that made or holds it.

    `tensor` is the name of a weight, or `None` for a computed tensor. `block` is `""` for a tensor that was made
    outside of every block; `blocks` then are all blocks that it derives from.
    """

    device: ReadDevice
    block: str
    made_by: str
    tensor: str | None = None
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMismatch:
    """An operation that does not run, with the phase and the innermost running module.

    Its tensors are on two devices, or the first of `tensors` is a weight that is `NOWHERE`.
    """

    operation: str
    phase: str
    running: str
    tensors: tuple[MismatchedTensor, ...]

    @property
    def absent(self) -> MismatchedTensor | None:
        """The weight that was not copied in, if that is the mismatch."""
        return self.tensors[0] if self.tensors[0].device == NOWHERE else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedDevice:
    """The memory of a device during a dry run, in bytes.

    Attributes:
        peak_bytes: the most at once, weights and cache included.
        peak_phase: the phase of the peak.
        peak_module: the module of the peak.
        cache_bytes: the elements of the cache's tensors after the prefill.
    """

    id: ReadDevice
    weights_bytes: int
    cache_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """The bytes over a link in one phase; `weights_bytes` of `size_bytes` were streamed weights."""

    phase: str
    source: Device
    target: Device
    transfers: int
    size_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRun:
    """A block that ran, with its device, and the most bytes on each device meanwhile, without weights."""

    phase: str
    block: str
    device: Device
    live_bytes: tuple[tuple[Device, int], ...]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A dry run of a plan: its outcome, and the observations until then.

    `hops` is the number of times that a forward moved to another device between blocks, in the last phase. `calls`
    holds the phase and the device of every call of a module. `idle` are blocks with weights that a prompt of only text
    does not call.
    """

    outcome: Outcome
    devices: tuple[SimulatedDevice, ...] = ()
    links: tuple[LinkUse, ...] = ()
    steps: tuple[BlockRun, ...] = ()
    calls: tuple[tuple[str, str, Device], ...] = ()
    idle: tuple[str, ...] = ()
    hops: int = 0
    mismatch: DeviceMismatch | None = None
    reason: str | None = None
    cause: Cause = "model"
    """The cause, if the plan could not be tried."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        plain: dict[str, Any] = to_jsonable_python(self, fallback=str)
        return {
            **{key: plain[key] for key in ("outcome", "reason", "mismatch", "hops", "idle", "devices", "links")},
            "steps": [{**step, "live_bytes": dict(step["live_bytes"])} for step in plain["steps"]],
            "calls": [{"phase": phase, "module": path, "device": device} for phase, path, device in plain["calls"]],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The remembered result of a dry run: whether the plan runs, and the peak of each device."""

    outcome: Outcome
    devices: tuple[SimulatedDevice, ...] = ()
    mismatch: DeviceMismatch | None = None
    reason: str | None = None
    cause: Cause = "model"

    @classmethod
    def of(cls, simulation: Simulation) -> Verdict:
        """Return the part of a dry run's result that is stored."""
        return cls(**{field.name: getattr(simulation, field.name) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain data, from which `from_json` makes an equal one."""
        value: dict[str, Any] = to_jsonable_python(self, fallback=str)
        if self.cause == "model":
            del value["cause"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """Return the verdict that `to_json` wrote.

        Raises:
            ValueError: if the value is not one.
        """
        if not isinstance(value, dict) or value.keys() | {"cause"} != {field.name for field in fields(cls)}:
            raise ValueError("not a verdict")
        verdict = _verdict_reader().validate_python(value)
        tensors = () if verdict.mismatch is None else verdict.mismatch.tensors
        if bool(tensors) != (verdict.outcome == "mismatch"):
            raise ValueError("not a verdict")
        return verdict


@cache
def _verdict_reader() -> TypeAdapter[Verdict]:
    return TypeAdapter(Verdict)
