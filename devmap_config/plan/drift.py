"""Checks whether a lock still holds for its profile and, if not, says why: inputs changed, or its plan is wrong.

A lock makes two kinds of statements that cannot be derived: the locations of all units, and a lower bound, whose proof
took long. Everything else follows from these and from the inputs; it is derived again and compared. The bound is only
checked for plausibility; `check --prove` proves it again. Stages of a plan for vLLM have no bound, and are found
quickly, so they are placed anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.placement.executors import executors_for
from devmap_config.plan.changes import changed_inputs, changed_versions
from devmap_config.plan.inputs import early_graph_digest
from devmap_config.plan.lock import LockError, locked_caches, locked_units
from devmap_config.plan.moved import FOLLOW_FROM_MEASUREMENT, LOADING, moved_figures
from devmap_config.plan.plan import FASTEST, OWN, assemble
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import broken_promises
from devmap_config.plan.verify import coverage
from devmap_config.profile.document import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.lock import InputDigests, Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.prepared import Prepared
    from devmap_config.profile.loading import LoadedProfile

BOUND = "bound_decode_nanoseconds_per_token"

PROVEN = (BOUND, *FASTEST.values())
"""The figures of a lock that concern other plans than its own, and are proved rather than derived."""

DriftCode = Literal["stale-lock", "broken-lock", "unproven-lock"]


@dataclass(frozen=True)
class Drift:
    """The reasons why a lock no longer holds.

    Attributes:
        code: `stale-lock` if inputs changed, `broken-lock` if its statements do not follow from its inputs,
            `unproven-lock` if its plan is not the one that its strategy makes.
        reasons: phrases, at least one.
    """

    code: DriftCode
    reasons: tuple[str, ...]

    @property
    def message(self) -> str:
        """The predicate of a sentence about the lock: "is stale: the hardware changed"."""
        if self.code == "stale-lock":
            return f"is stale: {'; '.join(self.reasons)}"
        more = f", and {len(self.reasons) - 1} more" if len(self.reasons) > 1 else ""
        return f"is {'wrong' if self.code == 'broken-lock' else 'not proven'}: {self.reasons[0]}{more}"


@dataclass(frozen=True)
class ReusedPlan:
    """The plan of a lock that still holds, with all figures derived anew.

    Attributes:
        plan: the plan.
        moved: the versions of libraries that measure differently from those of the lock, and the figures that changed;
            `None` if none did.
    """

    plan: Plan
    moved: str | None = None


def remedy(code: str, profile: Path) -> str:
    """Return the advice for a lock that is missing, cannot be read or does not hold."""
    return "upgrade devmap-config" if code == "newer-lock" else f"run `devmap compile {profile}` and commit the lock"


def reuse_locked_plan(lock: Lock, prepared: Prepared, inputs: InputDigests) -> ReusedPlan | Drift:
    """Derive the plan of a lock, verify it like a new one, and compare it with everything that the lock says.

    Only stages for vLLM are placed anew for this. If only the measurement has changed, because of other versions of the
    libraries, the locked plan is checked against the new figures instead.

    Args:
        lock: a lock of the profile.
        prepared: the profile with its model and rules.
        inputs: the digests of the present inputs.

    Returns:
        The plan, or the reasons why the lock does not hold.
    """
    inputs = _comparable(inputs, lock, prepared.graph)
    variables = prepared.loaded.overrides
    versions = changed_versions(lock) if _is_measured_otherwise(lock, inputs, variables) else ""
    hosts = [device.host for device in prepared.capacities]
    if not versions and (changed := changed_inputs(lock, inputs, variables, hosts)):
        return Drift("stale-lock", changed)
    try:
        plan = _derived(lock, prepared)
    except LockError as error:
        return _drift([str(error)], versions)
    stated = lock.plan["devices"]
    if versions and [use["weights_bytes"] for use in stated] != [use.weights_bytes for use in plan.devices]:
        return Drift("stale-lock", (f"the model's module tree changed ({versions})",))
    if broken := broken_promises(plan, prepared):
        return _drift(broken, versions, moved_figures(lock.plan, plan.to_json()))
    hardware = prepared.inventory.accelerators_to_json()
    contradictions = _contradictions(lock, plan, hardware, inputs, follows_measurement=not versions)
    if broken := [*contradictions, *_bad_bounds(lock, prepared), *_bad_fastest(lock, prepared)]:
        return Drift("broken-lock", tuple(broken))
    other = _other_stages(plan, prepared) if prepared.is_for_vllm else None
    if not versions:
        if other is not None:
            return Drift("unproven-lock", (other,))
        stated = {name: lock.plan["prediction"].get(name) for name in PROVEN}
        return ReusedPlan(replace(plan, prediction=replace(plan.prediction, **stated)))
    moved = moved_figures(lock.plan, plan.to_json())
    reasons = [*([f"{versions} moves {', '.join(moved)}"] if moved else []), *([other] if other else [])]
    return ReusedPlan(plan, "; ".join(reasons) or None)


def report_moved_figures(reused: ReusedPlan, loaded: LoadedProfile, sink: Sink) -> None:
    """Warn that a locked plan holds, but with other figures than those that it was made with."""
    if reused.moved is not None:
        sink.warning(
            "figures-moved",
            f"the lock's plan holds, with other figures than it was made with: {reused.moved}",
            whole_file(str(loaded.path)),
            help="compile again where the new figures are wanted in the lock",
        )


def disproofs(lock: Lock, plan: Plan) -> tuple[str, ...]:
    """Return the differences between a lock and a new plan from the same inputs, as phrases."""
    phrases = []
    for part in ("device_map", "compute", "offload_buffers", "offloaded_caches"):
        now = plan.to_json().get(part)
        for route, before, after in _differences(lock.plan.get(part, now), now, f"plan.{part}"):
            phrases.append(f"`{route}` is {_written(before)}, and placing anew gives {_written(after)}")
    for name in PROVEN:
        before, after = lock.plan["prediction"].get(name), getattr(plan.prediction, name)
        if before != after:
            what = "is what is proven" if name == BOUND else "is what placing anew gives"
            phrases.append(f"`plan.prediction.{name}` is {_written(before)}, and {_written(after)} {what}")
    return tuple(phrases)


def _is_measured_otherwise(lock: Lock, inputs: InputDigests, variables: Mapping[str, str]) -> bool:
    """Return whether the measurement is the only input that changed.

    In a lock of an early version, one digest covers measurement and module tree, and must be the only one that changed.
    """
    changed = {name for name, value in inputs.to_json().items() if lock.inputs.get(name, value) != value}
    return changed == {"graph" if lock.is_early else "measurement"} and dict(lock.variables) == dict(variables)


def _comparable(inputs: InputDigests, lock: Lock, graph: ModelGraph) -> InputDigests:
    """Return the present inputs reduced to those that the lock has digests of."""
    locked = lock.inputs.get("checkpoint")
    if locked is None or inputs.checkpoint is None:
        inputs = replace(inputs, checkpoint=locked)
    return replace(inputs, graph=early_graph_digest(graph), measurement=None) if lock.is_early else inputs


def _derived(lock: Lock, prepared: Prepared) -> Plan:
    """Return the plan that follows from the decisions of a lock: its assignments and executor.

    Raises:
        LockError: if a decision is impossible.
    """
    if prepared.is_for_vllm:
        from devmap_config.plan.pipelines import derive_pipeline  # imports numpy

        return derive_pipeline(lock, prepared)
    graph, executors = prepared.graph, executors_for(prepared)
    units = locked_units(lock, graph, prepared.inventory)
    executor = next((executor for executor in executors if executor.name == lock.plan["executor"]), executors[0])
    executor = replace(executor, offload_buffers=lock.plan.get("offload_buffers", executor.offload_buffers))
    if executor not in executors:
        raise LockError(f"`offload_buffers` is {_written(executor.offload_buffers)}, which its profile rules out")
    executor = replace(executor, offloaded_caches=locked_caches(lock, graph))
    plan = assemble(
        graph, units, prepared.capacities, strategy=prepared.strategy, executor=executor, draft=prepared.draft
    )
    for assigned in plan.assignments:
        stored_on, runs_on = assigned.location.stored_on, assigned.location.runs_on
        if not plan.executor.can_run(assigned.location, plan.main_device):
            raise LockError(f"it runs `{assigned.unit}` on {runs_on}, which is stored on {stored_on}")
    if uncovered := [violation.message for violation in coverage(plan, graph)]:
        raise LockError(uncovered[0])
    return replace(plan, prediction=predict(plan, graph, prepared.inventory))


def _other_stages(plan: Plan, prepared: Prepared) -> str | None:
    """Return how the stages differ from those that the strategy chooses, since no bound shows how good they are."""
    from devmap_config.plan.pipelines import other_stages  # imports numpy

    return other_stages(plan, prepared)


def _drift(broken: list[str], versions: str, moved: tuple[str, ...] = ()) -> Drift:
    if not versions:
        return Drift("broken-lock", tuple(broken))
    what = f" moves {', '.join(moved)}" if moved else ""
    return Drift("stale-lock", (f"{versions}{what}: {broken[0]}",))


def _contradictions(
    lock: Lock, plan: Plan, hardware: Mapping[str, Any], inputs: InputDigests, *, follows_measurement: bool
) -> Iterator[str]:
    """Yield a phrase for each statement of a lock that does not follow from its decisions and its inputs."""
    if lock.plan["main_device"] != str(plan.main_device):
        yield f"its main device is {plan.main_device}, and it says {lock.plan['main_device']}"
    derived = plan.to_json()
    if lock.is_early:
        derived = {key: part for key, part in derived.items() if key in lock.plan}
    skipped = {*PROVEN, *(() if follows_measurement else FOLLOW_FROM_MEASUREMENT)}
    if "loading_ram_bytes" not in lock.plan:
        skipped |= LOADING
    for index, (use, now) in enumerate(zip(lock.plan["devices"], derived["devices"], strict=False)):
        for difference in _differences(use, now, f"plan.devices[{index}]"):
            if difference[0].rpartition(".")[2] not in skipped:
                yield f"what it says {now['id']} holds is not what it puts there: {_contradiction(*difference)}"
    for difference in _differences(_without_figures(lock.plan), _without_figures(derived), "plan"):
        if difference[0].rpartition(".")[2] not in skipped:
            yield _contradiction(*difference)
    if lock.hardware or not lock.is_early:
        for difference in _differences(lock.hardware, hardware, "hardware"):
            yield _contradiction(*difference)
    if lock.values or not lock.is_early:
        for difference in _differences(lock.values, inputs.values, "values"):
            yield _contradiction(*difference)


def _without_figures(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan with the names of its devices in place of their figures."""
    return {**plan, "devices": [use["id"] for use in plan["devices"]]}


def _bad_bounds(lock: Lock, prepared: Prepared) -> Iterator[str]:
    """Yield implausible facts about the bound: it exists without a time, or is above the plan's own."""
    decode, bound = lock.plan["prediction"]["decode_nanoseconds_per_token"], lock.plan["prediction"][BOUND]
    is_due = prepared.proves_bound and decode is not None
    if is_due != (bound is not None):
        proven = "one" if is_due else "none"
        yield f"`plan.prediction.{BOUND}` is {_written(bound)}, and `{prepared.strategy}` proves {proven}"
    elif bound is not None and not 0 < bound <= decode:
        yield f"`plan.prediction.{BOUND}` is {_written(bound)}, and the plan takes {_written(decode)}"


def _bad_fastest(lock: Lock, prepared: Prepared) -> Iterator[str]:
    """Yield implausible facts about the fastest plan's times: not part of the objective, below the bound, or no
    shorter.
    """
    prediction = lock.plan["prediction"]
    stated = {phase: prediction[name] for phase, name in FASTEST.items() if name in prediction}
    least = {phase: (prediction[BOUND] if phase == "decode" else None) or 1 for phase in stated}
    is_shorter = any(nanoseconds < (prediction[OWN[phase]] or 0) for phase, nanoseconds in stated.items())
    for phase, nanoseconds in stated.items():
        place = f"`plan.prediction.{FASTEST[phase]}` is {_written(nanoseconds)}"
        if prepared.strategy != "fastest":
            yield f"{place}, and `{prepared.strategy}` looks for none"
        elif nanoseconds < least[phase]:
            yield f"{place}, and the bound is {_written(least[phase])}"
        elif not is_shorter:
            yield f"{place}, and the plan takes {_written(prediction[OWN[phase]])}"


def _contradiction(route: str, stated: object, follows: object) -> str:
    if follows is _NOTHING:
        return f"`{route}` is {_written(stated)}, and nothing of that name follows from its inputs"
    if stated is _NOTHING:
        return f"`{route}` is missing, and {_written(follows)} follows from its inputs"
    return f"`{route}` is {_written(stated)}, and {_written(follows)} follows from its inputs"


_NOTHING = object()


def _differences(before: object, after: object, route: str) -> Iterator[tuple[str, object, object]]:
    """Yield each scalar that differs in value or type between two pieces of plain data, with its route."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(key, _NOTHING), after.get(key, _NOTHING), f"{route}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (item, now) in enumerate(zip(before, after, strict=True)):
            yield from _differences(item, now, f"{route}[{index}]")
    elif before is _NOTHING or after is _NOTHING or json.dumps(before) != json.dumps(after):
        yield route, before, after


def _written(value: object) -> str:
    if value is _NOTHING:
        return "nothing"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
