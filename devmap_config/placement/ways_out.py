"""Why nothing fits, and what would mend it: every way out was tried, and a placement was found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.hardware.inventory import Device, Inventory
from devmap_config.placement.problem import is_accelerator

if TYPE_CHECKING:
    from collections.abc import Callable

    from devmap_config.placement.problem import Aim, Problem
    from devmap_config.rules.resolution import Resolution
    from devmap_config.rules.rule import Rule

GIBIBYTE = 2**30

MOST_GIBIBYTES = 2**14
"""More memory than this is not proposed."""

CONTEXT_MULTIPLE = 64
"""A context that is proposed is a multiple of this, where it is longer."""


@dataclass(frozen=True)
class Impasse:
    """What cannot hold together: `pins`, of which none can be left out of the contradiction, and ways out of it."""

    pins: tuple[Rule, ...]
    ways_out: tuple[str, ...]


def impasse_of(problem: Problem, resolution: Resolution, aim: Aim, quantised: Callable[[], Problem | None]) -> Impasse:
    """The impasse of a problem for which no placement was found; `quantised` is the same with weights of 8 bits."""
    search = _Search(problem, resolution, replace(aim, phases=()))
    pins = search.contradicting_pins()
    ways = [
        *search.dropped_pins(pins),
        search.shorter_context(),
        search.fewer_bits(quantised),
        search.another_card(),
        search.more_memory(),
    ]
    return Impasse(pins, tuple(way for way in ways if way is not None))


@dataclass(frozen=True)
class _Search:
    problem: Problem
    resolution: Resolution
    aim: Aim

    def fits(self, problem: Problem, inventory: Inventory | None = None) -> bool:
        from devmap_config.placement.optimal import place_fastest

        aim = self.aim if inventory is None else replace(self.aim, inventory=inventory)
        room = dict(problem.capacities)
        for device, size_bytes in problem.pinned_bytes.items():
            room[device] = room.get(device, 0) - size_bytes
        return min(room.values()) >= 0 and place_fastest(problem, aim) is not None

    def without(self, rules: tuple[Rule, ...]) -> Problem:
        """The problem without what these rules pin."""
        dropped = {name for name, decision in self.resolution.decisions.items() if decision.rule in rules}
        pinned = {name: device for name, device in self.problem.pinned.items() if name not in dropped}
        computed = {name: device for name, device in self.problem.computed.items() if name not in dropped}
        return replace(self.problem, pinned=pinned, computed=computed)

    def contradicting_pins(self) -> tuple[Rule, ...]:
        """The fewest pins, left out one after another, that leave no placement together with the machine."""
        rules = tuple(dict.fromkeys(decision.rule for decision in self.resolution.decisions.values()))
        if not rules or not self.fits(self.without(rules)):
            return ()
        kept = sorted(rules, key=lambda rule: rule.span)
        for rule in tuple(kept):
            others = [other for other in kept if other is not rule]
            if not self.fits(self.without(tuple(rule for rule in rules if rule not in others))):
                kept = others
        return tuple(kept)

    def dropped_pins(self, pins: tuple[Rule, ...]) -> list[str]:
        return [
            f"drop the pin of `{rule.text}` (line {rule.span.line})"
            for rule in pins
            if self.fits(self.without((rule,)))
        ]

    def shorter_context(self) -> str | None:
        measurement = self.problem.graph.measurement
        if measurement is None:
            return None

        def fits(context_length: int) -> bool:
            graph = replace(self.problem.graph, measurement=measurement.at(context_length))
            return self.fits(replace(self.problem, graph=graph))

        most = _most(fits, measurement.workload.context_length - 1)
        if most > CONTEXT_MULTIPLE:
            most -= most % CONTEXT_MULTIPLE
        return f"lower `context_length` to {most}" if most else None

    def fewer_bits(self, quantised: Callable[[], Problem | None]) -> str | None:
        room = sum(size for device, size in self.problem.capacities.items() if is_accelerator(device))
        if 2 * room < self.problem.graph.size_bytes or (problem := quantised()) is None:
            return None
        offered = {device: size for device, size in problem.capacities.items() if device not in problem.refused}
        fits = bool(offered) and self.fits(replace(problem, capacities=offered))
        return "quantise: `quantization: {method: bitsandbytes, load_in_8bit: true}`" if fits else None

    def another_card(self) -> str | None:
        """One more of the last accelerator, where it is one of the catalogue."""
        cards = [device for device in self.aim.inventory.devices if device.is_accelerator]
        if not cards or cards[-1].accelerator is None or ":" not in cards[-1].id:
            return None
        kind, _, index = cards[-1].id.partition(":")
        added = replace(cards[-1], id=f"{kind}:{int(index) + 1}")
        return f"add `{added.id}: {cards[-1].accelerator.name}`" if self.fits_with(added) else None

    def more_memory(self) -> str | None:
        """The least more of the CPU, or of the first accelerator that is described by its memory."""
        devices = {device.id: device for device in self.aim.inventory.devices}
        described = next((each for each in devices.values() if each.is_accelerator and each.accelerator is None), None)
        device = described or devices.get("cpu") or Device(id="cpu", memory_bytes=0, capacity_bytes=0)

        def enlarged(gibibytes: int) -> Device:
            return replace(device, capacity_bytes=device.capacity_bytes + gibibytes * GIBIBYTE)

        least = MOST_GIBIBYTES - _most(lambda spared: self.fits_with(enlarged(MOST_GIBIBYTES - spared)), MOST_GIBIBYTES)
        if not self.fits_with(enlarged(least)):
            return None
        if device.id not in devices:
            return f"list `cpu: {{memory: {least}GiB}}` for what is to be offloaded"
        return f"give {device.id} {least} GiB more"

    def fits_with(self, device: Device) -> bool:
        """Whether there is a placement with this device added, or in place of the one of its name."""
        others = [each for each in self.aim.inventory.devices if each.id != device.id]
        accelerators = [each for each in (*others, device) if is_accelerator(each.id)]
        ordered = sorted(accelerators, key=lambda each: int(each.id.partition(":")[2] or 0))
        ordered += [each for name in ("cpu", "disk") for each in (*others, device) if each.id == name]
        inventory = Inventory(tuple(ordered), self.aim.inventory.links)
        return self.fits(replace(self.problem, capacities=inventory.capacities), inventory)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to the limit that fits, if smaller ones do; 0 where none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
