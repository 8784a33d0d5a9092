"""Shows a dry run on the terminal: the peak of each device, the blocks in order, and the bytes over each link."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from devmap_config.amounts import format_bytes, largest_unit
from devmap_config.cli.tables import listing, new_table
from devmap_config.rules.folding import fold_paths
from devmap_config.simulate.trace import RAN_UNQUANTIZED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.plan import Plan
    from devmap_config.simulate.simulation import BlockRun, Simulation


def simulation_lines(model: LoadedModel, plan: Plan, simulation: Simulation, width: int) -> Iterator[Text | Table]:
    """Yield the dry run for a terminal of this width."""
    unit_bytes, unit = largest_unit(model.graph.size_bytes)
    yield Text.assemble(
        (model.class_name, "bold"), f" on simulated accelerators: {_outcome(simulation)}; sizes in {unit}"
    )
    if not simulation.devices:
        return
    yield from _devices(plan, simulation, unit_bytes, width)
    if model.counts_quantized_weights:
        yield Text(RAN_UNQUANTIZED)
    for phase, steps in groupby(simulation.steps, key=lambda step: step.phase):
        yield Text(f"\n{phase}", style="bold")
        yield _timeline(list(steps), width)
    if simulation.idle:
        patterns = ", ".join(fold_paths(simulation.idle))
        yield Text(f"\na prompt of text alone does not call {patterns}: whether these run is not known", style="yellow")
    if simulation.links:
        yield Text("\nwhat went from one device to another, in one forward", style="bold")
        yield _links(simulation)


def _outcome(simulation: Simulation) -> str:
    if simulation.outcome == "runs":
        return "it runs"
    if simulation.mismatch is not None:
        return f"it does not run, in {simulation.mismatch.phase}"
    return f"it could not be determined ({simulation.reason})"


def _devices(plan: Plan, simulation: Simulation, unit_bytes: int, width: int) -> Iterator[Text | Table]:
    capacities = {use.id: use.capacity_bytes for use in plan.devices}
    rows = []
    for device in simulation.devices:
        sizes = (device.weights_bytes, device.cache_bytes, device.peak_bytes, capacities[device.id])
        moment = f"{device.peak_phase}, {device.peak_module or 'the model'}" if device.peak_phase else "–"
        rows.append(((str(device.id), *(f"{size_bytes / unit_bytes:,.2f}" for size_bytes in sizes)), [moment]))
    figures = ("weights", "cache", "most at once", "capacity")
    yield from listing(rows, width, names=("device",), figures=figures, rest="which was in")


def _timeline(steps: list[BlockRun], width: int) -> Table:
    """Return a table in which consecutive blocks on one device are one line."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for device, run in groupby(steps, key=lambda step: step.device):
        blocks = list(run)
        live_bytes = max(dict(step.live_bytes).get(device, 0) for step in blocks)
        ran = textwrap.wrap(
            ", ".join(fold_paths(step.block for step in blocks)),
            max(width - 30, 20),
            break_long_words=False,
            break_on_hyphens=False,
        )
        table.add_row(str(device), f"+{format_bytes(live_bytes)}", "\n".join(ran))
    return table


def _links(simulation: Simulation) -> Table:
    table = new_table(Column("phase"), "from, to", figures=("copies", "bytes", "weights"))
    for link in simulation.links:
        table.add_row(
            link.phase,
            f"{link.source} → {link.target}",
            f"{link.transfers:,}",
            format_bytes(link.size_bytes),
            format_bytes(link.weights_bytes) if link.weights_bytes else "–",
        )
    return table
