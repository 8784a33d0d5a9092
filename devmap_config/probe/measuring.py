"""`devmap probe --measure`: every rate that plans are predicted with, one step after the other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from devmap_config.devices import CPU, PINNING_KIND
from devmap_config.probe.block import Measured
from devmap_config.probe.host import existing_folder
from devmap_config.probe.rates import NotMeasuredError, Rate, disk_bandwidth, memory_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.probe.machine import SeenMachine
    from devmap_config.probe.torch_rates import Devices

PAIR_APART = 1.2
"""A pair of accelerators that is so much faster than the slowest gets a line of its own: it has a bridge, say."""


@dataclass(frozen=True)
class Step:
    """One measurement: of which rate of what it is, in which words a user is told of it, and how it is made."""

    kind: Literal["bandwidth", "flops", "link", "pair", "host"]
    subject: str
    words: str
    measure: Callable[[], Rate]


def steps(seen: SeenMachine, disk_folder: Path, devices: Devices) -> Iterator[Step]:
    """Yield what there is to measure on a machine, in order."""
    host, disk = seen.host, seen.disk
    if devices.is_there:  # first, for it tells whether the machine is too busy for the rest
        runs_on = next((card.id for card in seen.accelerators), CPU)
        yield Step("host", "dispatch", "operations that the host dispatches", partial(devices.dispatches, runs_on))
        yield Step("bandwidth", "cpu", "weights on the CPU", partial(devices.layer_bandwidth, host.available_bytes))
    else:
        yield Step("bandwidth", "cpu", "memory", partial(memory_bandwidth, host.available_bytes, host.threads))
    if disk is not None:
        folder = existing_folder(disk_folder)
        yield Step("bandwidth", "disk", "disk", partial(disk_bandwidth, folder, disk.free_bytes))
    if not devices.is_there:
        return
    yield Step("flops", "cpu", "layers on the CPU", partial(devices.flops, CPU))
    for card in seen.accelerators:
        yield Step("bandwidth", str(card.id), f"memory of {card.id}", partial(devices.memory_bandwidth, card))
        yield Step("flops", str(card.id), f"layers on {card.id}", partial(devices.flops, card.id))
    if seen.accelerators:
        can_pin = all(card.id.kind == PINNING_KIND for card in seen.accelerators)
        for name, words, is_pinned in (("host", "", can_pin), ("unpinned", "'s memory that is not pinned", False)):
            copying = partial(devices.from_host, seen.accelerators, is_pinned=is_pinned)
            yield Step("link", name, f"copies from the CPU{words}", copying)
    for first, second in itertools.combinations(seen.accelerators, 2):
        words = f"copies between {first.id} and {second.id}"
        yield Step("pair", f"{first.id}-{second.id}", words, partial(devices.between, first, second))


def measured(planned: tuple[Step, ...], begun: Callable[[Step], None]) -> tuple[Measured, dict[str, str]]:
    """Make every measurement, announcing each; return what was measured, and why others were not, by their words."""
    rates: dict[Step, Rate] = {}
    failures: dict[str, str] = {}
    for step in planned:
        begun(step)
        try:
            rates[step] = step.measure()
        except (NotMeasuredError, RuntimeError) as error:  # of torch's: too little memory, a kernel that is missing
            failures[step.words] = next(iter(str(error).splitlines()), type(error).__name__)
    return _gathered(rates), failures


def _gathered(rates: Mapping[Step, Rate]) -> Measured:
    def of_kind(kind: str) -> dict[str, int]:
        return {step.subject: rate.per_second for step, rate in rates.items() if step.kind == kind}

    bandwidths, host = of_kind("bandwidth"), of_kind("host")
    disk = {"disk": bandwidths["disk"]} if "disk" in bandwidths else {}
    return Measured(
        bandwidths=bandwidths,
        flops=of_kind("flops"),
        dispatches=host.get("dispatch"),
        links=of_kind("link") | peer_links(of_kind("pair")) | disk,
        methods={step.words: rate.method for step, rate in rates.items()},
    )


def peer_links(pairs: Mapping[str, int]) -> dict[str, int]:
    """Return the links of rates by pair: `peer`, which is the slowest, and the pairs that are much faster.

    >>> peer_links({"cuda:0-cuda:1": 50, "cuda:0-cuda:2": 10, "cuda:1-cuda:2": 11})
    {'peer': 10, 'cuda:0-cuda:1': 50}
    """
    if not pairs:
        return {}
    slowest = min(pairs.values())
    return {"peer": slowest} | {pair: rate for pair, rate in pairs.items() if rate > slowest * PAIR_APART}
