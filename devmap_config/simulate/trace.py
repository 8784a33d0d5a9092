"""Writes a Chrome trace of predicted forwards: what runs on each device and when, what it waits for, and the memory.

Perfetto and `chrome://tracing` open it. Every device is a process of the trace, and so are the links, with a thread for
each. Times are whole microseconds, because viewers round fractions one by one, so that slices would overlap.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device
from devmap_config.execution.overlap import FORWARDS, Clock, total_nanoseconds
from devmap_config.execution.timing import Timing, forward_parts
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import figures_in_words, missing_figures, phases_of, time_bases
from devmap_config.wording import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.execution.segments import Copy, MachineRates, Phase
    from devmap_config.execution.timing import ForwardPart
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.plan.plan import Plan
    from devmap_config.simulate.simulation import Simulation

NANOSECONDS_PER_MICROSECOND = 1_000

ORDER = "MXCsf"
"""The order of events at the same time: a slice comes before the flows that are bound to it, and a flow's start
before its end.
"""

FORWARDS_PROCESS = 1
"""The process of the trace in which each forward is one slice; those of the devices and of the links come after it."""

OUTSIDE = "outside of blocks"

RAN_UNQUANTIZED = "weights ran unquantised: what was live beside them is not what the quantizer's kernels need"
"""The remark on the memory that a dry run of a quantised model shows."""


def trace_of(
    plan: Plan,
    graph: ModelGraph,
    inventory: Inventory,
    simulation: Simulation | None,
    *,
    tokens: int,
    name: str,
    ran_unquantized: bool = False,
) -> dict[str, Any]:
    """Return the trace of a prefill and, if the model decodes, of `tokens` tokens after it.

    Args:
        plan: a plan with at least one known time; a phase without a time is left out, with the reason.
        graph: its model, with a measurement.
        inventory: its machine.
        simulation: its dry run, which shows the memory of devices; without one, the trace has only times.
        tokens: the number of tokens that are decoded.
        name: the name of the model.
        ran_unquantized: whether the dry run had the weights in their form before quantization.

    Returns:
        The trace, for `trace_text` to write.
    """
    bases = {phase: asdict(basis) for phase, basis in time_bases(plan, graph, inventory).items()}
    missing = {phase: figures_in_words(found) for phase, found in missing_figures(plan, graph, inventory).items()}
    titles = {"prefill": ["prefill"], "decode": [f"token {number}" for number in range(1, tokens + 1)]}
    trace = _Trace(plan, simulation)
    trace.begin(visible(name), inventory)
    for phase in phases_of(graph):
        if phase not in missing:
            timing = _timing(plan, graph, inventory, phase)
            parts = _as_they_run(tuple(forward_parts(timing, plan.locations)))
            told = {"predicted_nanoseconds": getattr(plan.prediction, OWN[phase]), "basis": bases.get(phase)}
            for title in titles[phase]:
                trace.forward(title, timing.rates, parts, told)
    trace.end()
    return {
        "traceEvents": sorted(trace.events, key=lambda event: (event.get("ts", 0), ORDER.index(event["ph"]))),
        "displayTimeUnit": "ms",
        "otherData": {
            "model": visible(name),
            "strategy": plan.strategy,
            "times": "predicted from the rates of the profile's machine, not measured",
            "basis": bases,
            "not shown": {phase: f"not known: {', '.join(figures)}" for phase, figures in missing.items()},
            "memory": _memory_note(simulation, ran_unquantized=ran_unquantized),
        },
    }


def trace_text(trace: Mapping[str, Any]) -> str:
    """Return a trace as ASCII JSON, with a line for each event."""
    events = ",\n".join(map(json.dumps, trace["traceEvents"]))
    others = (f",\n{json.dumps(key)}: {json.dumps(value)}" for key, value in trace.items() if key != "traceEvents")
    text = f'{{"traceEvents": [\n{events}\n]{"".join(others)}}}'
    return text.replace("##[", r"\u0023#[")  # GitHub's runner would take it for a command


def _timing(plan: Plan, graph: ModelGraph, inventory: Inventory, phase: Phase) -> Timing:
    return Timing(graph, inventory, phase, plan.executor, plan.main_device)


def _memory_note(simulation: Simulation | None, *, ran_unquantized: bool) -> str:
    if simulation is None:
        return "not shown, for nothing was tried without torch"
    if not simulation.devices:
        return f"not shown, for the plan could not be tried: {visible(simulation.reason or simulation.outcome)}"
    told = "in the dry run, the most that a device held while a block ran"
    return f"{told}; {RAN_UNQUANTIZED}" if ran_unquantized else told


def _as_they_run(parts: Sequence[ForwardPart]) -> tuple[ForwardPart, ...]:
    """Return the parts of a forward in the order in which they run: a transfer comes before the block that reads it."""
    crossing: dict[str, list[ForwardPart]] = {}
    for part in parts:
        if part.is_crossing:
            crossing.setdefault(part.path, []).append(part)
    own = [part for part in parts if not part.is_crossing]
    run = [crossing_part for part in own for crossing_part in (*crossing.pop(part.path, ()), part)]
    return (*run, *chain.from_iterable(crossing.values()))


def _in_turn(part: ForwardPart, working: Iterable[Device]) -> list[Copy | Device]:
    """Return the steps of a part in order: the home after the copies that it waits for, other devices after their
    inputs.

    Copies of results from such a device come after it. Amounts do not determine the order any further.
    """
    turns = {device: number for number, device in enumerate(dict.fromkeys((part.home, *working)))}

    def turn(device: Copy | Device) -> tuple[int, int]:
        if isinstance(device, Device):
            return turns[device], 1
        given, giving = turns.get(device.target, 0), turns.get(device.source, 0)
        return (giving, 2) if giving and not given else (given, 0)

    return sorted([*part.segment.copies, *working], key=turn)


@dataclass
class _Trace:
    """A trace that is written up to `now`, in nanoseconds. One device works or waits at a time."""

    plan: Plan
    simulation: Simulation | None
    events: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    waiting: tuple[Device, int] | None = None
    """The device that waits now, and the time since which it does."""
    links: dict[tuple[Device, Device, bool], int] = field(default_factory=dict)
    """The thread of each link, with a separate one for copies ahead."""
    arriving: dict[Device, list[dict[str, Any]]] = field(default_factory=dict)
    """By device, the starts of flows that end when the device continues."""
    flows: int = 0

    def __post_init__(self) -> None:
        self.processes = {use.id: number for number, use in enumerate(self.plan.devices, FORWARDS_PROCESS + 1)}
        self.links_process = FORWARDS_PROCESS + len(self.processes) + 1
        simulated = () if self.simulation is None else self.simulation.devices
        self.simulated = {device.id: device for device in simulated if device.id in self.processes}
        steps = () if self.simulation is None else self.simulation.steps
        self.live = {(step.phase, step.block): dict(step.live_bytes) for step in steps}
        for device in self.simulated.values():  # if no block held as much, the peak was outside of blocks
            reached = (live.get(device.id, 0) for (phase, _), live in self.live.items() if phase == device.peak_phase)
            if device.peak_bytes - device.weights_bytes > max(reached, default=0):
                self.live.setdefault((device.peak_phase, ""), {})[device.id] = device.peak_bytes - device.weights_bytes

    def begin(self, name: str, inventory: Inventory) -> None:
        """Name the processes, and show the memory of devices before anything runs."""
        accelerators = {device.id: device.accelerator for device in inventory.devices}
        self._name(FORWARDS_PROCESS, f"{name}: predicted, not measured", "forwards")
        for device, process in self.processes.items():
            accelerator = accelerators.get(device)
            self._name(process, str(device) if accelerator is None else f"{device} {visible(accelerator.name)}", "runs")
        self._hold(dict.fromkeys(self.simulated, 0))

    def forward(self, title: str, rates: MachineRates, parts: Sequence[ForwardPart], told: Mapping[str, Any]) -> None:
        """Add one of many forwards: copies ahead are in the state that they reach in the long run."""
        began, clock, of_all = self.now, Clock(), (rates.phase, None)
        times = [rates.time(part.segment) for part in parts]
        for _ in range(FORWARDS - 1):
            clock.run(block for time in times for block in time.ahead)
        for part, time in zip(parts, times, strict=True):
            before = clock.ends[of_all]
            clock.run(time.ahead)
            ends = self.now + time.nanoseconds + clock.ends[of_all] - before
            if not part.is_crossing:
                self._hold(self.live.get((rates.phase, part.path), {}))
            self._bring_ahead(part, rates, ends, began if time.ahead else None)
            self._run(part, rates, ends)
        self._wait(self.plan.main_device, began + total_nanoseconds(times))
        self._end_wait()
        self._slice(FORWARDS_PROCESS, FORWARDS_PROCESS, title, "forward", began, self.now, told)
        self.arriving.clear()

    def end(self) -> None:
        """Show that devices hold to the end what they hold: a viewer draws no memory of which it is told once."""
        now = self.now // NANOSECONDS_PER_MICROSECOND
        last = {event["pid"]: event for event in self.events if event["ph"] == "C"}
        self.events += ({**event, "ts": now} for event in last.values() if event["ts"] < now)

    def _bring_ahead(self, part: ForwardPart, rates: MachineRates, ends: int, earliest: int | None) -> None:
        """Show copies that overlap with work: from now on, or so that they finish when the part ends.

        The latter applies if cards have links of their own, which copy while others run; the beginning of the copy is
        cut off.
        """
        times = [[rates.copy_nanoseconds(copy) for copy in together] for together in part.segment.ahead]
        at = self.now if earliest is None else ends - sum(map(max, times))
        for together, taken in zip(part.segment.ahead, times, strict=True):
            for copy, nanoseconds in zip(together, taken, strict=True):
                since = at if earliest is None else min(max(at, earliest), at + nanoseconds)
                self._copy(copy, part.path, since, at + nanoseconds, nanoseconds, together[-1].target, ahead=True)
            at += max(taken)

    def _run(self, part: ForwardPart, rates: MachineRates, ends: int) -> None:
        """Show which devices work in turn, and which wait meanwhile for copies."""
        working = {device: nanoseconds for device, nanoseconds in rates.working(part.segment).items() if nanoseconds}
        turns = [
            (turn, working[turn] if isinstance(turn, Device) else rates.copy_nanoseconds(turn))
            for turn in _in_turn(part, working)
        ]
        self._wait(part.home, ends - sum(nanoseconds for _, nanoseconds in turns))
        for turn, nanoseconds in turns:
            began = self.now
            if isinstance(turn, Device):
                self._end_wait()
                self.now += nanoseconds
                process = self.processes[turn]
                if self._slice(process, process, part.path or OUTSIDE, "runs", began, self.now):
                    self._arrive(turn, process, process, began)
            else:
                self._wait(turn.target if turn.target in working else part.home, began + nanoseconds)
                self._copy(
                    turn,
                    part.path,
                    began,
                    self.now,
                    nanoseconds,
                    turn.target if turn.target in (*working, part.home) else None,
                )

    def _copy(
        self,
        copy: Copy,
        path: str,
        began: int,
        ended: int,
        nanoseconds: int,
        reader: Device | None,
        *,
        ahead: bool = False,
    ) -> None:
        """Show a copy on its link, and start a flow there that ends when its reader continues."""
        link = (copy.source, copy.target, ahead)
        if link not in self.links:
            self.links[link] = self.links_process + len(self.links)
            way = f"{copy.source} → {copy.target}"
            self._name(self.links_process, "links", f"{way}, ahead" if ahead else way, self.links[link])
        thread, figures = self.links[link], {"bytes": copy.size_bytes, "nanoseconds": nanoseconds}
        if self._slice(self.links_process, thread, path or OUTSIDE, "copies", began, ended, figures):
            if not ahead:
                self._arrive(copy.source, self.links_process, thread, began)
            if reader is not None:
                place = {"pid": self.links_process, "tid": thread, "ts": began // NANOSECONDS_PER_MICROSECOND}
                self.arriving.setdefault(reader, []).append(place)

    def _arrive(self, device: Device, process: int, thread: int, began: int) -> None:
        """End the flows of copies to a device in the slice with which it continues, which ends now."""
        ends = self.now // NANOSECONDS_PER_MICROSECOND
        for place in self.arriving.pop(device, ()):
            if place["ts"] >= ends:
                self.arriving.setdefault(device, []).append(place)
                continue
            self.flows += 1
            flow = {"name": "copy", "cat": "copies", "id": self.flows}
            at = max(place["ts"], began // NANOSECONDS_PER_MICROSECOND)
            self.events.append({"ph": "s", **place, **flow})
            self.events.append({"ph": "f", "bp": "e", "pid": process, "tid": thread, "ts": at, **flow})

    def _wait(self, device: Device, until: int) -> None:
        """Let a device wait until a time; its consecutive waits are shown as one."""
        if until > self.now:
            if self.waiting is None or self.waiting[0] != device:
                self._end_wait()
                self.waiting = (device, self.now)
            self.now = until

    def _end_wait(self) -> None:
        if self.waiting is not None:
            device, began = self.waiting
            self._slice(self.processes[device], self.processes[device], "waits for copies", "waits", began, self.now)
            self.waiting = None

    def _hold(self, live: Mapping[Device, int]) -> None:
        """Show the memory of devices from now on, besides weights."""
        for device, size_bytes in live.items():
            if device in self.simulated:
                held = {"bytes": self.simulated[device].weights_bytes + size_bytes}
                process, now = self.processes[device], self.now // NANOSECONDS_PER_MICROSECOND
                self.events.append(
                    {"ph": "C", "pid": process, "tid": process, "ts": now, "name": "memory", "args": held}
                )

    def _slice(
        self,
        process: int,
        thread: int,
        name: str,
        category: str,
        began: int,
        ended: int,
        told: Mapping[str, Any] | None = None,
    ) -> bool:
        """Add a slice, and return whether it is long enough to be visible."""
        start, end = began // NANOSECONDS_PER_MICROSECOND, ended // NANOSECONDS_PER_MICROSECOND
        if start < end:
            place = {"ph": "X", "pid": process, "tid": thread, "ts": start, "dur": end - start}
            arguments = {"nanoseconds": ended - began, **(told or {})}
            self.events.append({**place, "name": visible(name), "cat": category, "args": arguments})
        return start < end

    def _name(self, process: int, name: str, thread_name: str, thread: int | None = None) -> None:
        """Name a process and one of its threads, and show processes in this order."""
        place = {"ph": "M", "pid": process, "tid": process if thread is None else thread}
        self.events += (
            {**place, "name": "process_name", "args": {"name": name}},
            {**place, "name": "process_sort_index", "args": {"sort_index": process}},
            {**place, "name": "thread_name", "args": {"name": thread_name}},
        )
