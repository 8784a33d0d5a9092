"""Finds the context from which offloading the cache is better than streaming weights, by planning both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.cli.progress import progress
from devmap_config.graph.costs import PARTLY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.table import Table

    from devmap_config.cli.command import ProfileOptions
    from devmap_config.compiler import Compiled, Request
    from devmap_config.plan.prediction import TimeBasis

SHORTEST_CONTEXT = 1_024
LONGEST_CONTEXT = 2**17
"""The longest context that is tried; from the shortest on, each is twice the last, if the model was trained for it."""

HALVINGS = 3
"""The number of times that the range is halved in which the better cache changes."""

CACHES = ("dynamic", "offloaded")
PLACES = ("where the model runs", "offloaded")
"""The two places of keys and values that are compared."""


@dataclass(frozen=True)
class CacheComparison:
    """The plans for one context, with the cache on the devices that run the model, and offloaded; `None` if there is
    none.

    `reasons` say why there is none.
    """

    context_length: int
    plans: tuple[Compiled | None, Compiled | None]
    reasons: tuple[str | None, str | None] = (None, None)
    partly: Compiled | None = None
    """The plan that chooses, block by block, where the cache is; `None` if there is none."""

    @property
    def nanoseconds(self) -> tuple[int | None, int | None]:
        """The time of a token with each of the two caches; `None` if it is unknown."""
        plans, offloaded = self.plans
        return (
            None if plans is None else plans.plan.prediction.decode_nanoseconds_per_token,
            None if offloaded is None else offloaded.plan.prediction.decode_nanoseconds_per_token,
        )

    @property
    def better(self) -> int | None:
        """The index of the only cache with a plan, or of the faster one; `None` if that is unknown."""
        fitting = [number for number, plan in enumerate(self.plans) if plan is not None]
        if len(fitting) == 1:
            return fitting[0]
        times, offloaded = self.nanoseconds
        return None if times is None or offloaded is None else int(offloaded < times)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "context_length": self.context_length,
            "better": None if self.better is None else CACHES[self.better],
            **{
                name: None if compiled is None else {key: compiled.to_json()[key] for key in ("prediction", "basis")}
                for name, compiled in zip((*CACHES, PARTLY), (*self.plans, self.partly), strict=True)
            },
        }


def compared_caches(compiled: Compiled, profile: Path, options: ProfileOptions) -> list[CacheComparison]:
    """Plan a profile with both caches at several contexts, with more contexts around the point where the better one
    changes.
    """
    measurement = compiled.graph.measurement
    own = None if measurement is None else measurement.workload.context_length
    end = min((measurement.positions.most if measurement else None) or LONGEST_CONTEXT, LONGEST_CONTEXT)
    lengths = [SHORTEST_CONTEXT << number for number in range(LONGEST_CONTEXT.bit_length())]
    contexts = sorted(
        {length for length in (*lengths, own, end) if length is not None and length <= max(end, own or 0)}
    )
    comparisons: dict[int, CacheComparison] = {}
    with progress(len(contexts) + HALVINGS, quiet=options.quiet) as begin:

        def compare(length: int) -> CacheComparison:
            begin(f"a context of {length:,} tokens")
            if length not in comparisons:
                comparisons[length] = _compared(partial(options.request, profile, advises=False), length)
            return comparisons[length]

        every = [compare(length) for length in contexts]
        change = next((pair for pair in pairwise(every) if _changes(*pair)), None)
        if change is not None:
            before, after = change
            for _ in range(HALVINGS):
                middle = compare((before.context_length + after.context_length) // 2)
                before, after = (middle, after) if middle.better == before.better else (before, middle)
    return [comparisons[length] for length in sorted(comparisons)]


def _changes(before: CacheComparison, after: CacheComparison) -> bool:
    return None not in (before.better, after.better) and before.better != after.better


def _compared(request: Callable[..., Request], context_length: int) -> CacheComparison:
    # The last first: its measurement tells those of the others.
    partly, offloaded, there = (
        _plan(request(workload={"cache": cache, "context_length": context_length})) for cache in (PARTLY, *CACHES[::-1])
    )
    return CacheComparison(context_length, (there[0], offloaded[0]), (there[1], offloaded[1]), partly[0])


def _plan(request: Request) -> tuple[Compiled | None, str | None]:
    """Return the plan, or the reason why there is none."""
    from devmap_config.compiler import Compiled, run_pipeline

    compilation = run_pipeline(request)
    if isinstance(compilation, Compiled):
        return compilation, None
    return None, next((finding.message for finding in compilation.diagnostics if finding.severity == "error"), None)


def comparison_table(every: list[CacheComparison]) -> Iterator[Table | str]:
    """Yield the times of both caches by context, those of a plan that mixes them where there is one, and the context
    from which one is better.
    """
    from devmap_config.cli.tables import new_table

    mixes = any(comparison.partly is not None for comparison in every)
    headings = ("a token", "copied", "offloaded", "copied", *(("partly", "copied") if mixes else ()))
    table = new_table("context", figures=headings)
    for comparison in every:
        plans = (*comparison.plans, comparison.partly) if mixes else comparison.plans
        table.add_row(f"{comparison.context_length:,}", *(text for plan in plans for text in _figures(plan)))
    yield table
    partly = f", with `cache: {PARTLY}` (`partly`)" if mixes else ""
    yield f"A token's time with the cache where the model runs, `offloaded`{partly}; `copied` are weights."
    yield from cache_comparison_in_words(every)
    rates = {
        basis.rates: None
        for comparison in every
        for compiled in comparison.plans
        if compiled
        for basis in _decoding(compiled)
    }
    if rates:
        yield f"These times rest on {' and '.join(rates)} rates."


def cache_comparison_in_words(every: list[CacheComparison]) -> Iterator[str]:
    """Yield sentences about the context from which one cache is better, or that only one of them has a plan."""
    for number, where in enumerate(PLACES):
        if all(comparison.plans[number] is None for comparison in every):
            yield f"With the cache {where}, there is no plan: {every[0].reasons[number]}."
            return
    known = [comparison for comparison in every if comparison.better is not None]
    if not known:
        yield "How long a token takes is not known: the profile says too little of the machine."
        return
    changes = [(before, after) for before, after in pairwise(known) if before.better != after.better]
    for before, after in changes:
        yield (
            f"From a context of {after.context_length:,} tokens on, the cache is better {PLACES[after.better or 0]};"
            f" at {before.context_length:,} it is not yet."
        )
    if not changes:
        yield (
            f"At every context that was tried, from {known[0].context_length:,} to {known[-1].context_length:,} tokens,"
            f" the cache is better {PLACES[known[0].better or 0]}."
        )


def _decoding(compiled: Compiled) -> Iterator[TimeBasis]:
    yield from (basis for phase, basis in compiled.time_bases.items() if phase == "decode")


def _figures(compiled: Compiled | None) -> tuple[str, str]:
    if compiled is None:
        return "–", "–"
    plan = compiled.plan
    nanoseconds = plan.prediction.decode_nanoseconds_per_token
    streamed = plan.prediction.streamed_bytes_per_token
    return "?" if nanoseconds is None else format_duration(nanoseconds), format_bytes(streamed) if streamed else "none"
