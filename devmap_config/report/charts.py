"""Charts of a report: memory over time, the resources that phases wait for, and predictions beside measurements."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.devices import CPU
from devmap_config.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HEIGHT = 100
"""The height of a chart in its own units, which drawings scale to pixels."""

ROOM = 1.08
"""The height of a chart relative to its largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChart:
    """The memory of a device besides its weights, block by block.

    Attributes:
        line: a path in a box that is as wide as the number of `steps`, and `HEIGHT` high.
        area: the path of the area below the line.
        top_bytes: the bytes at the top of the box.
        room: the height of the memory that the weights leave; `None` if that is above the top.
    """

    device: str
    line: str
    area: str
    steps: int
    top_bytes: int
    peak_bytes: int
    peak_place: str
    room: float | None
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSpan:
    """A phase of the dry run, by the share of the charts' width at which it begins, in percent."""

    name: str
    start: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """The time that a phase would take if one resource were twice as fast; `share` is the percentage of its present
    time.
    """

    what: str
    time: str
    share: float
    saved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWaits:
    """The resources that a phase waits for."""

    name: str
    time: str
    waits: tuple[Wait, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredBar:
    """A figure as predicted and as measured, as text, and as bars in percent of the longer of the two.

    `unaccounted` is the memory that was measured beyond the prediction.
    """

    receipt: str
    case: str
    what: str
    predicted: str
    measured: str
    ratio: str
    unaccounted: str
    predicted_share: float
    measured_share: float


def spans_of(simulation: Mapping[str, Any]) -> tuple[PhaseSpan, ...]:
    """Return the phases of a dry run along the width of its charts."""
    phases = [(phase, len(list(steps))) for phase, steps in groupby(step["phase"] for step in simulation["steps"])]
    count, spans, before = sum(number for _, number in phases), [], 0
    for phase, number in phases:
        spans.append(PhaseSpan(name=phase, start=round(100 * before / count, 3), share=round(100 * number / count, 3)))
        before += number
    return tuple(spans)


def memory_charts(simulation: Mapping[str, Any], plan: Mapping[str, Any]) -> tuple[MemoryChart, ...]:
    """Return a chart for each device that held anything besides weights, all on one scale."""
    steps = simulation["steps"]
    series = {device["id"]: list(_live(device["id"], steps)) for device in simulation["devices"]}
    busy = {device: live for device, live in series.items() if any(live)}
    if not busy:
        return ()
    top_bytes = int(ROOM * max(max(live) for live in busy.values()))
    capacities = {use["id"]: use["capacity_bytes"] - use["weights_bytes"] for use in plan["devices"]}
    charts = []
    for device, live in busy.items():
        place = max(range(len(live)), key=live.__getitem__)
        heights = [round(HEIGHT * (1 - value / top_bytes), 2) for value in live]
        points = [f"M0 {heights[0]}", "H1"]
        points += [f"V{height}H{number + 2}" for number, height in enumerate(heights[1:])]
        line = "".join(points)
        room_bytes = capacities[device]
        peak_place = f"{steps[place]['phase']}, in {visible(steps[place]['block'])}"
        charts.append(
            MemoryChart(
                device=visible(device),
                line=line,
                area=f"{line}V{HEIGHT}H0Z",
                steps=len(live),
                top_bytes=top_bytes,
                peak_bytes=live[place],
                peak_place=peak_place,
                room=round(HEIGHT * (1 - room_bytes / top_bytes), 2) if 0 <= room_bytes <= top_bytes else None,
                summary=f"{visible(device)} holds up to {format_bytes(live[place])} besides its weights: {peak_place};"
                f" {format_bytes(room_bytes)} are there for it",
            )
        )
    return tuple(charts)


def _live(device: str, steps: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Yield the memory of a device in each step; without a change, it is that of the step before."""
    now = 0
    for step in steps:
        now = step["live_bytes"].get(device, now)
        yield now


def waits_of(waits: Mapping[str, Sequence[Mapping[str, Any]]], plan: Mapping[str, Any]) -> tuple[PhaseWaits, ...]:
    """Return what each phase waits for."""
    figures = {"decode": "decode_nanoseconds_per_token", "prefill": "prefill_nanoseconds"}
    charts = []
    for phase, savings in waits.items():
        now = plan["prediction"][figures[phase]]
        charts.append(
            PhaseWaits(
                name=phase,
                time=format_duration(now),
                waits=tuple(
                    Wait(
                        what=saving["what"],
                        time=format_duration(saving["nanoseconds"]),
                        share=round(100 * saving["nanoseconds"] / now, 2),
                        saved=f"{100 * (now - saving['nanoseconds']) / now:.0f} %",
                    )
                    for saving in savings
                ),
            )
        )
    return tuple(charts)


MEMORY = {"running": "memory while it runs", "weights": "weights", "cache": "cache", "loading": "memory while loading"}
PROCESS = {
    "anonymous": "the process's own memory",
    "file": "pages of the model's files",
    "library_file": "pages of libraries' files",
    "peak": "the process at most",
}
"""The memory of the process for a plan on the CPU, which is more than the tensors."""
OF_TENSORS = ("running", "loading")
TIMES = {"token": "a token", "prefill": "a prefill", "load": "loading"}


def comparisons_of(cases: Sequence[Mapping[str, Any]]) -> tuple[MeasuredBar, ...]:
    """Return the figures of receipts that were both predicted and measured."""
    labels = {**MEMORY, **PROCESS, **TIMES}
    return tuple(
        _comparison(case, figure)
        for case in cases
        for figure in case["figures"]
        if figure["predicted"] is not None and figure["seen"] is not None and figure["name"] in labels
        if not (figure["device"] == str(CPU) and figure["name"] in OF_TENSORS and _predicts_process(case))
    )


def _predicts_process(case: Mapping[str, Any]) -> bool:
    """Return whether the peak of the process was predicted, which cannot be compared with a prediction of only
    tensors.
    """
    return any(
        figure["name"] == "peak" and None not in (figure["predicted"], figure["seen"]) for figure in case["figures"]
    )


def _comparison(case: Mapping[str, Any], figure: Mapping[str, Any]) -> MeasuredBar:
    predicted, seen, name = figure["predicted"], figure["seen"], figure["name"]
    is_memory = name in MEMORY or name in PROCESS
    what = PROCESS.get(name) or TIMES.get(name) or f"{MEMORY[name]} on {visible(figure['device'] or '')}"
    longer = max(predicted, seen) or 1

    def text(amount: float) -> str:
        return format_bytes(int(amount)) if is_memory else format_duration(round(amount * 1e9))

    return MeasuredBar(
        receipt=visible(case["receipt"]),
        case=visible(case["name"]),
        what=what,
        predicted=text(predicted),
        measured=text(seen),
        ratio=f"{seen / predicted:.2f}" if predicted else "–",
        unaccounted=text(seen - predicted) if name in ("running", "peak") and seen > predicted else "",
        predicted_share=round(100 * predicted / longer, 2),
        measured_share=round(100 * seen / longer, 2),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedDevice:
    """The memory of a device in one of two plans: its parts as kinds and percentages of the widest device."""

    parts: tuple[tuple[str, float], ...]
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChange:
    """A device in two plans; a side is `None` if the plan does not have it."""

    device: str
    before: ComparedDevice | None
    after: ComparedDevice | None
    is_none: bool


HELD = {
    "weights": "weights_bytes",
    "cache": "kv_cache_bytes",
    "activations": "activation_bytes",
    "overhead": "overhead_bytes",
    "free": "free_bytes",
}


def device_changes(diff: Mapping[str, Any]) -> tuple[DeviceChange, ...]:
    """Return the memory of devices in each of two plans, on one scale."""
    uses = [use for change in diff["devices"] for use in (change["before"], change["after"]) if use is not None]
    widest_bytes = max((use["capacity_bytes"] - use["free_bytes"] for use in uses), default=1) or 1
    return tuple(
        DeviceChange(
            device=visible(change["id"]),
            before=_side(change["before"], widest_bytes),
            after=_side(change["after"], widest_bytes),
            is_none=change["before"] == change["after"],
        )
        for change in diff["devices"]
    )


def _side(use: Mapping[str, Any] | None, widest_bytes: int) -> ComparedDevice | None:
    if use is None:
        return None
    drawn = {kind: use[key] for kind, key in HELD.items() if kind != "free" and use[key]}
    words = ", ".join(f"{kind} {format_bytes(use[key])}" for kind, key in HELD.items() if use[key] or kind == "free")
    return ComparedDevice(
        parts=tuple((kind, round(100 * size_bytes / widest_bytes, 3)) for kind, size_bytes in drawn.items()),
        words=words,
    )
