"""`Rule`: a pattern and the constraints on what it matches, from a pin or a key of `device_map`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from devmap_config.devices import DISK
from devmap_config.profile.device_names import device_meant, where_to_list
from devmap_config.rules.pattern import Pattern, PatternError, parse_pattern

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.located import Located
    from devmap_config.profile.schema import Pin


Origin = Literal["pin", "device_map", "allow_new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A pattern and the constraints on its matches; `source` is the pattern as the profile has it.

    `device` stores the weights, `compute` runs them, and devices of `not_on` must not store them. With `keep_together`,
    all matches share one device. A later rule with `override` outranks earlier ones of equal depth.
    """

    pattern: Pattern
    source: Located[str]
    origin: Origin = "pin"
    device: Device | None = None
    compute: Device | None = None
    not_on: tuple[Device, ...] = ()
    keep_together: bool = False
    override: bool = False
    optional: bool = False

    @property
    def text(self) -> str:
        """The pattern as it is written."""
        return self.source.value

    @property
    def span(self) -> Span:
        """The place of the pattern."""
        return self.source.span


def rules_of(loaded: LoadedProfile, devices: tuple[Device, ...], kind: str, sink: Sink) -> tuple[Rule, ...]:
    """Return the rules of a profile: the keys of its `device_map`, then its pins.

    Wrong rules are reported; a rule whose pattern is right is kept without its device, so that it is still matched.

    Args:
        loaded: the profile.
        devices: the devices that it lists.
        kind: the kind of accelerator that a bare number stands for.
        sink: takes the diagnostics.
    """
    profile, listed = loaded.profile, _Listed(devices, kind, sink, are_all=loaded.profile.hardware.knows_devices)
    new = [_rule_of_new(source, sink) for source in profile.model.allow_new]
    mapped = [
        _rule_of_key(source, device, listed, sink)
        for source, device in (profile.placement.device_map.value or {}).items()
    ]
    pinned = [_rule_of_pin(pin, listed, sink) for pin in profile.placement.pins]
    return tuple(rule for rule in (*new, *mapped, *pinned) if rule is not None)


def _rule_of_new(source: Located[str], sink: Sink) -> Rule | None:
    pattern = _parse(source, sink)
    return None if pattern is None else Rule(pattern=pattern, source=source, origin="allow_new")


def _rule_of_key(source: Located[str], named: Located[Device | int], listed: _Listed, sink: Sink) -> Rule | None:
    pattern, device = _parse(source, sink), listed.known(named)
    return None if pattern is None else Rule(pattern=pattern, source=source, origin="device_map", device=device)


def _rule_of_pin(pin: Pin, listed: _Listed, sink: Sink) -> Rule | None:
    pattern, device = _parse(pin.match, sink), listed.known(pin.device)
    for named in pin.not_on:
        listed.known(named)
    if pin.compute.value == DISK:
        compute = None
        sink.error("bad-device-name", "nothing runs on the disk", pin.compute.span, help="write `compute: cpu`")
    else:
        compute = listed.known(pin.compute)
    if pattern is None:
        return None
    is_unknown = (device is None) != (pin.device.value is None) or (compute is None) != (pin.compute.value is None)
    if is_unknown or pin.doubtful:
        return Rule(pattern=pattern, source=pin.match, optional=pin.optional or "optional" in pin.doubtful)
    return Rule(
        pattern=pattern,
        source=pin.match,
        device=device,
        compute=compute,
        not_on=tuple(device_meant(named.value, listed.kind) for named in pin.not_on),
        keep_together=pin.keep_together,
        override=pin.override,
        optional=pin.optional,
    )


def _parse(source: Located[str], sink: Sink) -> Pattern | None:
    if "\n" in source.value:
        sink.error("bad-pattern", "the pattern holds a line break", source.span, help="write it on one line, in quotes")
        return None
    try:
        return parse_pattern(source.value)
    except PatternError as error:
        place = source.span_within(error.start, error.end)
        sink.error("bad-pattern", f"`{source.value}` is not a pattern: {error.message}", place, help=error.help)
        return None


@dataclass(frozen=True)
class _Listed:
    """The devices that the profile lists, if they `are_all`; and the kind that a bare number stands for."""

    devices: tuple[Device, ...]
    kind: str
    sink: Sink
    are_all: bool

    def known(self, named: Located[Device | int | None]) -> Device | None:
        """Return the device that is named; if it is not listed, report it and return `None`."""
        if named.value is None:
            return None
        device = device_meant(named.value, self.kind)
        if device in self.devices:
            return device
        if not self.are_all:
            return None
        self.sink.error(
            "unknown-device",
            f"{device} is not a device of this profile",
            named.span,
            help=where_to_list(device, self.devices),
        )
        return None
