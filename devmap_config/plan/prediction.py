"""What running a plan takes: seconds, hops, and the longest context that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.placement.running import running_of
from devmap_config.placement.timing import MissingFigureError, Timing, forward_nanoseconds, hops
from devmap_config.plan.plan import Plan, Prediction

if TYPE_CHECKING:
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.timing import Phase

LONGEST_CONTEXT = 2**24
"""Where a model's cache does not grow, no length is the longest; this one is stated."""


def predict(
    plan: Plan, graph: ModelGraph, inventory: Inventory, *, bound_decode_nanoseconds: int | None = None
) -> Prediction:
    """The prediction for a plan; a field whose inputs are missing stays `None`.

    Args:
        plan: the plan.
        graph: its model.
        inventory: its machine.
        bound_decode_nanoseconds: what no plan can be below, where that was proven.
    """

    def nanoseconds(phase: Phase) -> int | None:
        if graph.measurement is None or not graph.measurement.measured:
            return None
        if phase == "decode" and not graph.decodes:
            return None
        try:
            return forward_nanoseconds(Timing(graph, inventory, phase, plan.executor, plan.main_device), plan.locations)
        except MissingFigureError:
            return None

    decode_nanoseconds = nanoseconds("decode")
    return Prediction(
        decode_nanoseconds_per_token=decode_nanoseconds,
        # Formulas that stand in for a measurement give no time, and so no bound of one; nor do models without decoding.
        bound_decode_nanoseconds_per_token=None if decode_nanoseconds is None else bound_decode_nanoseconds,
        prefill_nanoseconds=nanoseconds("prefill"),
        streamed_bytes_per_token=plan.prediction.streamed_bytes_per_token,
        hops=hops(graph, plan.locations),
        longest_context=longest_context(plan, graph),
    )


def longest_context(plan: Plan, graph: ModelGraph) -> int | None:
    """The longest context, in tokens, with which the plan's devices hold what they must; 0 where none fits."""
    running = running_of(graph, plan.assignments, plan.executor)
    if running is None:
        return None
    room = {use.id: use.capacity_bytes - use.weights_bytes for use in plan.devices}

    def fits(context_length: int) -> bool:
        costs = running.costs(context_length)
        return all(cost.total_bytes <= room.get(device, 0) for device, cost in costs.items())

    low, high = 0, LONGEST_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
