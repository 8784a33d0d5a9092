"""Finds the contradiction if nothing fits, and remedies, each of which has been tried and gives a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import GIBIBYTE
from devmap_config.devices import CPU, OFFLOADING_KIND, Device
from devmap_config.graph.costs import PARTLY
from devmap_config.plan.trials import ProfileChange

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devmap_config.placement.problem import Problem
    from devmap_config.plan.trials import Trials
    from devmap_config.prepared import Prepared
    from devmap_config.rules.rule import Rule

MOST_GIBIBYTES = 2**14
"""The most memory that is proposed."""

CONTEXT_MULTIPLE = 64
"""A proposed context is a multiple of this, if it is longer."""

EIGHT_BIT: Mapping[str, Any] = {"method": "bitsandbytes", "load_in_8bit": True}
"""A quantization that works while loading any model of matrices, and takes half of bfloat16's bytes."""


@dataclass(frozen=True)
class Impasse:
    """A contradiction: a minimal set of `pins`, and remedies."""

    pins: tuple[Rule, ...]
    remedies: tuple[str, ...]


def impasse_of(problem: Problem, prepared: Prepared, trials: Trials) -> Impasse:
    """Return the impasse of a problem for which no placement was found."""
    search = _RemedySearch(problem, prepared, trials)
    pins = search.contradicting_pins()
    remedies = [
        *search.dropped_pins(pins),
        search.offload_unquantised(),
        search.shorter_context(),
        search.cache_on_the_cpu(),
        search.fewer_bits(),
        search.another_card(),
        search.more_memory(),
    ]
    return Impasse(pins, tuple(remedy for remedy in remedies if remedy is not None))


@dataclass(frozen=True)
class _RemedySearch:
    problem: Problem
    prepared: Prepared
    trials: Trials

    def contradicting_pins(self) -> tuple[Rule, ...]:
        """Return a minimal set of pins that leaves no placement on this machine, found by leaving out one after
        another.
        """
        rules = tuple(dict.fromkeys(decision.rule for decision in self.prepared.resolution.decisions.values()))
        if not rules or not self.trials.compiles(ProfileChange(without=rules)):
            return ()
        pins = sorted(rules, key=lambda rule: rule.span)
        for rule in tuple(pins):
            others = [other for other in pins if other is not rule]
            if not self.trials.fits(ProfileChange(without=tuple(rule for rule in rules if rule not in others))):
                pins = others
        return tuple(pins)

    def dropped_pins(self, pins: tuple[Rule, ...]) -> list[str]:
        return [
            f"drop the pin of `{rule.text}` (line {rule.span.line})"
            for rule in pins
            if self.trials.compiles(ProfileChange(without=(rule,)))
        ]

    def offload_unquantised(self) -> str | None:
        """Let the quantizer leave weights on the CPU and the disk unquantised, if it has an argument for that."""
        quantization, asked = self.prepared.model.quantization, self.prepared.loaded.profile.model.quantization.value
        argument = None if quantization is None else quantization.accepting_argument
        if argument is None or not asked:
            return None
        tried = self.trials.compiles(ProfileChange(quantization={**asked, argument: True}))
        return f"write `{argument}: true`" if tried else None

    def shorter_context(self) -> str | None:
        measurement = self.problem.graph.measurement
        if measurement is None:
            return None
        most = _most(
            lambda length: self.trials.fits(ProfileChange(context_length=length)),
            measurement.workload.context_length - 1,
        )
        if most > CONTEXT_MULTIPLE:
            most -= most % CONTEXT_MULTIPLE
        tried = most and self.trials.compiles(ProfileChange(context_length=most))
        return f"lower `context_length` to {most}" if tried else None

    def cache_on_the_cpu(self) -> str | None:
        """Offload as much of the cache as is fastest, if the weights alone have room."""
        problem, measurement = self.problem, self.problem.graph.measurement
        is_dynamic = measurement is not None and measurement.workload.cache == "dynamic"
        can_hold_it = CPU in problem.capacities and any(device.kind == OFFLOADING_KIND for device in problem.capacities)
        has_room = problem.graph.size_bytes < sum(problem.capacities.values())
        if not (is_dynamic and can_hold_it and has_room):
            return None
        return f"write `cache: {PARTLY}`" if self.trials.compiles(ProfileChange(cache=PARTLY)) else None

    def fewer_bits(self) -> str | None:
        room = sum(size for device, size in self.problem.capacities.items() if device.is_accelerator)
        if self.prepared.model.quantization is not None or not room or 2 * room < self.problem.graph.size_bytes:
            return None
        tried = self.trials.compiles(ProfileChange(quantization=EIGHT_BIT))
        return "quantise: `quantization: {method: bitsandbytes, load_in_8bit: true}` under `model`" if tried else None

    def another_card(self) -> str | None:
        """Add another card like the last accelerator, if that is one of the catalogue."""
        last = next(reversed(self.prepared.inventory.accelerators), None)
        if last is None or last.accelerator is None or last.id.index is None:
            return None
        added, name = Device(last.id.kind, last.id.index + 1), last.accelerator.name
        tried = self.trials.compiles(ProfileChange(devices={added: {"accelerator": name}}))
        return f"add `{added}: {name}`" if tried else None

    def more_memory(self) -> str | None:
        """Return the least additional memory of the CPU, or of the first accelerator that is described by its
        memory.
        """
        inventory = self.prepared.inventory
        described = next(
            (accelerator for accelerator in inventory.accelerators if accelerator.accelerator is None), None
        )
        device = described or next((device for device in inventory.devices if device.id == CPU), None)
        name, before = (device.id, device.memory_bytes) if device is not None else (CPU, 0)

        def enlarged(gibibytes: int) -> ProfileChange:
            return ProfileChange(devices={name: {"memory": before + gibibytes * GIBIBYTE}})

        spared = _most(lambda spared: self.trials.fits(enlarged(MOST_GIBIBYTES - spared)), MOST_GIBIBYTES - 1)
        least = MOST_GIBIBYTES - spared
        if not self.trials.compiles(enlarged(least)):
            return None
        if device is None:
            return f"list `cpu: {{memory: {least}GiB}}` for what is to be offloaded"
        return f"give {name} {least} GiB more"


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to the limit that fits, given that smaller ones do; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
