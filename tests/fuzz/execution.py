"""Tries one input in this process, and states what is wrong with the answer."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.testing import CliRunner

import devmap_config.compiler
import devmap_config.plan.drift
from devmap_config.cli import devmap
from devmap_config.placement.milp import Milp
from fuzz.surfaces import SURFACES

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from devmap_config.placement.milp import Solution, Terms

MAX_CPU_SECONDS = 5
"""For an answer that refuses the input."""

MAX_CPU_SECONDS_OF_ACCEPTED = 20
"""For a plan: a model of a thousand layers takes what it takes, and does end."""

MAX_PEAK_BYTES = 2**30
EXIT_CODES = (0, 1, 2, 3, 4)
"""Of commands that were not interrupted and have no bug."""


@dataclass(frozen=True)
class Outcome:
    """How an input was answered.

    Attributes:
        kind: what is wrong, in the same words for every input of which the same is wrong; `None` where nothing is.
        details: a traceback, or what was printed.
        exit_code: the command's; `None` where it did not end by itself.
        reached: whether placement was reached, or a locked plan was held to the model.
        cpu_seconds: what it took of a processor.
        peak_bytes: the most memory that the process held meanwhile.
    """

    kind: str | None
    details: str = ""
    exit_code: int | None = None
    reached: bool = False
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


def execute(surface: str, data: bytes, template: Path, folder: Path) -> Outcome:
    """Try one input in a folder that is a copy of another."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True, copy_function=_copy)
    os.chdir(folder)
    tried = SURFACES[surface]
    tried.write(data)
    reached.clear()
    _forget_peak()
    started = time.process_time()
    result = CliRunner().invoke(devmap, tried.command(data), standalone_mode=False)
    cpu_seconds, peak_bytes = time.process_time() - started, _peak_bytes()
    logging.getLogger().handlers.clear()  # `--verbose` writes to what is closed now
    kind, details = _judged(result, tried.command(data))
    is_accepted = result.exception is None and not result.return_value
    if kind is None and cpu_seconds > (MAX_CPU_SECONDS_OF_ACCEPTED if is_accepted else MAX_CPU_SECONDS):
        kind, details = SLOW, f"{cpu_seconds:.1f} s of the processor's time"
    if kind is None and peak_bytes > MAX_PEAK_BYTES:
        kind, details = LARGE, f"{peak_bytes / 2**20:,.0f} MiB"
    return Outcome(kind, details, result.return_value, bool(reached), cpu_seconds, peak_bytes)


SLOW = "takes too long"
LARGE = f"takes more than {MAX_PEAK_BYTES // 2**20} MiB"


def _copy(source: str, target: str) -> None:
    if Path(source).name == "pipe":
        os.mkfifo(target)
    else:
        shutil.copyfile(source, target)


reached: set[str] = set()
"""What has been called since this was cleared."""


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        reached.add(function.__name__)
        return function(*arguments, **named)

    return call


# The inputs' digests are what comes before placing; of a locked plan, the reading of it by the model's names.
devmap_config.compiler.inputs_of = _noted(devmap_config.compiler.inputs_of)
devmap_config.plan.drift.locked_units = _noted(devmap_config.plan.drift.locked_units)

MOST_REMEMBERED = 2_000
"""Then what was solved is forgotten."""


def remember_solutions() -> None:
    """Solve each program once: most inputs repeat one, and HiGHS always gives the same answer."""
    minimize, solutions = Milp.minimize, {}

    def remembered(milp: Milp, objective: Terms, **options: Any) -> Solution:
        rows = tuple((tuple(row.terms.items()), row.most, row.is_equality) for row in milp.constraints)
        key = (tuple(milp.upper), tuple(milp.is_integer), rows, tuple(objective.items()), tuple(options.items()))
        if key not in solutions:
            if len(solutions) >= MOST_REMEMBERED:
                solutions.clear()
            solutions[key] = minimize(milp, objective, **options)
        return solutions[key]

    Milp.minimize = remembered  # type: ignore[method-assign]


def _judged(result: Result, command: list[str]) -> tuple[str | None, str]:
    error = result.exception
    if isinstance(error, (click.ClickException, click.exceptions.Exit)):
        return None, ""
    if error is not None:
        place = [frame for frame in traceback.extract_tb(error.__traceback__) if "devmap_config" in frame.filename]
        where = f" in {Path(place[-1].filename).name}:{place[-1].name}" if place else ""
        return type(error).__name__ + where, "".join(traceback.format_exception(error)[-8:])
    if result.return_value not in EXIT_CODES:
        return f"exits with {result.return_value}", result.output
    if result.return_value and not result.output.strip() and not {"-q", "--quiet"} & set(command):
        return f"exits with {result.return_value}, and says nothing", ""
    if "json" in command or "sarif" in command:
        try:
            json.loads(result.stdout)
        except ValueError:
            return "prints what is no JSON", result.stdout
    return None, ""


STATUS = Path("/proc/self/status")
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def _forget_peak() -> None:
    """Make the kernel count the peak from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    return int(PEAK.search(STATUS.read_text())[1]) * 1024  # type: ignore[index]
