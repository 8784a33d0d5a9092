"""Slots, the places of stages: a device, or a tensor-parallel group of equal devices, host by host."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.hardware.inventory import Inventory, InventoryDevice, InventoryLink
    from devmap_config.profile.loading import LoadedProfile

Slot: TypeAlias = "tuple[InventoryDevice, ...]"
"""The devices of one stage: one device, or those of a group."""

MOST_CHOICES = 1024
"""The most ways to choose the devices of a pipeline; equal devices of a host, and equal hosts, count once.

Four hosts with two cards of each of two kinds have 430; with 126 layers, these take three seconds."""


def slots_of(loaded: LoadedProfile, inventory: Inventory, sink: Sink) -> tuple[Slot, ...]:
    """Return the slots of stages, in the order of hosts and devices, and report mistakes in the groups.

    vLLM runs on one kind of device: CPUs compute only if no host has an accelerator.
    """
    by_id = {device.id: device for device in inventory.devices}
    groups = loaded.profile.placement.groups
    if not groups:
        return tuple((device,) for device in _computing(inventory))
    slots: list[Slot] = []
    used: dict[Device, Span] = {}
    size = len(groups[0].value)
    for group in groups:
        problem = _problem_of(group.value, by_id, used, size)
        if problem is not None:
            sink.error("bad-group", problem[0], group.span, help=problem[1])
        else:
            slots.append(tuple(by_id[device] for device in group.value))
        used |= dict.fromkeys(group.value, group.span)
    order = {device.id: place for place, device in enumerate(inventory.devices)}
    return tuple(sorted(slots, key=lambda slot: order[slot[0].id]))


def _computing(inventory: Inventory) -> tuple[InventoryDevice, ...]:
    if any(device.id.kind != CPU.kind for device in inventory.accelerators):
        return inventory.accelerators
    in_parts = {device.id.host for device in inventory.accelerators}  # hosts whose CPU is split into several devices
    return tuple(
        device
        for device in inventory.devices
        if device.id.kind == CPU.kind and (device.id.index is not None or device.id.host not in in_parts)
    )


def _problem_of(
    group: Sequence[Device], by_id: Mapping[Device, InventoryDevice], used: Mapping[Device, Span], size: int
) -> tuple[str, str] | None:
    listed = ", ".join(map(str, by_id))
    if unknown := [device for device in group if device not in by_id]:
        return f"{unknown[0]} is not a device of this profile", f"listed are {listed}"
    if twice := [device for device in group if device in used]:
        return f"{twice[0]} is in two groups", "a device is in one group: each is a stage"
    if stored := [device for device in group if not device.is_accelerator]:
        return f"{stored[0]} is in a group, and no accelerator", "a group is of equal accelerators of one host"
    if len(group) != size:
        return (
            f"the group has {len(group)} devices, and the first has {size}",
            "vLLM has one `--tensor-parallel-size` for all stages: make all groups equal",
        )
    first = by_id[group[0]]
    for device in group:
        other = by_id[device]
        if (other.memory_bytes, other.capacity_bytes, other.rates) != (
            first.memory_bytes,
            first.capacity_bytes,
            first.rates,
        ):
            return f"{device} is not like {group[0]}", "a group is of equal devices: each does the same work"
    return None


def choices(
    slots: Sequence[Slot],
    needed: frozenset[Device],
    distinct: frozenset[Device],
    links: Mapping[tuple[Device, Device], InventoryLink],
    most_stages: int | None = None,
) -> Iterator[tuple[Slot, ...]]:
    """Yield the choices of slots for a pipeline, the largest first, with the same number on each host that is used.

    Of equal slots of a host, and of equal hosts, the first are taken. If there are more than `MOST_CHOICES`, more than
    that are yielded, but not all, as there may be as many as subsets of the hosts.

    Args:
        slots: all slots.
        needed: the devices that must be in a stage.
        distinct: the devices that rules name, whose slots equal no others.
        links: the links between devices, which must be equal for hosts to be equal.
        most_stages: the most stages; with `None`, the number of slots.
    """
    hosts: dict[str | None, list[Slot]] = {}
    for slot in slots:
        hosts.setdefault(slot[0].id.host, []).append(slot)
    kinds = {slot[0].id: kind_of(slot, distinct) for slot in slots}
    for own in hosts.values():
        reached = _reached(own, slots, links)
        kinds |= {slot[0].id: (kinds[slot[0].id], reached) for slot in own}
    numbers: dict[object, int] = {}
    numbered = {device: numbers.setdefault(kind, len(numbers)) for device, kind in kinds.items()}
    most = len(slots) if most_stages is None else most_stages
    for count in range(min(most, max(map(len, hosts.values()), default=0)), 0, -1):
        yield from _of_hosts(list(hosts.values()), count, most, needed, numbered)


def kind_of(slot: Slot, distinct: frozenset[Device]) -> tuple[object, ...]:
    """Return a key that is equal for interchangeable slots."""
    named = tuple(device.id for device in slot if device.id in distinct)
    return (named, slot[0].memory_bytes, slot[0].capacity_bytes, slot[0].rates)


def _reached(
    own: Sequence[Slot], slots: Sequence[Slot], links: Mapping[tuple[Device, Device], InventoryLink]
) -> tuple[object, ...]:
    """Return a key that is equal for hosts whose devices have equally fast links, to each other and to other hosts.

    The slower network limits a link between two hosts, so the fastest link represents a host's own network.
    """
    devices = [device.id for slot in own for device in slot]
    within = tuple(links.get((source, target)) for source in devices for target in devices if source != target)
    others = [links.get((devices[0], slot[0].id)) for slot in slots if slot[0].id.host != devices[0].host]
    known = [link for link in others if link is not None]
    fastest = max((link.bytes_per_second for link in known), default=None)
    return (within, fastest, min((link.latency_nanoseconds for link in known), default=None))


def _of_hosts(
    hosts: Sequence[Sequence[Slot]], count: int, most: int, needed: frozenset[Device], kinds: Mapping[Device, int]
) -> Iterator[tuple[Slot, ...]]:
    """Yield choices of `count` slots on each of some hosts, including the needed ones; equal choices only once.

    Partial choices are extended from the last host to the first. Each can be completed by the needed hosts before it,
    so there are at least as many choices as partial ones of any host. If these exceed the limit, the rest is dropped.
    """
    is_needed = [any(device.id in needed for slot in own for device in slot) for own in hosts]
    if any(
        must and not any(True for _ in _subsets(own, count, needed, kinds))
        for must, own in zip(is_needed, hosts, strict=True)
    ):
        return
    following: list[tuple[tuple[int, ...], tuple[Slot, ...]]] = [((), ())]
    for place in reversed(range(len(hosts))):
        room = most - count * sum(is_needed[:place])
        without: tuple[tuple[Slot, ...], ...] = () if is_needed[place] else ((),)
        partial_choices: dict[tuple[int, ...], tuple[Slot, ...]] = {}
        for own in chain(_subsets(hosts[place], count, needed, kinds), without):
            alike = tuple(kinds[slot[0].id] for slot in own)
            for key, rest in following:
                if len(own) + len(rest) <= room:
                    partial_choices.setdefault(alike + key, own + rest)
            if len(partial_choices) > MOST_CHOICES + 1:  # one of them has no stage
                break
        following = list(partial_choices.items())
    yield from (chosen for _, chosen in following if chosen)


def _subsets(
    slots: Sequence[Slot], count: int, needed: frozenset[Device], kinds: Mapping[Device, int]
) -> Iterator[tuple[Slot, ...]]:
    """Yield choices of `count` slots of a host in order, with equal slots counted rather than named."""
    by_kind: dict[int, list[int]] = {}
    for number, slot in enumerate(slots):
        by_kind.setdefault(kinds[slot[0].id], []).append(number)
    alike = list(by_kind.values())
    least = [sum(any(device.id in needed for device in slots[number]) for number in numbers) for numbers in alike]
    for counts in _counts(list(map(len, alike)), least, count):
        numbers = [number for own, taken in zip(alike, counts, strict=True) for number in own[:taken]]
        yield tuple(slots[number] for number in sorted(numbers))


def _counts(most: Sequence[int], least: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Yield the numbers to take of each kind, with this total, beginning with the most of the first kinds."""
    if not most:
        if not total:
            yield ()
        return
    for taken in range(min(most[0], total), least[0] - 1, -1):
        if sum(least[1:]) <= total - taken <= sum(most[1:]):
            yield from ((taken, *rest) for rest in _counts(most[1:], least[1:], total - taken))
