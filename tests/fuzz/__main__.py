"""Generates inputs for every way in, tries them, and reports failures: `make fuzz SECONDS=3600 SEED=7`.

An input depends only on the seed, the name of its surface and its number: the same seed makes the same inputs. The
first failures of each kind are written to a folder, and the kind is printed once with its details. Put such an input
into `tests/corpus` under a name that says what it is; `make test` then tries it.
"""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fuzz.execution import SLOW
from fuzz.surfaces import SURFACES, Sources
from fuzz.worker import Worker, make_root

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fuzz.execution import Outcome

SAVED = 3
"""So many inputs of each kind of failure are kept."""

LEAST_SHARE = 0.2
"""Of profiles and of locks, at least so many must get as far as placement: else little of the compiler is tried."""

MEMORY = Path("/dev/shm")  # noqa: S108
"""Where folders are made and removed faster than on a disk; a run has one of its own there."""

HELD_TO_SHARE = {"profiles": ("yaml", "values", "templates"), "locks": ("locks",)}


@dataclass
class Tally:
    """Counts of the outcomes of one surface's inputs."""

    outcomes: list[Outcome] = field(default_factory=list)

    def row(self, name: str) -> str:
        """Return the line of a table."""
        count = len(self.outcomes)
        done = sum(outcome.exit_code == 0 for outcome in self.outcomes)
        reached = f"{share({name: self}, (name,)):.0%}" if SURFACES[name].reaches else "–"
        cpu_seconds = sum(outcome.cpu_seconds for outcome in self.outcomes)
        slowest = max((outcome.cpu_seconds for outcome in self.outcomes), default=0)
        peak_bytes = max((outcome.peak_bytes for outcome in self.outcomes), default=0)
        failed = sum(outcome.kind is not None for outcome in self.outcomes)
        return (
            f"{name:10} {count:8,} {done / max(count, 1):6.0%} {reached:>6} {1000 * cpu_seconds / max(count, 1):8.0f}"
            f" {slowest:8.1f} {peak_bytes / 2**20:8,.0f} {failed:7,}"
        )


def share(tallies: dict[str, Tally], names: Sequence[str]) -> float:
    """Return the share of inputs of some surfaces that reached placement, or 1 if there are none."""
    outcomes = [outcome for name in names if name in tallies for outcome in tallies[name].outcomes]
    return sum(outcome.reached for outcome in outcomes) / len(outcomes) if outcomes else 1


HEADING = "surface      inputs exit 0 placed  mean ms   most s peak MiB  failed"


def made_inputs(seed: str, sources: Sources, surfaces: list[str]) -> Iterator[tuple[str, int, bytes]]:
    """Yield inputs without end, the surfaces in turn: the surface, the input's number there, the input."""
    for number in itertools.count():
        for surface in surfaces:
            yield surface, number, SURFACES[surface].make(Random(f"{seed}/{surface}/{number}"), sources)


def main() -> int:
    """Try inputs for a time, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", default=None, help="one that was printed before; a new one else")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="the folder for what fails")
    parser.add_argument("surfaces", nargs="*", metavar="SURFACE", help=f"of {', '.join(SURFACES)}; all else")
    options = parser.parse_args()
    seed = options.seed or secrets.token_hex(4)
    print(f"seed {seed}, {options.seconds} s, {options.workers} workers", flush=True)
    with TemporaryDirectory(prefix="devmap-fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
        root = Path(folder)
        make_root(root)
        inputs = made_inputs(seed, Sources(root / "template"), options.surfaces or list(SURFACES))
        failures = Failures(options.failures.absolute(), seed)
        with ExitStack() as stack:
            workers = [stack.enter_context(closing(Worker(root, number))) for number in range(options.workers)]
            started = time.monotonic()
            tallies = fuzz(workers, inputs, failures, options.seconds)
            seconds = time.monotonic() - started
    print(HEADING)
    for name, tally in tallies.items():
        print(tally.row(name))
    count = sum(len(tally.outcomes) for tally in tallies.values())
    cpu_seconds = sum(outcome.cpu_seconds for tally in tallies.values() for outcome in tally.outcomes)
    print(f"{count:,} inputs in {seconds:,.0f} s, {cpu_seconds:,.0f} of a processor to answer them; seed {seed}")
    for kind, number in failures.kinds.items():
        print(f"failed {number} times: {kind}")
    few = [what for what, names in HELD_TO_SHARE.items() if share(tallies, names) < LEAST_SHARE]
    if few:
        print(f"of {' and '.join(few)} fewer than {LEAST_SHARE:.0%} got as far as placement")
    return 1 if failures.kinds or few else 0


class Failures:
    """Failures by kind; the first of each kind are kept in a folder."""

    def __init__(self, folder: Path, seed: str) -> None:
        self._folder, self._seed = folder, seed
        self.kinds: Counter[str] = Counter()

    def add(self, surface: str, number: int, data: bytes, outcome: Outcome) -> None:
        """Note a failure, and print it if it is the first of its kind."""
        kind = f"{surface}: {outcome.kind}"
        self.kinds[kind] += 1
        if self.kinds[kind] > SAVED:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{surface}-{self._seed}-{number}"
        path.write_bytes(data)
        print(f"{kind}: {path}", flush=True)
        if self.kinds[kind] == 1 and outcome.details:
            print(outcome.details[-4_000:], flush=True)


def fuzz(
    workers: list[Worker], inputs: Iterator[tuple[str, int, bytes]], failures: Failures, seconds: float
) -> dict[str, Tally]:
    """Try inputs until the time is over."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    ends = time.monotonic() + seconds
    tried: dict[Worker, tuple[str, int, bytes]] = {}
    while tried or time.monotonic() < ends:
        for worker in workers:
            if worker not in tried and time.monotonic() < ends:
                tried[worker] = next(inputs)
                worker.send(tried[worker][0], tried[worker][2])
        wait([worker.connection for worker in tried], timeout=0.5)
        for worker in list(tried):
            if (outcome := worker.outcome()) is not None:
                surface, number, data = tried.pop(worker)
                if outcome.kind == SLOW:  # once more: the first of its kind imports a model's code
                    outcome = worker.run(surface, data)
                tallies[surface].outcomes.append(outcome)
                if outcome.kind is not None:
                    failures.add(surface, number, data, outcome)
    return tallies


if __name__ == "__main__":
    sys.exit(main())
