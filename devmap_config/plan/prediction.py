"""The predicted cost of running a plan: times, hops, and the longest context that fits."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from devmap_config.execution.running import longest_context, running_of
from devmap_config.execution.segments import MissingFigureError
from devmap_config.execution.timing import Timing, forward_nanoseconds, forward_segments, hops
from devmap_config.hardware.constants import SPREADS
from devmap_config.hardware.inventory import RATES
from devmap_config.plan.plan import OWN, Plan, Prediction
from devmap_config.plan.values import folded_devices
from devmap_config.profile.quantities import BASES, weakest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.execution.segments import Phase
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.pipeline.stages import Pipeline
    from devmap_config.profile.quantities import Basis, Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBasis:
    """The basis of the predicted time of a phase, and the range in which runs with that basis were observed, if any
    were.

    `kind`: what such runs have in common besides their rates, as in `SPREADS`; `None` for dense weights with a cache
    that grows.
    """

    rates: Basis
    kind: str | None = None
    least_nanoseconds: int | None = None
    most_nanoseconds: int | None = None


def time_bases(plan: Plan, graph: ModelGraph, inventory: Inventory) -> dict[Phase, TimeBasis]:
    """Return the basis of the time of each phase that a plan predicts."""
    bases: dict[Phase, TimeBasis] = {}
    for phase, name in OWN.items():
        if (nanoseconds := getattr(plan.prediction, name)) is None:
            continue
        if plan.pipeline is not None:
            bases[phase] = TimeBasis(rates=_basis_of_stages(plan.pipeline, inventory))  # no runs of vLLM were observed
        else:
            basis = rates_basis(graph, inventory, phase, plan)
            # The ranges of calibrated rates come with the profile, which does not say of which runs.
            kind = None if basis == "calibrated" else kind_of_runs(plan, graph)
            bases[phase] = _basis(basis, kind, nanoseconds, _spread(basis, kind, phase, plan, inventory))
    return bases


def kind_of_runs(plan: Plan, graph: ModelGraph) -> str | None:
    """Return the kind of runs that a plan's are compared with: by the quantization of its weights and by its cache."""
    cache = "dynamic" if graph.measurement is None else graph.measurement.workload.cache
    several = " on several devices" if len({assignment.location.runs_on for assignment in plan.assignments}) > 1 else ""
    kinds = (
        None if graph.loading is None else graph.loading.running,
        None if cache == "dynamic" else f"`cache: {cache}`{several}",
    )
    return " and ".join(kind for kind in kinds if kind is not None) or None


def rates_basis(graph: ModelGraph, inventory: Inventory, phase: Phase, *plans: Plan) -> Basis:
    """Return the weakest basis of all rates that the time of a phase of these plans depends on; it must be known."""
    timings = [Timing(graph, inventory, phase, plan.executor, plan.main_device) for plan in plans]
    bases = (
        timing.rates.basis(forward_segments(timing, plan.locations))
        for timing, plan in zip(timings, plans, strict=True)
    )
    return min(bases, key=BASES.index)


def missing_figures(plan: Plan, graph: ModelGraph, inventory: Inventory) -> dict[Phase, tuple[MissingFigureError, ...]]:
    """Return the figures of the machine that are missing for each phase whose time cannot be predicted.

    Nothing is returned for a model without a measurement and for a plan for vLLM, neither of which lacks a figure.
    """
    missing_by_phase: dict[Phase, tuple[MissingFigureError, ...]] = {}
    if plan.pipeline is not None or graph.measurement is None or not graph.measurement.measured:
        return missing_by_phase
    for phase in phases_of(graph):
        timing = Timing(graph, inventory, phase, plan.executor, plan.main_device)
        segments = forward_segments(timing, plan.locations)
        errors = (error for segment in segments for error in timing.rates.missing(segment))
        if figures := {(error.figure, error.device): error for error in errors}:
            missing_by_phase[phase] = tuple(figures.values())
    return missing_by_phase


def figures_in_words(missing: Iterable[MissingFigureError]) -> tuple[str, ...]:
    """Return missing figures in words: "the `bandwidth` and `flops` of cuda:[0-1]", "`host`"."""
    devices: dict[str, list[str]] = {}
    for error in missing:
        named = devices.setdefault(error.figure, [])
        if error.device is not None:
            named.append(str(error.device))
    figures: dict[str, list[str]] = {}
    for figure, named in devices.items():
        figures.setdefault(", ".join(folded_devices(named)), []).append(f"`{figure}`")
    return tuple(f"the {' and '.join(names)} of {of}" if of else " and ".join(names) for of, names in figures.items())


def phases_of(graph: ModelGraph) -> tuple[Phase, ...]:
    """Return the phases of a model in order; one that does not decode only has a prefill."""
    return ("prefill", "decode") if graph.decodes else ("prefill",)


def _basis_of_stages(pipeline: Pipeline, inventory: Inventory) -> Basis:
    """Return the weakest basis of the rates of stages: those of their devices, and of the links within and between
    them.
    """
    devices = {device.id: device for device in inventory.devices}
    groups = [stage.devices for stage in pipeline.stages]
    joined = [
        *(group[:2] for group in groups if len(group) > 1),
        *((before[0], after[0]) for before, after in pairwise(groups)),
    ]
    links = [inventory.links[source, target].bytes_per_second for source, target in joined]
    rates = (devices[id].reached(name) for group in groups for id in group for name in RATES[:2])
    return weakest((*rates, *links))


def _spread(basis: Basis, kind: str | None, phase: Phase, plan: Plan, inventory: Inventory) -> Spread | None:
    if basis == "calibrated":
        return inventory.spreads.get(phase)
    devices = {assignment.location.runs_on.kind for assignment in plan.assignments}
    return SPREADS.get((basis, devices.pop(), kind), {}).get(phase) if len(devices) == 1 else None


def _basis(basis: Basis, kind: str | None, nanoseconds: int, spread: Spread | None) -> TimeBasis:
    if spread is None:
        return TimeBasis(rates=basis, kind=kind)
    least, most = (nanoseconds * percent // 100 for percent in (spread.least_percent, spread.most_percent))
    return TimeBasis(rates=basis, kind=kind, least_nanoseconds=least, most_nanoseconds=most)


def amounts(plan: Plan, graph: ModelGraph, inventory: Inventory, phase: Phase) -> list[dict[str, object]]:
    """Return the amounts of a forward of a plan as plain data; equal consecutive segments are counted."""
    timing = Timing(graph, inventory, phase, plan.executor, plan.main_device)
    values = (segment.to_json() for segment in forward_segments(timing, plan.locations))
    return [{"count": len(list(alike)), **value} for value, alike in groupby(values)]


def predict(
    plan: Plan, graph: ModelGraph, inventory: Inventory, *, bound_decode_nanoseconds: int | None = None
) -> Prediction:
    """Return the prediction for a plan; a field whose inputs are missing stays `None`.

    Args:
        plan: the plan.
        graph: its model.
        inventory: its machine.
        bound_decode_nanoseconds: a lower bound of the time of a token, if one was proved.
    """

    def nanoseconds(phase: Phase) -> int | None:
        if graph.measurement is None or not graph.measurement.measured:
            return None
        if phase == "decode" and not graph.decodes:
            return None
        try:
            timing = Timing(graph, inventory, phase, plan.executor, plan.main_device)
            return forward_nanoseconds(timing, plan.locations) or None  # a forward without work has no time
        except MissingFigureError:
            return None

    decode_nanoseconds = nanoseconds("decode")
    running = running_of(graph, plan.assignments, plan.executor)
    room = {use.id: use.capacity_bytes - use.weights_bytes for use in plan.devices}
    return Prediction(
        decode_nanoseconds_per_token=decode_nanoseconds,
        # Formulas in place of a measurement give no time, and so no bound; nor do models without decoding.
        bound_decode_nanoseconds_per_token=None if decode_nanoseconds is None else bound_decode_nanoseconds,
        prefill_nanoseconds=nanoseconds("prefill"),
        streamed_bytes_per_token=plan.prediction.streamed_bytes_per_token,
        hops=hops(graph, plan.locations),
        # The growth of a draft model's cache is not counted.
        longest_context=None if running is None or plan.draft is not None else longest_context(running, room),
    )
