"""Compares `fastest` with transformers' four strategies: predicted decode time, longest context, and planning time.

The models are those of `published.csv`, the machines those of `machines.yaml`. Each pair is compiled by every strategy
within the same budgets, weights, cache and activations included, so that a plan that is shown fits. Times are what
devmap-config's cost model predicts of each plan: nothing is run.

Planning: `place_fastest`, which states and solves the problem, beside transformers' `infer_auto_device_map` on the
model on the meta device, in the same process.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from transformers.integrations.accelerate import infer_auto_device_map

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph.introspection import build_meta_model
from devmap_config.placement import optimal
from devmap_config.placement.strategies import TRANSFORMERS_STRATEGIES as STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedModel

    from devmap_config.compiler import Compilation

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
CONTEXT_LENGTH = 4096
LINKS = {"host": "25GB/s", "peer": "25GB/s"}


class BenchmarkError(Exception):
    """What was asked for is not there; the text says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is predicted of one plan."""

    decode_nanoseconds: int
    longest_context: int
    bound_nanoseconds: int | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model on one machine: what each strategy gives, `None` where its plan does not fit."""

    model: str
    machine: str
    outcomes: Mapping[str, Outcome | None]
    solver_seconds: float | None
    transformers_seconds: float | None

    @property
    def fastest(self) -> Outcome | None:
        """What `fastest` gives."""
        return self.outcomes["fastest"]

    def decode_ratio(self, strategy: str) -> float | None:
        """How many times as long as with `fastest` a token takes."""
        other = self.outcomes[strategy]
        if self.fastest is None or other is None:
            return None
        return other.decode_nanoseconds / self.fastest.decode_nanoseconds

    def context_ratio(self, strategy: str) -> float | None:
        """How many times as long as with `fastest` a context may be."""
        other = self.outcomes[strategy]
        if self.fastest is None or other is None:
            return None
        return other.longest_context / self.fastest.longest_context

    @property
    def solving_ratio(self) -> float | None:
        """How many times as long as transformers' planner the solver takes."""
        if self.solver_seconds is None or self.transformers_seconds is None:
            return None
        return self.solver_seconds / self.transformers_seconds


@dataclass(frozen=True, slots=True)
class Summary:
    """Ratios over all comparisons that have one: their geometric mean, the least and the largest."""

    title: str
    mean: float
    least: float
    largest: float
    count: int
    asked: int


def published_models(names: list[str]) -> dict[str, Path]:
    """Directories of the models of `published.csv`, or of those that are named."""
    with (HERE / "published.csv").open(encoding="utf-8", newline="") as file:
        models = {row["model"]: REPOSITORY / row["config"] for row in csv.DictReader(file)}
    if unknown := set(names) - set(models):
        raise BenchmarkError(f"not in published.csv: {', '.join(sorted(unknown))}")
    return {name: directory for name, directory in models.items() if not names or name in names}


def machines() -> dict[str, Any]:
    """The devices of every machine, as profiles name them."""
    found: dict[str, Any] = yaml.safe_load((HERE / "machines.yaml").read_text(encoding="utf-8"))
    return found


def compiled(folder: Path, devices: Any, strategy: str) -> Compilation:
    """The model whose config lies in the folder, for a machine, by a strategy."""
    profile = {
        "version": 1,
        "model": {"source": "config.json", "dtype": "bfloat16"},
        "workload": {"context_length": CONTEXT_LENGTH},
        "hardware": {"devices": devices, "links": LINKS},
        "placement": {"strategy": strategy, "offload": {"folder": "./offload"}},
    }
    path = folder / f"{strategy}.yaml"
    path.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    return run_pipeline(Request(path=path))


def outcome_of(compilation: Compilation) -> Outcome | None:
    """What is predicted of a plan, where there is one."""
    if not isinstance(compilation, Compiled):
        return None
    prediction = compilation.plan.prediction
    if prediction.decode_nanoseconds_per_token is None or prediction.longest_context is None:
        raise BenchmarkError(f"{compilation.plan.strategy}: nothing is predicted of its plan")
    return Outcome(
        prediction.decode_nanoseconds_per_token,
        prediction.longest_context,
        prediction.bound_decode_nanoseconds_per_token,
    )


def solved(folder: Path, devices: Any) -> tuple[Compilation, float | None]:
    """The compilation by `fastest`, and the seconds of its solver: of the first call, where more look for a way out."""
    place_fastest = optimal.place_fastest
    seconds: list[float] = []

    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        found = place_fastest(*arguments, **named)
        seconds.append(time.perf_counter() - begin)
        return found

    with patch.object(optimal, "place_fastest", timed):
        compilation = compiled(folder, devices, "fastest")
    return compilation, seconds[0] if seconds else None


def transformers_seconds(model: PreTrainedModel, compilation: Compilation) -> float | None:
    """What transformers' planner takes for the same budgets; `None` where it crashes."""
    if not isinstance(compilation, Compiled):
        return None
    budgets = {device.in_device_map: size_bytes for device, size_bytes in compilation.inventory.capacities.items()}
    begin = time.perf_counter()
    try:
        infer_auto_device_map(model, max_memory=budgets, no_split_module_classes=sorted(model._no_split_modules or ()))  # noqa: SLF001
    except Exception:  # whatever it stumbles over
        return None
    return time.perf_counter() - begin


def meta_model(directory: Path) -> PreTrainedModel:
    """The model that transformers' planner is given; what is quantised, as it is before."""
    config = AutoConfig.from_pretrained(directory)
    return build_meta_model(getattr(transformers, config.architectures[0]), config, torch.bfloat16)


def compare(name: str, directory: Path, folder: Path) -> list[Comparison]:
    """One model on every machine."""
    shutil.copy(directory / "config.json", folder)
    model = meta_model(directory)
    first = next(iter(machines().values()))
    transformers_seconds(model, compiled(folder, first, "auto"))  # what is made once is made
    found = []
    for machine, devices in machines().items():
        compilation, solver_seconds = solved(folder, devices)
        others = {strategy: outcome_of(compiled(folder, devices, strategy)) for strategy in STRATEGIES}
        outcomes = {"fastest": outcome_of(compilation)} | others
        planner_seconds = transformers_seconds(model, compilation) if outcomes["fastest"] is not None else None
        found.append(Comparison(name, machine, outcomes, solver_seconds, planner_seconds))
    return found


def summaries_of(comparisons: list[Comparison]) -> list[Summary]:
    """Every ratio, over all comparisons."""
    fitting = [each for each in comparisons if each.fastest is not None]

    def summary(title: str, ratios: Iterable[float | None]) -> Summary:
        found = [ratio for ratio in ratios if ratio is not None] or [float("nan")]
        return Summary(title, geometric_mean(found), min(found), max(found), len(found), len(fitting))

    above = [
        each.fastest.decode_nanoseconds / each.fastest.bound_nanoseconds if each.fastest.bound_nanoseconds else None
        for each in fitting
        if each.fastest is not None
    ]
    return [
        *(summary(f"decode, {name} / fastest", (each.decode_ratio(name) for each in fitting)) for name in STRATEGIES),
        *(summary(f"context, {name} / fastest", (each.context_ratio(name) for each in fitting)) for name in STRATEGIES),
        summary("decode, fastest / its bound", above),
        summary("solver / infer_auto_device_map", (each.solving_ratio for each in fitting)),
    ]


# What is shown


def ratio(value: float | None) -> str:
    """A ratio, `none` where the strategy's plan does not fit."""
    return "none" if value is None else f"{value:,.2f}"


def shown(comparisons: list[Comparison], console: Console) -> None:
    """Print a table of decode times, one of contexts, and the summary."""
    tables: tuple[tuple[str, str, Callable[[Outcome], str], Callable[[Comparison, str], float | None]], ...] = (
        (
            "decode: predicted time of a token, and how many times as long it takes by the others",
            "fastest ms",
            lambda outcome: f"{outcome.decode_nanoseconds / 1e6:,.2f}",
            Comparison.decode_ratio,
        ),
        (
            "context: the longest that fits, and how many times as long it may be by the others",
            "fastest",
            lambda outcome: f"{outcome.longest_context:,}",
            Comparison.context_ratio,
        ),
    )
    for title, heading, figure, ratio_of in tables:
        table = _table()
        table.add_column("model", no_wrap=True, width=17)
        table.add_column("machine", no_wrap=True, width=20)
        table.add_column(heading, justify="right", width=11)
        for strategy in STRATEGIES:
            table.add_column(strategy, justify="right", width=len(strategy))
        for each in comparisons:
            if each.fastest is not None:
                ratios = (ratio(ratio_of(each, strategy)) for strategy in STRATEGIES)
                table.add_row(each.model, each.machine, figure(each.fastest), *ratios)
        console.print(title, style="bold")
        console.print(table)
        console.print()
    table = _table()
    table.add_column("ratio", no_wrap=True, width=36)
    for heading in ("geometric mean", "least", "largest", "compared"):
        table.add_column(heading, justify="right", width=14)
    for summary in summaries_of(comparisons):
        figures = (f"{value:,.3f}" for value in (summary.mean, summary.least, summary.largest))
        table.add_row(summary.title, *figures, f"{summary.count} of {summary.asked}")
    console.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")


READING = (
    "Above 1, decode: `fastest` is faster; context: the other holds a longer one, since `fastest` spends room on time."
    "\n“none”: the strategy's plan does not fit its devices with the cache and what a forward needs, or its map is"
    " invalid; what fits no strategy is left out. Ratios are over what both hold."
    "\nPredictions are of one cost model, by which `fastest` also chooses: they say what it finds, not how true it is."
)


def to_json(comparisons: list[Comparison]) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "versions": {name: version(name) for name in ("devmap-config", "transformers", "torch")},
        "comparisons": [asdict(each) for each in comparisons],
        "summary": [asdict(each) for each in summaries_of(comparisons)],
    }


def run(models: Mapping[str, Path], progress: Callable[[str], None]) -> list[Comparison]:
    """Compare everything; what is written on the way is gone afterwards."""
    comparisons = []
    for name, directory in models.items():
        progress(name)
        with TemporaryDirectory() as folder:
            comparisons += compare(name, directory, Path(folder))
    return comparisons


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare `fastest` with transformers' strategies.")
    parser.add_argument("models", nargs="*", help="names in published.csv; all of them by default")
    parser.add_argument("--json", action="store_true", help="print plain data")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # the planner misses devices that this machine does not have
    try:
        models = published_models(arguments.models)
        comparisons = run(models, lambda name: print(f"placing {name}", file=sys.stderr))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(to_json(comparisons), indent=2))
        return 0
    console = Console(width=100, highlight=False)
    versions = ", ".join(f"{name} {version(name)}" for name in ("devmap-config", "transformers"))
    console.print(f"{versions}; batch of 1, context of {CONTEXT_LENGTH:,}\n")
    shown(comparisons, console)
    slowest = max((each.solver_seconds for each in comparisons if each.solver_seconds), default=0)
    console.print(f"\nThe solver took {slowest:.2f} seconds at most.\n{READING}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
