"""Evaluates the events of a dry run: the bytes on each device and over each link, and the device of every call."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.graph.model import ModulePath, ancestors
from devmap_config.graph.recording import Allocation
from devmap_config.simulate.devices import Call, DeviceCopy, Phase
from devmap_config.simulate.simulation import BlockRun, LinkUse, SimulatedDevice

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph
    from devmap_config.graph.recording import RecordedEvent
    from devmap_config.plan.plan import Plan

FILLING = "filling"
"""The phase that fills the cache up to the context, if the prompt is a part of it; its own costs are ignored."""

TOWERS = "towers"
"""The phase that runs modules which a prompt of only text does not call (towers for images); its costs are ignored."""

UNOBSERVED = (FILLING, TOWERS)


class Replay:
    """Evaluates the events of a dry run; for links and calls, those of the last run of each phase."""

    def __init__(
        self, events: Iterable[RecordedEvent], at: Mapping[int, Device], graph: ModelGraph, plan: Plan
    ) -> None:
        """Args: the events in order, the device of each storage, the model, and its plan."""
        self._at, self._graph, self._plan = at, graph, plan
        self._blocks = dict.fromkeys(graph.blocks)
        self._phase = ""
        self._block: str | None = None
        # While a module runs with the piece that was copied in, another piece of up to the same size may be copied
        # ahead.
        ahead = plan.devices if plan.executor.works_ahead else ()
        self._live = {use.id: use.overhead_bytes // plan.executor.pieces_at_once for use in ahead}
        self._peaks: dict[Device, tuple[int, str, str]] = {}
        self._held: dict[tuple[str, str], dict[Device, int]] = {}
        self._calls: dict[str, list[tuple[str, Device]]] = {}
        self._links: dict[str, dict[tuple[Device, Device], list[int]]] = {}
        for event in events:
            self._take(event)

    def _take(self, event: RecordedEvent) -> None:
        match event:
            case Phase(name=name):
                self._phase, self._block = name, None
                if name not in UNOBSERVED:
                    self._calls[name], self._links[name] = [], {}
            case Allocation():
                self._allocate(event)
            case Call() if self._phase not in UNOBSERVED:
                path = event.running[-1]
                # The result of a module that computes on the CPU is copied back before the call ends.
                prefilled = self._plan.prefilled if self._phase == "prefill" else {}
                apart = {unit: device for unit, device in self._plan.compute.items() if unit not in prefilled}
                around = (apart[unit] for unit in (path, *ancestors(path)) if unit in apart)
                self._calls[self._phase].append((path, next(around, event.device)))
            case DeviceCopy() if self._phase not in UNOBSERVED:
                use = self._links[self._phase].setdefault((event.source, event.target), [0, 0, 0])
                use[0] += 1
                use[1] += event.size_bytes
                use[2] += event.size_bytes if event.is_weight else 0

    def _allocate(self, event: Allocation) -> None:
        device = self._at.get(event.storage, CPU)
        live = self._live[device] = self._live.get(device, 0) + event.size_bytes
        if self._phase in UNOBSERVED:
            return
        if live > self._peaks.get(device, (0, "", ""))[0]:
            self._peaks[device] = (live, self._phase, event.running[-1] if event.running else "")
        block = next((path for path in event.running if path in self._blocks), None)
        if block is not None:
            held = self._held.setdefault((self._phase, block), {})
            # When a block begins, what others hold counts as well, even if it does not change while this one runs.
            begins = block != self._block
            for size_bytes, now in self._live.items():
                if size_bytes == device or (begins and size_bytes in self._peaks):
                    held[size_bytes] = max(held.get(size_bytes, 0), now)
        self._block = block

    def devices(self, cache_bytes: Mapping[Device, int]) -> tuple[SimulatedDevice, ...]:
        """Return the memory of each device of the plan, given the bytes of the cache after the prefill."""
        none = (0, "", "")
        return tuple(
            SimulatedDevice(
                id=use.id,
                weights_bytes=use.weights_bytes,
                cache_bytes=cache_bytes.get(use.id, 0),
                peak_bytes=use.weights_bytes + self._peaks.get(use.id, none)[0],
                peak_phase=self._peaks.get(use.id, none)[1],
                peak_module=self._peaks.get(use.id, none)[2],
            )
            for use in self._plan.devices
        )

    @property
    def steps(self) -> tuple[BlockRun, ...]:
        """The blocks that ran to their end, with the most bytes that were held meanwhile."""
        ran_on = {(phase, path): device for phase, path, device in self.calls}
        return tuple(
            BlockRun(phase=phase, block=block, device=ran_on[phase, block], live_bytes=tuple(sorted(held.items())))
            for (phase, block), held in self._held.items()
            if (phase, block) in ran_on
        )

    @property
    def links(self) -> tuple[LinkUse, ...]:
        """The bytes over each link."""
        return tuple(
            LinkUse(phase=phase, source=source, target=target, transfers=count, size_bytes=total, weights_bytes=weights)
            for phase, links in self._links.items()
            for (source, target), (count, total, weights) in links.items()
        )

    @cached_property
    def calls(self) -> tuple[tuple[str, str, Device], ...]:
        """The phase of each call of a module, and the device on which it ran."""
        return tuple((phase, path, device) for phase, calls in self._calls.items() for path, device in calls)

    @property
    def idle(self) -> tuple[str, ...]:
        """The blocks with weights that nothing called."""
        called = {path for _, path, _ in self.calls}
        return tuple(
            path
            for path in self._with_weights
            if not any(module.path in called for module in self._graph.modules[path].walk())
        )

    def hops(self, phase: str) -> int:
        """Return the number of transfers from one device to another between blocks in a phase."""
        ran_on = dict(self._calls.get(phase, ()))
        along = [device for path, device in ran_on.items() if path in self._with_weights]
        return sum(before != after for before, after in itertools.pairwise(along))

    @cached_property
    def _with_weights(self) -> dict[ModulePath, None]:
        """The blocks that hold a parameter."""
        blocks = self._graph.blocks
        return dict.fromkeys(
            path for path in blocks if any(tensor.kind == "parameter" for tensor in self._graph.modules[path].tensors())
        )
