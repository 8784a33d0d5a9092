"""Tries changed profiles to see whether compiling them gives a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from devmap_config.devices import DISK
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.placement.constraints import build_problem
from devmap_config.plan.attempts import Candidate, attempts
from devmap_config.profile.schema import Cache, DeviceSection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.placement.constraints import Repairs
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.rules.rule import Rule

    Prepare = Callable[[LoadedProfile, LoadedModel | None, Sink], Prepared | None]


@dataclass(frozen=True, kw_only=True)
class ProfileChange:
    """A change of a profile to try; fields that are `None` stay unchanged.

    Attributes:
        without: rules of pins that are left out.
        devices: new descriptions of devices, by name; unlisted devices are added.
    """

    without: tuple[Rule, ...] = ()
    context_length: int | None = None
    cache: str | None = None
    quantization: Mapping[str, Any] | None = None
    strategy: str | None = None
    offload_buffers: bool | None = None
    devices: Mapping[Device, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_of_model(self) -> bool:
        """True if the model has to be measured anew."""
        return any(value is not None for value in (self.context_length, self.cache, self.quantization))

    def applied_to(self, loaded: LoadedProfile) -> LoadedProfile:
        """Return the profile with this change."""
        profile = loaded.profile
        model, workload, hardware, placement = profile.model, profile.workload, profile.hardware, profile.placement
        if self.quantization is not None:
            model = model.changed(quantization=self.quantization)
        if self.context_length is not None:
            workload = workload.changed(context_length=self.context_length)
        if self.cache is not None:
            workload = workload.changed(cache=Cache(implementation=self.cache))
        devices = dict(hardware.devices.value)
        for device, description in self.devices.items():
            devices[device] = devices.get(device, DeviceSection()).changed(**description)
        offload = placement.offload
        if DISK in self.devices and offload.folder.value is None:
            offload = offload.changed(folder="offload")
        if self.offload_buffers is not None:
            offload = offload.changed(buffers=self.offload_buffers)
        pins = tuple(pin for pin in placement.pins if all(pin.match is not rule.source for rule in self.without))
        strategy = self.strategy or placement.strategy.value
        placement = placement.changed(offload=offload, strategy=strategy, pins=pins)
        hardware = hardware.changed(devices=devices)
        changed = profile.changed(model=model, workload=workload, hardware=hardware, placement=placement)
        return replace(loaded, profile=changed)


MOST_DEVICES = 32
"""The most devices with which changes are tried: the time of a trial is quadratic in their number, and there are up
to a dozen trials.
"""


@dataclass(frozen=True)
class Trials:
    """Tries changes of a profile, up to but excluding the dry run, with the repairs of an earlier one.

    `prepare` runs the stages before placing, with a given model or the profile's; without it, nothing is tried, and no
    change helps.
    """

    prepared: Prepared
    prepare: Prepare | None
    repairs: Repairs

    def fits(self, change: ProfileChange) -> bool:
        """Return whether there is any plan, however slow; costs for another context are derived from the present
        measurement.
        """
        if self.prepare is None:
            return False
        model, measurement = self.prepared.model, self.prepared.graph.measurement
        if change.context_length is not None and measurement is not None:
            model = replace(model, graph=replace(model.graph, measurement=measurement.at(change.context_length)))
        return self._has_plan(change, model, at_any_speed=True)

    def compiles(self, change: ProfileChange) -> bool:
        """Return whether compiling the changed profile gives a plan."""
        return self._has_plan(change, None if change.is_of_model else self.prepared.model)

    def _has_plan(self, change: ProfileChange, model: LoadedModel | None, *, at_any_speed: bool = False) -> bool:
        if self.prepare is None or len(self.prepared.inventory.capacities) > MOST_DEVICES:
            return False
        sink = Sink()
        try:
            prepared = self.prepare(change.applied_to(self.prepared.loaded), model, sink)
        except LibraryChangedError:
            return False
        if prepared is None or sink.has_errors or (problem := build_problem(prepared, sink, self.repairs)) is None:
            return False
        if at_any_speed and problem.aim is not None:
            problem = replace(problem, aim=replace(problem.aim, phases=()))
            prepared = replace(prepared, loaded=ProfileChange(strategy="fastest").applied_to(prepared.loaded))
        return any(isinstance(attempt, Candidate) for attempt in attempts(problem, prepared))
