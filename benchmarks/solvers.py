"""Compares HiGHS, which `fastest` uses, with OR-Tools' CP-SAT on the same programs: the table of
`docs/placement.md`.

Every published model is placed on the machines of `machines.yaml`, by `fastest` with all wishes beside time, and on
problems that are hard in some way. Seconds are those of the processor, of one thread. A gap is that of the fastest
placement above its proven bound. Each solver is the other's oracle: what one proves, the other must not be below.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import distribution, requires
from pathlib import Path
from statistics import geometric_mean, median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import cp_sat
import yaml
from packaging.requirements import Requirement
from placement import LINKS, machines, published_models
from rich import box
from rich.console import Console
from rich.table import Table

from devmap_config.compiler import Request, run_pipeline
from devmap_config.placement import optimal
from devmap_config.placement.milp import Milp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from devmap_config.placement.optimal import Optimal

SOLVERS: dict[str, Callable[..., Any]] = {"HiGHS": Milp.minimize, "CP-SAT": cp_sat.minimize}

PACKAGES = {"HiGHS": "highspy", "CP-SAT": "ortools"}
MODULES = {"HiGHS": "highspy", "CP-SAT": "ortools.sat.python.cp_model"}

SOME_MACHINES = ("one 4090, CPU", "two 4090, CPU", "eight h100", "slow card first, CPU", "eight unequal, CPU")

UNEQUAL = {
    f"cuda:{index}": {"memory": f"{20 + 4 * index}GiB", "bandwidth": f"{900 + 100 * index}GB/s"} for index in range(16)
} | {"cpu": {"memory": "1000GiB", "bandwidth": "200GB/s"}}
"""Sixteen cards, no two alike."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model on a machine; `config` is the model's, all else the profile's."""

    family: str
    name: str
    config: dict[str, Any]
    devices: dict[str, Any]
    workload: dict[str, Any]
    peer: str = "25GB/s"
    pins: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A solver's answer to a case: cost, bound and time."""

    seconds: float
    nanoseconds: int
    fastest_nanoseconds: int
    bound_nanoseconds: int

    @property
    def gap(self) -> float:
        """The share by which the fastest placement is above the bound."""
        return self.fastest_nanoseconds / self.bound_nanoseconds - 1


def cases(names: list[str]) -> Iterator[Case]:
    """Every case of the models that are named; of all by default."""
    listed, workload = machines(), {"context_length": 4096}
    for name, folder in published_models(names).items():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for machine, devices in listed.items():
            yield Case("4,096 tokens", f"{name} on {machine}", config, devices, workload)
            if "decoder_start_token_id" in config:
                tied = config | {"tie_word_embeddings": True}
                yield Case("tied encoder-decoder", f"{name} on {machine}", tied, devices, workload)
        yield Case("sixteen unequal cards", name, config, UNEQUAL, workload)
        for machine in SOME_MACHINES:
            shown, devices = f"{name} on {machine}", listed[machine]
            for length in (16_384, 131_072):
                yield Case(f"{length:,} tokens", shown, config, devices, {"context_length": length})
            prefill = {"context_length": 8192, "optimize": "prefill"}
            yield Case("prefill over 3 GB/s", shown, config, devices, prefill, peer="3GB/s")
            if config.get("num_hidden_layers", 0) >= 80:
                pins = tuple({"match": f"model.layers.[{i},{i + 40}]", "keep_together": True} for i in range(40))
                yield Case("forty keep_together", shown, config, devices, workload, pins=pins)


def problem_of(case: Case) -> tuple[Any, ...] | None:
    """Return what `place_fastest` is asked for a case; `None` where the profile is refused before that."""
    asked: list[tuple[Any, ...]] = []

    def noted(*arguments: Any) -> None:
        asked.append(arguments)

    profile = {
        "version": 1,
        "model": {"source": "config.json", "dtype": "bfloat16"},
        "workload": case.workload,
        "hardware": {"devices": case.devices, "links": LINKS | {"peer": case.peer}},
        "placement": {"strategy": "fastest", "offload": {"folder": "./offload"}, "pins": list(case.pins)},
    }
    with TemporaryDirectory() as folder, patch.object(optimal, "place_fastest", noted):
        (Path(folder) / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
        (Path(folder) / "profile.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
        run_pipeline(Request(path=Path(folder) / "profile.yaml"))
    return asked[0] if asked else None


def answer_of(problem: tuple[Any, ...], solver: str) -> Answer | None:
    """Return a solver's answer to a problem; `None` where nothing fits."""
    with patch.object(Milp, "minimize", SOLVERS[solver]):
        begin = time.process_time()
        found: Optimal | None = optimal.place_fastest(*problem)
        seconds = time.process_time() - begin
    if found is None:
        return None
    return Answer(seconds, found.nanoseconds, (found.fastest or found).nanoseconds, found.bound_nanoseconds)


def contradictions(case: Case, answers: dict[str, Answer | None]) -> Iterator[str]:
    """Yield cases in which one solver is below the other's bound, or finds nothing while the other does."""
    if len({answer is None for answer in answers.values()}) > 1:
        yield f"{case.family}, {case.name}: one solver finds nothing"
    for solver, answer in answers.items():
        for other, below in answers.items():
            if answer and below and below.fastest_nanoseconds < answer.bound_nanoseconds:
                yield f"{case.family}, {case.name}: {other} is below the bound of {solver}"


def table_of(found: dict[str, list[dict[str, Answer]]]) -> Table:
    """Return a row for each family and solver; the plan's cost is the geometric mean relative to HiGHS."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for heading in ("family", "cases", "solver", "median s", "slowest s", "above 2 s", "widest gap", "plan cost"):
        table.add_column(heading, justify="left" if heading in ("family", "solver") else "right", no_wrap=True)
    for family, rows in found.items():
        for solver in SOLVERS:
            answers = [row[solver] for row in rows]
            seconds = [answer.seconds for answer in answers]
            costs = [row[solver].nanoseconds / row["HiGHS"].nanoseconds for row in rows]
            table.add_row(
                *(family, str(len(rows)), solver, f"{median(seconds):.2f}", f"{max(seconds):.2f}"),
                *(str(sum(each > 2 for each in seconds)), f"{max(answer.gap for answer in answers):.2%}"),
                f"{geometric_mean(costs):.4f}",
            )
    return table


def installed_bytes(package: str) -> int:
    """Bytes of a package with what it needs that devmap-config does not need besides."""
    ours = {"numpy", "typing-extensions"}
    sizes: dict[str, int] = {}
    wanted = [package]
    while wanted:
        name = wanted.pop()
        if name not in sizes and name not in ours:
            files = distribution(name).files or ()
            sizes[name] = sum(path.locate().stat().st_size for path in files if path.locate().is_file())  # type: ignore[attr-defined]
            needed = (Requirement(line) for line in requires(name) or ())
            wanted += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return sum(sizes.values())


def import_seconds(module: str) -> float:
    """Return the seconds in which a fresh process imports a module: the minimum of five runs."""
    code = f"import time, numpy; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
    run = [sys.executable, "-c", code]
    return min(float(subprocess.run(run, capture_output=True, check=True).stdout) for _ in range(5))


def every_nth(listed: Iterable[Case], step: int) -> Iterator[Case]:
    """Yield of each family its first case and every Nth after it: a part that is spread over models and machines."""
    seen: Counter[str] = Counter()
    for case in listed:
        if seen[case.family] % step == 0:
            yield case
        seen[case.family] += 1


def main() -> int:
    """Run the command line: which models of `published.csv` to take, or all, and how many of their cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="names in `published.csv`; all of them by default")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of each family, every Nth case only")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, list[dict[str, Answer]]] = {}
    wrong: list[str] = []
    for case in every_nth(cases(arguments.models), arguments.every):
        problem = problem_of(case)
        answers = {} if problem is None else {solver: answer_of(problem, solver) for solver in SOLVERS}
        wrong += contradictions(case, answers)
        fitting = {solver: answer for solver, answer in answers.items() if answer is not None}
        if len(fitting) == len(SOLVERS):
            found.setdefault(case.family, []).append(fitting)
            print(f"{case.family}, {case.name}", file=sys.stderr)
    console = Console(width=110, highlight=False)
    console.print(table_of(found))
    for solver in SOLVERS:
        megabytes = installed_bytes(PACKAGES[solver]) / 1e6
        console.print(f"{solver}: {megabytes:,.0f} MB installed, imported in {import_seconds(MODULES[solver]):.2f} s")
    for line in wrong:
        console.print(f"wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
