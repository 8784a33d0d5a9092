"""`devmap probe --measure`: measures every rate that predictions use, step by step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, PINNING_KIND
from devmap_config.probe.block import is_described
from devmap_config.probe.host import existing_folder
from devmap_config.probe.rates import NotMeasuredError, Rate, disk_bandwidth, memory_bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from devmap_config.probe.block import Route
    from devmap_config.probe.machine import SeenAccelerator, SeenMachine
    from devmap_config.probe.torch_rates import Devices

PAIR_APART = 1.2
"""The least factor by which a pair of accelerators must be faster than the slowest to get a line of its own, as with a
bridge. The same holds for copies to all cards at once, compared with one.
"""

HOST: Route = ("links", "host")
TOGETHER: Route = ("links", "together")

ON_CPU: Route = ("devices", "cpu")
OTHER_DTYPES = ("float16", "float32")
"""The dtypes that are measured besides bfloat16: some CPUs multiply float16 more slowly, and all multiply float32
more slowly.
"""


@dataclass(frozen=True)
class MeasurementStep:
    """One measurement: the route of its rates in the block, its name for users, and the function that makes it."""

    routes: tuple[Route, ...]
    words: str
    measure: Callable[[], tuple[Rate | None, ...]]


def steps(seen: SeenMachine, disk_folder: Path, devices: Devices) -> Iterator[MeasurementStep]:
    """Yield the measurements of a machine, in order."""
    host, disk = seen.host, seen.disk
    cards = [card for card in seen.accelerators if is_described(card)]
    if devices.is_there:
        yield from _steps_on_cpu(seen, devices)
    else:
        reading = partial(memory_bandwidth, host.available_bytes, host.threads)
        yield _step((*ON_CPU, "bandwidth"), "memory", reading)
    if disk is not None:
        reading = partial(disk_bandwidth, existing_folder(disk_folder), disk.free_bytes)
        yield _step(("devices", "disk", "bandwidth"), "disk", reading)
    if not devices.is_there:
        return
    for card in cards:
        yield from _steps_on_card(card, devices)
    if cards:
        can_pin = all(card.id.kind == PINNING_KIND for card in cards)
        for name, words, is_pinned in (("host", "", can_pin), ("unpinned", "'s memory that is not pinned", False)):
            copying = partial(devices.from_host, cards, is_pinned=is_pinned)
            yield _step(("links", name), f"copies from the CPU{words}", copying)
        if can_pin and len(cards) > 1:
            copying = partial(devices.from_host_at_once, cards, seen.host.available_bytes)
            yield _step(TOGETHER, "copies from the CPU to all cards at once", copying)
    for first, second in itertools.combinations(cards, 2):
        words = f"copies between {first.id} and {second.id}"
        yield _step(("links", f"{first.id}-{second.id}"), words, partial(devices.between, first, second))


def _steps_on_cpu(seen: SeenMachine, devices: Devices) -> Iterator[MeasurementStep]:
    """Yield the measurements of the CPU; dispatching comes first, because it shows whether the machine is too busy for
    the others.
    """
    available_bytes = seen.host.available_bytes
    runs_on = next((card.id for card in seen.accelerators), CPU)
    yield _step(("host", "dispatch"), "operations that the host dispatches", partial(devices.dispatches, runs_on))
    for dtype in ("bfloat16", *OTHER_DTYPES):
        route = (*ON_CPU, "dtypes", dtype) if dtype in OTHER_DTYPES else ON_CPU
        names = (("bandwidth",), ("flops",), ("products", "decode"), ("products", "prefill"))
        layers = partial(devices.layers, dtype, available_bytes)
        yield MeasurementStep(tuple((*route, *name) for name in names), f"layers in {dtype} on the CPU", layers)
    for phase, words in (("decode", "one query"), ("prefill", "a prompt")):
        attending = partial(devices.attention, available_bytes, is_prefill=phase == "prefill")
        yield _step((*ON_CPU, "attention", phase), f"attention of {words} on the CPU", attending)
    yield _step((*ON_CPU, "experts"), "experts on the CPU", partial(devices.experts, available_bytes))


def _steps_on_card(card: SeenAccelerator, devices: Devices) -> Iterator[MeasurementStep]:
    route = ("devices", str(card.id))
    yield _step((*route, "bandwidth"), f"memory of {card.id}", partial(devices.memory_bandwidth, card))
    yield _step((*route, "flops"), f"layers on {card.id}", partial(devices.flops, card.id))
    in_float32 = partial(devices.flops, card.id, "float32")
    yield _step((*route, "dtypes", "float32", "flops"), f"layers in float32 on {card.id}", in_float32)


def _step(route: Route, words: str, measure: Callable[[], Rate]) -> MeasurementStep:
    return MeasurementStep((route,), words, lambda: (measure(),))


def measured(
    planned: tuple[MeasurementStep, ...], begun: Callable[[MeasurementStep], None]
) -> tuple[dict[Route, Rate], dict[str, str]]:
    """Announce and make every measurement; return the rates, and why others are missing, by their names."""
    rates: dict[Route, Rate] = {}
    failures: dict[str, str] = {}
    for step in planned:
        begun(step)
        try:
            measured_rates = zip(step.routes, step.measure(), strict=True)
            rates.update({route: rate for route, rate in measured_rates if rate is not None})
        except (NotMeasuredError, RuntimeError) as error:  # torch raises for too little memory, or a missing kernel
            failures[step.words] = next(iter(str(error).splitlines()), type(error).__name__)
    if TOGETHER in rates and not _is_more_than_one_link(rates[TOGETHER], rates.get(HOST)):
        del rates[TOGETHER]
    pairs = {route: rate for route, rate in rates.items() if route[0] == "links" and "-" in route[1]}
    return {route: rate for route, rate in rates.items() if route not in pairs} | peer_links(pairs), failures


def _is_more_than_one_link(together: Rate, host: Rate | None) -> bool:
    """Return whether copying to several cards at once is faster than to one, which it is not if they share a link."""
    return host is not None and together.per_second > host.per_second * PAIR_APART


def peer_links(pairs: Mapping[Route, Rate]) -> dict[Route, Rate]:
    """Return the links for the rates of pairs: `peer`, which is the slowest, and the pairs that are much faster."""
    if not pairs:
        return {}
    slowest = min(pairs.values(), key=lambda rate: rate.per_second)
    apart = {route: rate for route, rate in pairs.items() if rate.per_second > slowest.per_second * PAIR_APART}
    return {("links", "peer"): slowest} | apart
