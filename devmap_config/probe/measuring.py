"""`devmap probe --measure`: every rate that plans are predicted with, one step after the other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from devmap_config.probe.block import Measured
from devmap_config.probe.rates import NotMeasuredError, Rate, disk_bandwidth, memory_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from devmap_config.probe.machine import SeenMachine
    from devmap_config.probe.torch_rates import Devices


@dataclass(frozen=True)
class Step:
    """One measurement: what it is of, in which words a user is told of it, and how it is made."""

    kind: str
    subject: str
    words: str
    measure: Callable[[], Rate]


def steps(seen: SeenMachine, disk_folder: Path, devices: Devices) -> tuple[Step, ...]:
    """What there is to measure on a machine, in order."""
    host, disk = seen.host, seen.disk
    found = [
        Step("bandwidth", "cpu", "memory", partial(memory_bandwidth, host.available_bytes, host.threads)),
    ]
    if disk is not None:
        found.append(
            Step("bandwidth", "disk", "disk", partial(disk_bandwidth, _existing(disk_folder), disk.free_bytes))
        )
    if devices.is_there:
        found.append(Step("flops", "cpu", "layers on the CPU", partial(devices.flops, "cpu")))
        found += _of_accelerators(seen, devices)
    return tuple(found)


def _existing(folder: Path) -> Path:
    resolved = folder.resolve()
    return next(each for each in (resolved, *resolved.parents) if each.is_dir())


def _of_accelerators(seen: SeenMachine, devices: Devices) -> Iterator[Step]:
    for each in seen.accelerators:
        yield Step("bandwidth", each.id, f"memory of {each.id}", partial(devices.memory_bandwidth, each))
        yield Step("flops", each.id, f"layers on {each.id}", partial(devices.flops, each.id))
    if seen.accelerators:
        yield Step("link", "host", "copies from the CPU", partial(devices.from_host, seen.accelerators))
    for first, second in itertools.combinations(seen.accelerators, 2):
        yield Step(
            "link",
            f"{first.id}-{second.id}",
            f"copies between {first.id} and {second.id}",
            partial(devices.between, first, second),
        )


def measured(planned: tuple[Step, ...], begun: Callable[[Step], None]) -> tuple[Measured, dict[str, str]]:
    """Make every measurement, announcing each; gives what was measured, and why others were not, by their words."""
    rates: dict[Step, Rate] = {}
    failures: dict[str, str] = {}
    for step in planned:
        begun(step)
        try:
            rates[step] = step.measure()
        except (NotMeasuredError, RuntimeError) as error:  # of torch's: too little memory, a kernel that is missing
            failures[step.words] = next(iter(str(error).splitlines()), type(error).__name__)
    return _gathered(rates), failures


def _gathered(rates: dict[Step, Rate]) -> Measured:
    from devmap_config.probe.torch_rates import peer_links

    of_kind = {
        kind: {step.subject: rate.per_second for step, rate in rates.items() if step.kind == kind}
        for kind in ("bandwidth", "flops", "link")
    }
    pairs = {
        (first, second): rate
        for name, rate in of_kind["link"].items()
        for first, dash, second in [name.partition("-")]
        if dash
    }
    links = {name: rate for name, rate in of_kind["link"].items() if "-" not in name}
    if pairs:
        links |= peer_links(pairs)
    if "disk" in of_kind["bandwidth"]:
        links["disk"] = of_kind["bandwidth"]["disk"]
    return Measured(
        bandwidths=of_kind["bandwidth"],
        flops=of_kind["flops"],
        links=links,
        methods={step.words: rate.method for step, rate in rates.items()},
    )
