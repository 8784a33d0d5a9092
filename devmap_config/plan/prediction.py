"""What running a plan takes: seconds, hops, and the longest context that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.execution.running import longest_context, running_of
from devmap_config.execution.segments import MissingFigureError
from devmap_config.execution.timing import Timing, forward_nanoseconds, hops
from devmap_config.plan.plan import Plan, Prediction

if TYPE_CHECKING:
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory


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
            timing = Timing(graph, inventory, phase, plan.executor, plan.main_device)
            return forward_nanoseconds(timing, plan.locations) or None  # nothing takes no time at all
        except MissingFigureError:
            return None

    decode_nanoseconds = nanoseconds("decode")
    running = running_of(graph, plan.assignments, plan.executor)
    room = {use.id: use.capacity_bytes - use.weights_bytes for use in plan.devices}
    return Prediction(
        decode_nanoseconds_per_token=decode_nanoseconds,
        # Formulas that stand in for a measurement give no time, and so no bound of one; nor do models without decoding.
        bound_decode_nanoseconds_per_token=None if decode_nanoseconds is None else bound_decode_nanoseconds,
        prefill_nanoseconds=nanoseconds("prefill"),
        streamed_bytes_per_token=plan.prediction.streamed_bytes_per_token,
        hops=hops(graph, plan.locations),
        longest_context=None if running is None else longest_context(running, room),
    )
