"""Makes the plan of a prepared profile or, if there is none, reports the obstacle and remedies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.graph.digest import digest
from devmap_config.placement.constraints import NO_REPAIRS, build_problem
from devmap_config.placement.executors import executors_for
from devmap_config.plan.attempts import Candidate, attempts
from devmap_config.plan.comparison import beside_fastest, best_of
from devmap_config.plan.keeping import prefer_locked_plan
from devmap_config.plan.review import review, warn_of_kept_tensors
from devmap_config.plan.shortage import report_obstacle
from devmap_config.plan.trials import Trials
from devmap_config.prepared import DraftModel
from devmap_config.stages import begin

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.placement.constraints import Repairs
    from devmap_config.plan.lock import Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.plan.trials import Prepare
    from devmap_config.prepared import Prepared


@dataclass(frozen=True)
class Planner:
    """Makes plans of a prepared profile: a first one and, if a dry run fails, others with repairs.

    Attributes:
        prepared: the profile with its model and rules.
        sink: takes the diagnostics.
        prepare: prepares changed profiles, to find remedies if there is no plan; `None` to skip remedies.
        previous: a lock whose plan is preferred to a new one that is no better.
    """

    prepared: Prepared
    sink: Sink
    prepare: Prepare | None
    previous: Lock | None = None

    def plan(self, repairs: Repairs = NO_REPAIRS) -> Plan | None:
        """Return a verified plan that keeps to the repairs; if there is none, report why and return `None`."""
        begin("place", f"placing {self.prepared.graph.class_name} by `{self.prepared.strategy}`")
        if self.prepared.is_for_vllm:
            from devmap_config.plan.pipelines import plan_pipeline  # imports numpy

            plan = plan_pipeline(self.prepared, self.sink)
            return None if plan is None else accepted(plan, self.prepared, self.sink)
        problem = build_problem(self.prepared, self.sink, repairs)
        if problem is None:
            return None
        tried = attempts(problem, self.prepared)
        candidates = [attempt for attempt in tried if isinstance(attempt, Candidate)]
        obstacles = [attempt for attempt in tried if not isinstance(attempt, Candidate)]
        if not candidates:
            # The last executor needs the least memory.
            problem = replace(problem, executor=executors_for(self.prepared)[-1])
            trials = Trials(self.prepared, self.prepare, repairs)
            report_obstacle(obstacles[-1], problem, self.prepared, trials, self.sink)
            return None
        plan = best_of([candidate.plan for candidate in candidates], problem.aim)
        kept = next(candidate.kept for candidate in candidates if candidate.plan.executor == plan.executor)
        if kept:
            warn_of_kept_tensors(kept, plan, self.prepared.loaded, self.sink)
        if self.previous is None:
            return plan
        preferred = prefer_locked_plan(plan, self.previous, self.prepared)
        if preferred is not plan and plan.strategy == "fastest":
            preferred = beside_fastest(preferred, plan.fastest or plan, problem.aim)
        return accepted(preferred, self.prepared, self.sink)


def draft_of(plan: Plan, model: LoadedModel, graph_digest: str) -> DraftModel:
    """Return the needs of a draft model from its plan, which has all of it on one device."""
    use = next(use for use in plan.devices if use.weights_bytes)
    made_from = {
        "config": model.source.config_digest,
        "class": model.class_name,
        "dtype": model.dtype,
        "commit": model.source.commit,
        "graph": graph_digest,
    }
    return DraftModel(
        class_name=model.graph.class_name,
        dtype=model.dtype,
        device=use.id,
        weights_bytes=use.weights_bytes,
        kv_cache_bytes=use.kv_cache_bytes,
        activation_bytes=use.activation_bytes,
        decode_nanoseconds_per_token=plan.prediction.decode_nanoseconds_per_token,
        digest=digest(made_from),
    )


def accepted(plan: Plan, prepared: Prepared, sink: Sink) -> Plan | None:
    """Return the plan if it passes verification; otherwise report its violations, and return `None`."""
    findings = review(plan, prepared)
    if not any(finding.is_error for finding in findings):
        return plan
    sink.report_all(findings)
    return None
