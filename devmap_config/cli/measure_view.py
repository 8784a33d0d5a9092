"""Shows the measured costs of a model, block by block, with blocks of equal costs in one line."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from devmap_config.amounts import format_bytes, format_operations
from devmap_config.cli.tables import listing
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import ModelGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """The costs of one block with everything in it; operations are floating-point operations."""

    weights_bytes: int
    cache_bytes: int
    peak_bytes: int
    prefill_operations: int
    decode_operations: int


def measured_to_json(graph: ModelGraph, measurement: Measurement) -> dict[str, Any]:
    """Return the cost of every block as plain data, in order of definition."""
    blocks = [{"path": path, **asdict(cost)} for path, cost in _block_costs(graph, measurement).items()]
    return {"workload": asdict(measurement.workload), "measured": measurement.measured, "blocks": blocks}


def measured_lines(graph: ModelGraph, measurement: Measurement, width: int) -> Iterator[Text | Table]:
    """Yield the cost of every block as a table, and their sum."""
    workload = measurement.workload
    yield Text.assemble(
        (graph.class_name, "bold"),
        f": {format_bytes(graph.size_bytes)}, batch {workload.batch_size}, {workload.prompt_length:,} tokens prefilled,"
        f" {workload.context_length:,} in the cache",
    )
    alike: dict[tuple[str, BlockCost], list[str]] = {}
    costs = _block_costs(graph, measurement)
    for path, cost in costs.items():
        alike.setdefault((graph.modules[path].class_name, cost), []).append(path)  # type: ignore[index]
    rows = []
    for (_, cost), paths in alike.items():
        sizes = (cost.weights_bytes, cost.cache_bytes, cost.peak_bytes)
        operations = (cost.prefill_operations, cost.decode_operations)
        figures = (
            *(format_bytes(size_bytes) if size_bytes else "–" for size_bytes in sizes),
            *(format_operations(count) if count else "–" for count in operations),
        )
        rows.append((figures, fold_paths(paths)))
    yield from listing(rows, width, figures=("weights", "cache", "peak", "prefill", "decode"), rest="block")
    prefill, decode = (
        sum(getattr(cost, f"{phase}_operations") for cost in measurement.modules) for phase in ("prefill", "decode")
    )
    yield Text(
        f"each block's own figures; together {format_bytes(measurement.cache_bytes)} of cache,"
        f" {format_operations(prefill)} a prefill, {format_operations(decode)} a token"
    )
    if not measurement.measured:
        is_models = measurement.cause == "model"
        reason = (
            f"the model's code cannot be run without data ({measurement.reason})" if is_models else measurement.reason
        )
        yield Text(f"by formulas: {reason}", style="yellow")


def _block_costs(graph: ModelGraph, measurement: Measurement) -> dict[str, BlockCost]:
    costs: dict[str, BlockCost] = {}
    for path in graph.blocks:
        module = graph.modules[path]
        within = [cost for inner in module.walk() if (cost := measurement.by_path.get(inner.path)) is not None]
        costs[path] = BlockCost(
            weights_bytes=graph.weights_bytes(tuple(tensor.name for tensor in module.tensors())),
            cache_bytes=sum(cost.cache_bytes for cost in within),
            peak_bytes=max((cost.peak_bytes for cost in within), default=0),
            prefill_operations=sum(cost.prefill_operations for cost in within),
            decode_operations=sum(cost.decode_operations for cost in within),
        )
    return costs
