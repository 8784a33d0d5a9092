"""Turns the rules of a profile into constraints on stages; a rule that vLLM cannot express is refused at its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, product
from typing import TYPE_CHECKING

import numpy as np

from devmap_config.pipeline.cuts import between
from devmap_config.pipeline.layers import is_in, number_of
from devmap_config.pipeline.slots import MOST_CHOICES, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.pipeline.cuts import Mask
    from devmap_config.pipeline.layers import Layers
    from devmap_config.pipeline.slots import Slot
    from devmap_config.rules.resolution import Decision, Resolution
    from devmap_config.rules.rule import Rule


@dataclass(frozen=True)
class Wishes:
    """The constraints of rules on layers by number; -1 stands for the modules before the layers, their count for those
    after.

    Attributes:
        wanted: the required devices, with their rules.
        forbidden: the forbidden devices.
        together: layers that must share a stage.
    """

    layers: int
    wanted: Mapping[int, tuple[Device, Rule]] = field(default_factory=dict)
    forbidden: Mapping[int, frozenset[Device]] = field(default_factory=dict)
    together: tuple[frozenset[int], ...] = ()

    @cached_property
    def devices(self) -> frozenset[Device]:
        """The devices that rules name."""
        return self.needed.union(*self.forbidden.values())

    @cached_property
    def needed(self) -> frozenset[Device]:
        """The devices that rules place something on, each of which a pipeline must use."""
        return frozenset(device for device, _ in self.wanted.values())

    def allowed(self, slots: Sequence[Slot]) -> list[Mask]:
        """Return the layers that each of these stages may have; equal stages share their matrix."""
        known: dict[tuple[object, ...], Mask] = {}
        allowed = []
        for place, slot in enumerate(slots):
            key = (frozenset(device.id for device in slot) & self.devices, place == 0, place == len(slots) - 1)
            if key not in known:
                known[key] = self._allowed(place, slot, len(slots))
            allowed.append(known[key])
        return allowed

    def orders(self, slots: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
        """Yield the slots in each order that rules allow, beginning with the given one.

        Of each host, the slots with the first and the last layers stay in place, and those with other layers keep their
        order. If rules name none of the latter, all stay; otherwise the rest may be anywhere between, with equal slots
        counted once.
        """
        by_host: dict[str | None, list[Slot]] = {}
        for slot in slots:
            by_host.setdefault(slot[0].id.host, []).append(slot)
        # The orders of a host are limited, too.
        for of_hosts in product(*(islice(self._orders_of_host(own), MOST_CHOICES + 1) for own in by_host.values())):
            yield tuple(chain.from_iterable(of_hosts))

    def _orders_of_host(self, own: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
        between = [slot for slot in own if not end_of(slot, self)]
        if not any(device.id in self.devices for slot in between for device in slot):
            yield tuple(own)
            return
        before, behind = (tuple(slot for slot in own if end_of(slot, self) == end) for end in (-1, 1))
        needed_slots = [slot for slot in between if any(device.id in self.needed for device in slot)]
        others = [slot for slot in between if slot not in needed_slots]
        alike: dict[object, list[Slot]] = {}
        for slot in others:
            alike.setdefault(kind_of(slot, self.devices), []).append(slot)
        seen = set()
        for queues in (
            [needed_slots, others],
            [needed_slots, *alike.values()],
        ):  # first the orders in which the others keep theirs
            for order in _merged(queues, between):
                key = tuple(slot[0].id for slot in order)
                if key not in seen:
                    seen.add(key)
                    yield (*before, *order, *behind)

    def _allowed(self, place: int, slot: Slot, stages: int) -> Mask:
        ids = {device.id for device in slot}
        ends = {-1: place == 0, self.layers: place == stages - 1}
        if any(is_here and not self._may_be(end, ids) for end, is_here in ends.items()):
            return np.zeros((self.layers, self.layers), dtype=bool)
        refused = [0 if self._may_be(number, ids) else 1 for number in range(self.layers)]
        allowed: Mask = between(refused) == 0
        for group in self.together:
            members = [1 if number in group else 0 for number in range(self.layers)]
            count = between(members)
            needs_all = any(is_here and end in group for end, is_here in ends.items())
            is_elsewhere = any(not is_here and end in group for end, is_here in ends.items())
            whole = (count == sum(members)) & (not is_elsewhere)
            allowed &= whole if needs_all else whole | (count == 0)
        return allowed

    def _may_be(self, number: int, ids: set[Device]) -> bool:
        if number in self.wanted and self.wanted[number][0] not in ids:
            return False
        return not self.forbidden.get(number, frozenset()) & ids


def wishes_of(layers: Layers, resolution: Resolution, slots: Sequence[Slot], sink: Sink) -> Wishes:
    """Return the constraints of rules on stages, and report rules that vLLM cannot express."""
    count = len(layers.paths)
    slot_of = {device.id: slot for slot in slots for device in slot}
    refused: set[int] = set()

    def refuse(rule: Rule, message: str, help: str) -> None:
        if id(rule) not in refused:
            refused.add(id(rule))
            sink.error("beyond-vllm", message, rule.span, help=help)

    wanted: dict[int, tuple[Device, Rule]] = {}
    for number, names in _members(layers):
        decisions = [resolution.decisions.get(name) for name in names]  # type: ignore[call-overload]
        made = [decision for decision in decisions if decision is not None]
        for decision in made:
            if problem := _beyond(decision, slot_of):
                refuse(decision.rule, *problem)
        if not made:
            continue
        if 0 <= number < count and (len(made) < len(names) or len({decision.device for decision in made}) > 1):
            part = min(made, key=lambda decision: sum(other.rule is decision.rule for other in made))
            refuse(
                part.rule,
                f"`{part.rule.text}` is about a part of `{layers.paths[number]}`, and vLLM places whole layers",
                f"give all of the layer one device: `match: {layers.paths[number]}`",
            )
            continue
        first = min(made, key=lambda decision: decision.rule.span)
        other = next((decision for decision in made if decision.device != first.device), None)
        if other is not None:
            where = "before the layers" if number < 0 else "behind the layers"
            refuse(
                other.rule,
                f"what is {where} is on one stage, and rules put it on {first.device} and {other.device}",
                "embeddings are on the first stage, and the norm and the head on the last: give them one device",
            )
            continue
        wanted[number] = (first.device, first.rule)
    if not refused:
        _check_order(wanted, layers, slots, sink)
    return Wishes(
        layers=count,
        wanted=wanted,
        forbidden=_forbidden(layers, resolution),
        together=tuple(
            frozenset(numbers)
            for _, names in resolution.groups
            if len(numbers := {place for name in names if (place := _place_of(layers, name)) is not None}) > 1
        ),
    )


def in_order(slots: Sequence[Slot], wishes: Wishes) -> tuple[Slot, ...]:
    """Return the slots, with those of each host in the order of the layers that rules give them.

    A slot with the first layer, or modules before it, must be the first stage of its host, and one with the last layer,
    or modules after it, the last. Slots of that host that no rule names are between them.
    """
    asked: dict[Device, int] = {}
    for number in sorted(wishes.wanted):
        asked.setdefault(wishes.wanted[number][0], number)
    ordered: list[Slot] = []
    for host in dict.fromkeys(slot[0].id.host for slot in slots):
        own = [slot for slot in slots if slot[0].id.host == host]
        named = [slot for slot in own if any(device.id in asked for device in slot)]
        by_layer = iter(sorted(named, key=lambda slot: min(asked.get(device.id, len(asked) ** 9) for device in slot)))
        by_rules = [next(by_layer) if slot in named else slot for slot in own]
        ordered += sorted(by_rules, key=lambda slot: end_of(slot, wishes))
    return tuple(ordered)


def end_of(slot: Slot, wishes: Wishes) -> int:
    """Return -1 for a slot that rules make the first of its host, 1 for the last, and 0 for others."""
    ids = {device.id for device in slot}
    numbers = [number for number, (device, _) in wishes.wanted.items() if device in ids]
    if not numbers:
        return 0
    return -1 if min(numbers) <= 0 else 1 if max(numbers) >= wishes.layers - 1 else 0


def _merged(queues: Sequence[Sequence[Slot]], given: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
    """Yield all ways to merge queues that keep the order of each, beginning with the given order."""
    heads = sorted((queue for queue in queues if queue), key=lambda queue: given.index(queue[0]))
    if not heads:
        yield ()
    for queue in heads:
        rest = [other if other is not queue else other[1:] for other in heads]
        yield from ((queue[0], *order) for order in _merged(rest, given))


def _members(layers: Layers) -> Iterator[tuple[int, list[str]]]:
    """Yield the tensors of each position: before the layers, of each layer, and after them."""
    graph, count = layers.graph, len(layers.paths)
    places = {-1: layers.before, **{number: (path,) for number, path in enumerate(layers.paths)}, count: layers.behind}
    for number, paths in places.items():
        yield number, [tensor.name for path in paths for tensor in graph.modules[path].tensors()]


def _place_of(layers: Layers, name: str) -> int | None:
    number = number_of(layers.paths, name)
    if number is not None:
        return number
    return -1 if is_in(name, layers.before) else len(layers.paths) if is_in(name, layers.behind) else None


def _forbidden(layers: Layers, resolution: Resolution) -> dict[int, frozenset[Device]]:
    forbidden: dict[int, frozenset[Device]] = {}
    for name, rules in resolution.forbidden.items():
        if (number := _place_of(layers, name)) is not None:
            forbidden[number] = forbidden.get(number, frozenset()) | frozenset(rules)
    return forbidden


def _beyond(decision: Decision, slot_of: Mapping[Device, Slot]) -> tuple[str, str] | None:
    """Return what vLLM cannot do about a rule, and advice."""
    rule, device = decision.rule, decision.device
    if decision.compute not in (None, device):
        return (
            f"`{rule.text}` is to compute on {decision.compute}, but vLLM computes each layer where it is stored",
            "remove `compute`",
        )
    if device in slot_of:
        return None
    if device.is_accelerator:
        return f"`{rule.text}` is put on {device}, which is in none of the groups", "name a device of a group"
    why = "a pipeline of vLLM runs on one kind of device, and keeps none of its layers elsewhere"
    listed = ", ".join(map(str, slot_of))
    return f"`{rule.text}` is put on {device}, and {why}", f"give it a device that has a stage: {listed}"


def _check_order(wanted: Mapping[int, tuple[Device, Rule]], layers: Layers, slots: Sequence[Slot], sink: Sink) -> None:
    """Report rules whose order of layers contradicts the order of stages and hosts."""
    hosts = list(dict.fromkeys(slot[0].id.host for slot in slots))
    slot_of = {device.id: place for place, slot in enumerate(slots) for device in slot}
    before: tuple[int, Device] | None = None
    left: set[int] = set()
    for number in sorted(wanted):
        device, rule = wanted[number]
        if before is not None and slot_of[device] != slot_of[before[1]]:
            left.add(slot_of[before[1]])
            if hosts.index(device.host) < hosts.index(before[1].host):
                message = f"`{rule.text}` is put on {device}, after layers on {before[1]}, whose host comes later"
                sink.error("beyond-vllm", message, rule.span, help="list the hosts in the order of their layers")
                return
            if slot_of[device] in left:
                message = (
                    f"`{rule.text}` is put on {device}, and between what is there is {_named(layers, before[0])} on"
                    f" {before[1]}: a stage of vLLM has consecutive layers"
                )
                sink.error("beyond-vllm", message, rule.span, help="give each device consecutive layers")
                return
        before = (number, device)


def _named(layers: Layers, number: int) -> str:
    if number < 0:
        return "the embedding"
    return f"`{layers.paths[number]}`" if number < len(layers.paths) else "the head"
