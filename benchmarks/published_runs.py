"""Prints predicted beside measured times, for runs that were published (`published_runs.yaml`, with their sources).

Each is compiled as a profile would be, and timed by what ran it. Of constants that were fitted
(`devmap_config/hardware/constants.py`) the rows say with which; the median and the worst are of the other rows. Then
each of those constants is fitted again without each of its rows: what it would be, and how far all are off by that.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.execution.executor import Executor
from devmap_config.hardware import links
from devmap_config.hardware.constants import DISPATCH_NANOSECONDS, UNPINNED_SHARE
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import predict

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from devmap_config.plan.plan import Plan

os.environ["HF_HUB_OFFLINE"] = "1"

RUNS = Path(__file__).with_suffix(".yaml")
LIMITS = {"DISPATCH_NANOSECONDS": (100.0, 1e6), "UNPINNED_SHARE": (0.01, 1.0)}
"""Between which values a fitted constant is looked for."""


@dataclass(frozen=True)
class Comparison:
    """A phase of a run: what was predicted for it and what was measured, in milliseconds."""

    run: str
    phase: str
    predicted: float
    measured: float
    fits: str
    is_receipt: bool
    kind: str | None
    """What such runs have in common, as in `SPREADS`; `None` for dense weights with a cache that grows."""

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
        "model": {
            "source": "./model",
            "dtype": run["dtype"],
            "attention": run.get("attention", "eager"),
            **({"quantization": run["quantization"]} if "quantization" in run else {}),
        },
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


@dataclass(frozen=True)
class Case:
    """A run, compiled: by `plan`, which has what ran it (accelerate's hooks, unless it says otherwise)."""

    run: dict[str, Any]
    plan: Plan
    compiled: Compiled

    def milliseconds(self, constants: Mapping[str, float]) -> dict[str, float]:
        """Return how long its phases take by other constants than there are."""
        inventory = self.compiled.inventory
        given = self.compiled.loaded.profile.hardware.links
        share = Fraction(constants.get("UNPINNED_SHARE", UNPINNED_SHARE))
        with patch.object(links, "UNPINNED_SHARE", share):
            machine = replace(
                inventory,
                links=links.links_between(inventory.devices, given),
                dispatch_nanoseconds=round(constants.get("DISPATCH_NANOSECONDS", DISPATCH_NANOSECONDS)),
            )
        prediction = predict(self.plan, self.compiled.graph, machine)
        return {phase: (getattr(prediction, name) or 0) / 1e6 for phase, name in OWN.items()}


def case_of(run: dict[str, Any]) -> Case:
    """Return a run as it is planned."""
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
    return Case(run, plan, compilation)


def comparisons(cases: list[Case], constants: Mapping[str, float] | None = None) -> Iterator[Comparison]:
    """Yield every phase of every run that was measured."""
    for case in cases:
        run, times = case.run, case.milliseconds(constants or {})
        for phase in OWN:
            if phase in run["milliseconds"]:
                yield Comparison(
                    run=run["name"],
                    phase=phase,
                    predicted=times[phase],
                    measured=run["milliseconds"][phase],
                    fits=run.get("fits", ""),
                    is_receipt="receipts" in run,
                    kind=run.get("kind"),
                )


def refitted(constant: str, cases: list[Case]) -> float:
    """Return with which value of a constant the decoding of these runs is right on the (geometric) mean."""
    least, most = LIMITS[constant]
    is_slower = constant == "DISPATCH_NANOSECONDS"  # the more of it, the longer a token takes
    while most / least > 1.001:
        middle = math.sqrt(least * most)
        decoding = [row for row in comparisons(cases, {constant: middle}) if row.phase == "decode"]
        is_long = math.prod(row.predicted / row.measured for row in decoding) > 1
        least, most = (least, middle) if is_long == is_slower else (middle, most)
    return middle


def left_out(cases: list[Case]) -> Table:
    """Return, for each fitted constant without each of its rows, what it is then, and how far rows are off."""
    table = Table("constant", "fitted without", "value", "that row off by", "median", "worst", box=box.MARKDOWN)
    for constant, value in {"DISPATCH_NANOSECONDS": DISPATCH_NANOSECONDS, "UNPINNED_SHARE": UNPINNED_SHARE}.items():
        fitting = [case for case in cases if case.run.get("fits") == constant]
        for without in (None, *fitting):
            others = [case for case in fitting if case is not without]
            named = "– (as it is)" if without is None else without.run["name"]
            if not others:
                table.add_row(constant, named, "no other row determines it", "", "", "")
                continue
            other_value = float(value) if without is None else refitted(constant, others)
            rows = [row for row in comparisons(cases, {constant: other_value}) if row.kind is None]
            own = [f"{row.error:+.0%}" for row in rows if without and row.run == named and row.is_fitted]
            errors = [abs(row.error) for row in rows if not row.is_fitted]
            middle, worst = (f"{error:.0%}" for error in (statistics.median(errors), max(errors)))
            table.add_row(constant, named, f"{other_value:.5g}", *(own or [""]), middle, worst)
    return table


def table_of(rows: list[Comparison]) -> Table:
    """Return what was found as a table, in Markdown."""
    table = Table("run", "phase", "predicted ms", "measured ms", "off by", "fitted", box=box.MARKDOWN)
    for row in rows:
        fitted = row.fits if row.is_fitted else ""
        table.add_row(row.run, row.phase, f"{row.predicted:.1f}", f"{row.measured:g}", f"{row.error:+.0%}", fitted)
    return table


def main() -> None:
    """Compare, and print."""
    cases = [case_of(run) for run in yaml.safe_load(RUNS.read_text())]
    compared = list(comparisons(cases))
    rows = [row for row in compared if row.kind is None]
    console = Console(width=140)
    console.print(table_of(rows))
    console.print(table_of([row for row in compared if row.kind is not None]))
    for whose, chosen in (("published by others", False), ("from receipts of ours", True)):
        errors = [abs(row.error) for row in rows if row.is_receipt == chosen and not row.is_fitted]
        middle, worst = statistics.median(errors), max(errors)
        console.print(f"{whose}, not fitted: {len(errors)}, off by {middle:.0%} at the median, {worst:.0%} at worst")
    console.print(left_out(cases))


if __name__ == "__main__":
    main()
