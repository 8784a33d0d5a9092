"""From a prepared profile to its plan; where there is none, to what is in the way and what would mend it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devmap_config.placement.buffers import can_be_offloaded, executors_for, report_left_buffers
from devmap_config.placement.constraints import NO_REPAIRS, build_problem
from devmap_config.placement.shortage import report_shortages
from devmap_config.placement.strategies import Infeasible
from devmap_config.placement.ways_out import Change
from devmap_config.plan.attempts import Candidate, attempts
from devmap_config.plan.comparison import best_of
from devmap_config.plan.keeping import prefer_locked_plan
from devmap_config.plan.review import review, warn_of_kept_tensors
from devmap_config.plan.trials import ProfileTrials

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.placement.constraints import Repairs
    from devmap_config.placement.prepared import Prepared
    from devmap_config.placement.problem import Problem
    from devmap_config.plan.attempts import Obstacle
    from devmap_config.plan.lock import Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.plan.trials import Prepare

ANY_FIT = "fewest-devices"
"""The strategy that finds what fits without knowing how fast anything is."""


@dataclass(frozen=True)
class Planner:
    """Makes plans of a prepared profile: one, and where that does not run, others with repairs.

    `prepare` prepares changed profiles, to tell what would help where there is no plan. `previous` is a lock whose plan
    is preferred to a new one where it is as good.
    """

    prepared: Prepared
    sink: Sink
    prepare: Prepare
    previous: Lock | None = None

    def plan(self, repairs: Repairs = NO_REPAIRS) -> Plan | None:
        """Return a verified plan that keeps to the repairs; `None` where there is none, and why is in the sink."""
        problem = build_problem(self.prepared, self.sink, repairs)
        if problem is None:
            return None
        tried = attempts(problem, self.prepared)
        candidates = [attempt for attempt in tried if isinstance(attempt, Candidate)]
        obstacles = [attempt for attempt in tried if not isinstance(attempt, Candidate)]
        if not candidates:
            # Of what may run a plan, the last needs the least room.
            problem = replace(problem, executor=executors_for(self.prepared)[-1])
            self._report(obstacles[-1], problem, ProfileTrials(self.prepared, self.prepare, repairs))
            return None
        plan = best_of([candidate.plan for candidate in candidates], problem.aim)
        kept = next(candidate.kept for candidate in candidates if candidate.plan.executor == plan.executor)
        if kept:
            warn_of_kept_tensors(kept, plan, self.prepared.loaded, self.sink)
        if self.previous is not None:
            plan = prefer_locked_plan(plan, self.previous, self.prepared)
        return accepted(plan, self.prepared, self.sink)

    def _report(self, obstacle: Obstacle, problem: Problem, trials: ProfileTrials) -> None:
        """Say why there is no plan; where the profile wants buffers left and that is all, say so."""
        loaded = self.prepared.loaded
        is_left = loaded.profile.placement.offload.buffers is False
        if is_left and can_be_offloaded(problem.graph, problem.capacities):
            for strategy in (None, ANY_FIT):
                if strategy is not None and trials.compiles(Change(strategy=strategy)):
                    break  # then the buffers are not what is in the way
                if trials.compiles(Change(strategy=strategy, offload_buffers=True)):
                    infeasible = obstacle if isinstance(obstacle, Infeasible) else None
                    report_left_buffers(infeasible, strategy, loaded, self.sink)
                    return
        if isinstance(obstacle, Infeasible):
            report_shortages(obstacle, problem, self.prepared, trials, self.sink)
        else:
            self.sink.report_all(obstacle)


def accepted(plan: Plan, prepared: Prepared, sink: Sink) -> Plan | None:
    """Return the plan, where it verifies; else what is wrong with it goes to the sink."""
    findings = review(plan, prepared)
    if not any(finding.severity == "error" for finding in findings):
        return plan
    sink.report_all(findings)
    return None
