"""`Rule`: what is asked of the part of a model that a pattern matches; pins and `device_map` keys alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from devmap_config.rules.pattern import Pattern, PatternError, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.profile.document import ScalarNode
    from devmap_config.profile.loading import LoadedProfile

from devmap_config.profile.devices import expand_devices

Origin = Literal["pin", "device_map", "allow_new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A pattern and what is asked of its matches. `span` is the place of the pattern.

    `device` is where weights are stored, `compute` where they run, `not_on` where they must not be stored; with
    `keep_together` all matches share one device. A later rule with `override` wins over earlier ones of equal depth.
    """

    pattern: Pattern
    text: str
    span: Span
    origin: Origin = "pin"
    device: str | None = None
    compute: str | None = None
    not_on: tuple[str, ...] = ()
    keep_together: bool = False
    override: bool = False
    optional: bool = False
    node: ScalarNode | None = None

    def place(self, start: int, end: int) -> Span:
        """The place of characters of the pattern; of all of it where that cannot be told."""
        if self.node is None or self.node.text != self.text:
            return self.span
        return self.node.span_within(start, end)


def rules_of(loaded: LoadedProfile, devices: tuple[str, ...], kind: str, sink: Sink) -> tuple[Rule, ...]:
    """The rules of a profile: what may be new, the keys of its `device_map`, then its pins.

    Wrong ones are left out and reported.

    Args:
        loaded: the profile.
        devices: the canonical names of the devices that it lists.
        kind: the kind of accelerator that a bare number stands for.
        sink: takes bad patterns and unknown devices.
    """
    rules: list[Rule] = [*_new_on_purpose(loaded, sink)]
    for text, device in (loaded.profile.placement.device_map or {}).items():
        route = ("placement", "device_map", text)
        pattern = _parse(loaded.key(*route), text, loaded.key_span(*route), sink)
        home = _known(device, loaded.span(*route), devices, kind, sink)
        if pattern is not None and home is not None:
            span, node = loaded.key_span(*route), loaded.key(*route)
            rules.append(Rule(pattern=pattern, text=text, span=span, origin="device_map", device=home, node=node))
    for index, pin in enumerate(loaded.profile.placement.pins):
        base = ("placement", "pins", index)
        if base in loaded.invalid:
            continue
        span = loaded.span(*base, "match")
        pattern = _parse(loaded.scalar(*base, "match"), pin.match, span, sink)
        named = {
            name: _known(value, loaded.span(*base, name), devices, kind, sink)
            for name, value in (("device", pin.device), ("compute", pin.compute))
            if value is not None
        }
        forbidden = [_canonical(value, kind) for value in pin.not_on]
        for position, name in enumerate(forbidden):
            _known(name, loaded.span(*base, "not_on", position), devices, kind, sink)
        if pin.compute is not None and not _can_compute(named["compute"], loaded.span(*base, "compute"), sink):
            continue
        if pattern is None or None in named.values():
            continue
        rules.append(
            Rule(
                pattern=pattern,
                text=pin.match,
                span=span,
                device=named.get("device"),
                compute=named.get("compute"),
                not_on=tuple(forbidden),
                keep_together=pin.keep_together,
                override=pin.override,
                optional=pin.optional,
                node=loaded.scalar(*base, "match"),
            )
        )
    return tuple(rules)


def _new_on_purpose(loaded: LoadedProfile, sink: Sink) -> Iterator[Rule]:
    for index, text in enumerate(loaded.profile.model.allow_new):
        route: tuple[str | int, ...] = ("model", "allow_new", index)
        if loaded.scalar(*route) is None:  # a single one stands without a list
            route = ("model", "allow_new")
        span, node = loaded.span(*route), loaded.scalar(*route)
        pattern = _parse(node, text, span, sink)
        if pattern is not None:
            yield Rule(pattern=pattern, text=text, span=span, origin="allow_new", node=node)


def _parse(node: ScalarNode | None, text: str, span: Span, sink: Sink) -> Pattern | None:
    if "\n" in text:
        sink.error("bad-pattern", "the pattern holds a line break", span, help="write it on one line, in quotes")
        return None
    try:
        return parse_pattern(text)
    except PatternError as error:
        place = node.span_within(error.start, error.end) if node is not None and node.text == text else span
        sink.error("bad-pattern", f"`{text}` is no pattern: {error.message}", place, help=error.help)
        return None


def _known(device: str, span: Span, devices: tuple[str, ...], kind: str, sink: Sink) -> str | None:
    name = _canonical(device, kind)
    if name in devices:
        return name
    sink.error(
        "unknown-device",
        f"{name} is not a device of this profile",
        span,
        help=f"list it under `hardware.devices`; listed are {', '.join(devices)}",
    )
    return None


def _can_compute(device: str | None, span: Span, sink: Sink) -> bool:
    if device == "disk":
        sink.error("bad-device-name", "nothing runs on the disk", span, help="write `compute: cpu`")
        return False
    return True


def _canonical(device: str, kind: str) -> str:
    return expand_devices(device, kind)[0]
