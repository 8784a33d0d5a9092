"""Prints predicted beside measured times, for runs that were published (`published_runs.yaml`, with their sources).

Each is compiled as a profile would be, and timed by what ran it. Of constants that were fitted
(`devmap_config/hardware/constants.py`) the rows say with which; the median and the worst are of the other rows.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.execution.executor import Executor
from devmap_config.plan.prediction import predict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.plan.plan import Prediction

os.environ["HF_HUB_OFFLINE"] = "1"

RUNS = Path(__file__).with_suffix(".yaml")
PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Comparison:
    """A phase of a run: what was predicted for it and what was measured, in milliseconds."""

    run: str
    phase: str
    predicted: float
    measured: float
    fits: str
    is_receipt: bool

    @property
    def is_fitted(self) -> bool:
        """Whether a constant was fitted with it: with its decoding, that is."""
        return bool(self.fits) and self.phase == "decode"

    @property
    def error(self) -> float:
        """By which part of what was measured the prediction is off."""
        return self.predicted / self.measured - 1


def profile_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return what a profile says of a run, beside the folder `model`."""
    return {
        "version": 1,
        "model": {"source": "./model", "dtype": run["dtype"], "attention": run.get("attention", "eager")},
        "workload": run["workload"],
        "hardware": {"devices": run["devices"], "links": run.get("links", {})},
        "placement": {
            "strategy": run.get("strategy", "sequential"),
            "max_memory": run.get("max_memory", {}),
            "offload": {"folder": "./offload"},
        },
    }


def config_of(config: dict[str, Any] | str) -> str:
    """Return a model's config, which a run states or names the folder of."""
    return (RUNS.parent / config / "config.json").read_text() if isinstance(config, str) else json.dumps(config)


def predicted(run: dict[str, Any]) -> Prediction:
    """Return what a run takes by what ran it: accelerate's hooks, unless it says otherwise."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model" / "config.json").write_text(config_of(run["config"]))
        path = Path(folder) / "profile.yaml"
        path.write_text(yaml.safe_dump(profile_of(run)))
        compilation = run_pipeline(Request(path=path))
    if not isinstance(compilation, Compiled):
        raise SystemExit("\n".join(each.message for each in compilation.diagnostics))
    plan = compilation.plan
    if run.get("executor", "accelerate") != plan.executor.name:
        plan = replace(plan, executor=Executor(offload_buffers=plan.offload_buffers))
    return predict(plan, compilation.model.graph, compilation.inventory)


def comparisons(runs: list[dict[str, Any]]) -> Iterator[Comparison]:
    """Yield every phase of every run that was measured."""
    for run in runs:
        prediction = predicted(run)
        times = {"decode": prediction.decode_nanoseconds_per_token, "prefill": prediction.prefill_nanoseconds}
        for phase in PHASES:
            if phase in run["milliseconds"]:
                milliseconds = (times[phase] or 0) / 1e6
                yield Comparison(
                    run=run["name"],
                    phase=phase,
                    predicted=milliseconds,
                    measured=run["milliseconds"][phase],
                    fits=run.get("fits", ""),
                    is_receipt=run.get("is_receipt", False),
                )


def table_of(rows: list[Comparison]) -> Table:
    """Return what was found as a table, in Markdown."""
    table = Table("run", "phase", "predicted ms", "measured ms", "off by", "fitted", box=box.MARKDOWN)
    for row in rows:
        fitted = row.fits if row.is_fitted else ""
        table.add_row(row.run, row.phase, f"{row.predicted:.1f}", f"{row.measured:g}", f"{row.error:+.0%}", fitted)
    return table


def main() -> None:
    """Compare, and print."""
    rows = list(comparisons(yaml.safe_load(RUNS.read_text())))
    console = Console(width=140)
    console.print(table_of(rows))
    for whose, chosen in (("published by others", False), ("from receipts of ours", True)):
        errors = [abs(row.error) for row in rows if row.is_receipt == chosen and not row.is_fitted]
        middle, worst = statistics.median(errors), max(errors)
        console.print(f"{whose}, not fitted: {len(errors)}, off by {middle:.0%} at the median, {worst:.0%} at worst")


if __name__ == "__main__":
    main()
