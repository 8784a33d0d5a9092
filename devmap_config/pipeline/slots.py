"""The places of stages: a device, or a tensor-parallel group of equal devices, host by host."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from devmap_config.devices import CPU

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.hardware.inventory import Inventory, InventoryDevice
    from devmap_config.profile.loading import LoadedProfile

Slot: TypeAlias = "tuple[InventoryDevice, ...]"
"""The devices of one stage: one, or those of a group."""

MOST_CHOICES = 256
"""Ways to choose the devices of a pipeline that are looked at: equal devices of a host count once."""


def slots_of(loaded: LoadedProfile, inventory: Inventory, sink: Sink) -> tuple[Slot, ...]:
    """Return where a stage may be, in the order of hosts and devices; what is wrong with the groups goes to the sink.

    vLLM runs on one kind of device: what is no accelerator computes only where no host has any.
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
    return inventory.accelerators or tuple(device for device in inventory.devices if device.id.of_its_host == CPU)


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
    slots: Sequence[Slot], needed: frozenset[Device], distinct: frozenset[Device]
) -> Iterator[tuple[Slot, ...]]:
    """Yield which slots may be the stages of a pipeline, most first: as many on each host that is used.

    Of equal slots of a host, the first are taken.

    Args:
        slots: those that there are.
        needed: devices of which each has to be in a stage.
        distinct: devices that rules name: a slot with one of them is like no other.
    """
    hosts: dict[str | None, list[Slot]] = {}
    for slot in slots:
        hosts.setdefault(slot[0].id.host, []).append(slot)
    for count in range(max(map(len, hosts.values()), default=0), 0, -1):
        for chosen in _of_hosts(list(hosts.values()), count, needed, distinct):
            if chosen:
                yield chosen


def _of_hosts(
    hosts: Sequence[Sequence[Slot]], count: int, needed: frozenset[Device], distinct: frozenset[Device]
) -> Iterator[tuple[Slot, ...]]:
    """Yield so many slots of each of some hosts, those that are needed among them."""
    if not hosts:
        yield ()
        return
    is_needed = any(device.id in needed for slot in hosts[0] for device in slot)
    for rest in _of_hosts(hosts[1:], count, needed, distinct):
        yield from (own + rest for own in _subsets(hosts[0], count, needed, distinct))
        if not is_needed:
            yield rest


def _subsets(
    slots: Sequence[Slot], count: int, needed: frozenset[Device], distinct: frozenset[Device]
) -> Iterator[tuple[Slot, ...]]:
    """Yield so many slots of a host in their order, equal ones counted instead of named."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for number, slot in enumerate(slots):
        named = tuple(device.id for device in slot if device.id in distinct)
        kinds.setdefault((named, slot[0].memory_bytes, slot[0].capacity_bytes, slot[0].rates), []).append(number)
    alike = list(kinds.values())
    least = [sum(any(device.id in needed for device in slots[number]) for number in numbers) for numbers in alike]
    for counts in _counts(list(map(len, alike)), least, count):
        numbers = [number for own, taken in zip(alike, counts, strict=True) for number in own[:taken]]
        yield tuple(slots[number] for number in sorted(numbers))


def _counts(most: Sequence[int], least: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Yield how many of each kind may be taken, so many in all, the most of the first kinds first."""
    if not most:
        if not total:
            yield ()
        return
    for taken in range(min(most[0], total), least[0] - 1, -1):
        if sum(least[1:]) <= total - taken <= sum(most[1:]):
            yield from ((taken, *rest) for rest in _counts(most[1:], least[1:], total - taken))
