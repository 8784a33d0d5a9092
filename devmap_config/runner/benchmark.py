"""Compares a plan with plain transformers on the same machine: both load and generate in turns."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, get_args

from devmap_config.runner.benchmark_process import Job, Loader, Sample, SampleFailure, run_in_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from devmap_config.profile.permissions import Permissions
    from devmap_config.runner.generation_times import GenerationWorkload
    from devmap_config.runner.runner import Deployment

Phase = Literal["load", "prefill", "decode"]

PHASES: tuple[Phase, ...] = get_args(Phase)

MOST_NOISE = 1.10
"""The largest factor between two measurements of the same thing with which a ratio is credible."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of another loader's time to the plan's: the median, the least and the greatest of all rounds.

    Attributes:
        noise: the ratio between two measurements of the same thing, the larger of both loaders'.
    """

    median: float
    least: float
    most: float
    noise: float

    @property
    def is_too_noisy(self) -> bool:
        """True if the ratio says nothing, because two measurements of the same thing differ too much."""
        return self.noise > MOST_NOISE


def ratio_of(plan_seconds: Sequence[float], other_seconds: Sequence[float]) -> Ratio:
    """Return the ratio of times that were measured in turns, a pair in each round.

    >>> ratio_of((1.0, 1.0, 2.0, 2.0), (2.0, 2.0, 4.0, 6.0))
    Ratio(median=2.0, least=2.0, most=3.0, noise=1.3333333333333333)
    """
    ratios = [other / plan for plan, other in zip(plan_seconds, other_seconds, strict=True)]
    noise = max(noise_of(plan_seconds), noise_of(other_seconds))
    return Ratio(median=median(ratios), least=min(ratios), most=max(ratios), noise=noise)


def noise_of(seconds: Sequence[float]) -> float:
    """Return the factor between two measurements of the same thing: the even rounds, and the odd ones.

    >>> noise_of((1.0, 1.5, 1.0, 1.5))
    1.5
    """
    halves = (median(seconds[::2]), median(seconds[1::2]))
    return max(halves) / min(halves)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The times of one loader in each round, or why it did not finish."""

    loader: Loader
    samples: tuple[Sample, ...] = ()
    failure: SampleFailure | None = None

    def seconds(self, phase: Phase) -> tuple[float, ...]:
        """Return the times of a phase by round; empty if the model does not decode, or failed."""
        if self.failure is not None:
            return ()
        if phase == "load":
            return tuple(sample.load_seconds for sample in self.samples)
        figures = (getattr(sample.generation, f"{phase}_seconds") for sample in self.samples)
        return tuple(median(seconds) for seconds in figures if seconds)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The peak of each device's memory over all rounds."""
        peaks: Counter[str] = Counter()
        for sample in self.samples:
            peaks |= Counter(sample.peak_bytes)
        return dict(peaks)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "failure": None if self.failure is None else asdict(self.failure),
            **{f"{phase}_seconds": list(self.seconds(phase)) for phase in PHASES},
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The times of a plan and of other loaders on this machine; the plan is the first."""

    generation: GenerationWorkload
    max_memory: Mapping[int | str, int]
    rounds: int
    results: tuple[Measured, ...]

    @property
    def plan(self) -> Measured:
        """The times of the plan."""
        return self.results[0]

    def ratio(self, other: Measured, phase: Phase) -> Ratio | None:
        """Return the ratio of another loader's time to the plan's; `None` if either has none."""
        own, others = self.plan.seconds(phase), other.seconds(phase)
        return ratio_of(own, others) if own and others and other is not self.plan else None

    @property
    def is_too_noisy(self) -> bool:
        """True if any ratio says nothing."""
        ratios = (self.ratio(other, phase) for other in self.results for phase in PHASES)
        return any(ratio is not None and ratio.is_too_noisy for ratio in ratios)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data; a ratio that is too noisy is `None`."""
        prompts = self.generation.prompts
        return {
            "rounds": self.rounds,
            "batch_size": prompts.batch_size,
            "prompt_tokens": prompts.length,
            "new_tokens": self.generation.new_tokens,
            "max_memory": {str(device): size_bytes for device, size_bytes in self.max_memory.items()},
            "loaders": {result.loader: result.to_json() for result in self.results},
            "ratios": {
                result.loader: {phase: self._ratio_to_json(result, phase) for phase in PHASES}
                for result in self.results[1:]
            },
        }

    def _ratio_to_json(self, other: Measured, phase: Phase) -> dict[str, Any] | None:
        ratio = self.ratio(other, phase)
        if ratio is None:
            return None
        hidden = dict.fromkeys(("median", "least", "most")) if ratio.is_too_noisy else {}
        return {**asdict(ratio), **hidden, "too_noisy": ratio.is_too_noisy}


def jobs_of(
    deployment: Deployment,
    profile: Path,
    *,
    variables: Mapping[str, str],
    permissions: Permissions,
    generation: GenerationWorkload,
) -> tuple[Job, ...]:
    """Return a job for each loader, the plan's first.

    `auto` gets as much memory for weights as the plan: each device's capacity, less what running the plan takes there.
    Plain `device_map="cpu"` is left out if the profile has accelerators.
    """
    request = deployment.request
    plan = Job(
        loader="plan",
        folder=Path.cwd(),
        profile=profile,
        variables=variables,
        permissions=permissions,
        random_weights=Path(request.weights) if deployment.has_random_weights else None,
        request=request,
        max_memory={use.id.in_device_map: use.weights_bytes + use.free_bytes for use in deployment.plan.devices},
        devices=deployment.compiled.inventory.devices,
        generation=generation,
    )
    has_cards = bool(deployment.compiled.inventory.accelerators)
    others: tuple[Loader, ...] = ("auto",) if has_cards else ("auto", "cpu")
    return (plan, *(replace(plan, loader=loader) for loader in others))


def turns(loaders: Sequence[Loader], rounds: int) -> Iterator[tuple[Loader, ...]]:
    """Yield the order of each round: the first loader of one round is the last of the next.

    >>> list(turns(("plan", "auto"), 3))
    [('plan', 'auto'), ('auto', 'plan'), ('plan', 'auto')]
    """
    for start in (number % len(loaders) for number in range(rounds)):
        yield (*loaders[start:], *loaders[:start])


def run_benchmark(jobs: tuple[Job, ...], *, rounds: int, begun: Callable[[str], None]) -> Benchmark:
    """Run every job in each round, in turns, and announce each.

    Before that, the plan runs once without being counted, so that the system's cache of files is warm for everyone. A
    loader that fails is not run again.
    """
    by_loader = {job.loader: job for job in jobs}
    results = {loader: Measured(loader=loader) for loader in by_loader}
    begun("warming up")
    warm_up = run_in_process(replace(jobs[0], generation=replace(jobs[0].generation, new_tokens=1)))
    if isinstance(warm_up, SampleFailure):
        results["plan"] = _with(results["plan"], warm_up)
    for number, order in enumerate(turns(tuple(by_loader), rounds), start=1):
        for loader in order:
            begun(f"round {number} of {rounds}: {loader}")
            result = results[loader]
            if result.failure is None:
                results[loader] = _with(result, run_in_process(by_loader[loader]))
    return Benchmark(
        generation=jobs[0].generation, max_memory=jobs[0].max_memory, rounds=rounds, results=tuple(results.values())
    )


def _with(before: Measured, outcome: Sample | SampleFailure) -> Measured:
    if isinstance(outcome, SampleFailure):
        return replace(before, failure=outcome)
    return replace(before, samples=(*before.samples, outcome))
