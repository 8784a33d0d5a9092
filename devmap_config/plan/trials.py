"""Tries changed profiles, as compiling them would: whether a plan comes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.placement.constraints import build_problem
from devmap_config.placement.ways_out import Change
from devmap_config.plan.attempts import Candidate, attempts

if TYPE_CHECKING:
    from collections.abc import Collection

    from devmap_config.diagnostics.diagnostic import Span
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.placement.constraints import Repairs
    from devmap_config.placement.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile


class Prepare(Protocol):
    """The stages before placing."""

    def __call__(
        self, loaded: LoadedProfile, sink: Sink, *, model: LoadedModel | None = None, without: Collection[Span] = ()
    ) -> Prepared | None:
        """Prepare a profile, with a model that is at hand already, without the rules at these places."""


@dataclass(frozen=True)
class ProfileTrials:
    """Tries changes of a profile, up to the dry run, with repairs that a dry run asked for."""

    prepared: Prepared
    prepare: Prepare
    repairs: Repairs

    def fits(self, change: Change) -> bool:
        """Return whether there is a plan, however slow; another context is reckoned from the measurement at hand."""
        model, measurement = self.prepared.model, self.prepared.graph.measurement
        if change.context_length is not None and measurement is not None:
            model = replace(model, graph=replace(model.graph, measurement=measurement.at(change.context_length)))
        return self._has_plan(change, model, at_any_speed=True)

    def compiles(self, change: Change) -> bool:
        """Return whether compiling the changed profile gives a plan."""
        return self._has_plan(change, None if change.is_of_model else self.prepared.model)

    def _has_plan(self, change: Change, model: LoadedModel | None, *, at_any_speed: bool = False) -> bool:
        sink = Sink()
        without = [rule.span for rule in change.without]
        try:
            prepared = self.prepare(change.applied_to(self.prepared.loaded), sink, model=model, without=without)
        except LibraryChangedError:
            return False
        if prepared is None or sink.has_errors or (problem := build_problem(prepared, sink, self.repairs)) is None:
            return False
        if at_any_speed and problem.aim is not None:
            problem = replace(problem, aim=replace(problem.aim, phases=()))
            prepared = replace(prepared, loaded=Change(strategy="fastest").applied_to(prepared.loaded))
        return any(isinstance(attempt, Candidate) for attempt in attempts(problem, prepared))
