"""Whether a lock still is what its profile asks for, and if not, why: what changed, or what its plan breaks.

A lock decides where everything is stored and runs, and states a bound that took long to prove. All else that it says
follows from these and from its inputs, and is derived again and compared. The bound is held to what it cannot exceed;
`check --prove` proves it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.placement.executors import executors_for
from devmap_config.plan.changes import changed_inputs, changed_versions
from devmap_config.plan.inputs import early_graph_digest
from devmap_config.plan.lock import LockError, locked_units
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
"""What a lock says of other plans than its own."""

DriftCode = Literal["stale-lock", "broken-lock", "unproven-lock"]


@dataclass(frozen=True)
class Drift:
    """Why a lock does not hold any more.

    `stale-lock` is one of inputs that changed, `broken-lock` one that says what does not follow from its inputs, and
    `unproven-lock` one whose plan is not what its strategy makes. `reasons` are phrases; there is at least one.
    """

    code: DriftCode
    reasons: tuple[str, ...]

    @property
    def message(self) -> str:
        """What is wrong, as the predicate of the lock's name."""
        if self.code == "stale-lock":
            return f"is stale: {'; '.join(self.reasons)}"
        more = f", and {len(self.reasons) - 1} more" if len(self.reasons) > 1 else ""
        return f"is {'wrong' if self.code == 'broken-lock' else 'not proven'}: {self.reasons[0]}{more}"


@dataclass(frozen=True)
class Held:
    """A locked plan that holds, with all that follows from it derived anew.

    `moved` says, where other versions of the libraries measure otherwise than when the lock was made, which and what.
    """

    plan: Plan
    moved: str | None = None


def remedy(code: str, profile: Path) -> str:
    """What to do about a lock that is missing, cannot be read or does not hold."""
    return "upgrade devmap-config" if code == "newer-lock" else f"run `devmap compile {profile}` and commit the lock"


def reuse_locked_plan(lock: Lock, prepared: Prepared, inputs: InputDigests) -> Held | Drift:
    """Return the plan of a lock where it holds, derived and verified as one that was just made; else why it does not.

    Nothing is placed for this. Where nothing but what was measured has changed, and the libraries that measure are of
    other versions than those that made the lock, its plan is held to the new figures.

    Args:
        lock: a lock of the profile; an early one says less.
        prepared: the profile.
        inputs: the inputs of now.
    """
    inputs = _comparable(inputs, lock, prepared.graph)
    variables = prepared.loaded.overrides
    versions = changed_versions(lock) if _is_measured_otherwise(lock, inputs, variables) else ""
    if not versions and (changed := changed_inputs(lock, inputs, variables)):
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
    if not versions:
        stated = {name: lock.plan["prediction"].get(name) for name in PROVEN}
        return Held(replace(plan, prediction=replace(plan.prediction, **stated)))
    moved = moved_figures(lock.plan, plan.to_json())
    return Held(plan, f"{versions} moves {', '.join(moved)}" if moved else None)


def report_moved_figures(held: Held, loaded: LoadedProfile, sink: Sink) -> None:
    """Warn where a locked plan holds by other figures than it was made with."""
    if held.moved is not None:
        sink.warning(
            "figures-moved",
            f"the lock's plan holds, by other figures than it was made with: {held.moved}",
            whole_file(str(loaded.path)),
            help="compile again where the new figures are wanted in the lock",
        )


def disproofs(lock: Lock, plan: Plan) -> tuple[str, ...]:
    """Return what a plan that was just made does not have in common with the lock that promises it."""
    found = []
    for part in ("device_map", "compute", "offload_buffers"):
        now = plan.to_json()[part]
        for route, before, after in _differences(lock.plan.get(part, now), now, f"plan.{part}"):
            found.append(f"`{route}` is {_shown(before)}, and placing anew gives {_shown(after)}")
    for name in PROVEN:
        before, after = lock.plan["prediction"].get(name), getattr(plan.prediction, name)
        if before != after:
            what = "is what is proven" if name == BOUND else "is what placing anew gives"
            found.append(f"`plan.prediction.{name}` is {_shown(before)}, and {_shown(after)} {what}")
    return tuple(found)


def _is_measured_otherwise(lock: Lock, inputs: InputDigests, variables: Mapping[str, str]) -> bool:
    """Return whether nothing has changed but what was measured.

    An early lock has one digest for that and the module tree: nothing else has changed then.
    """
    changed = {name for name, value in inputs.to_json().items() if lock.inputs.get(name, value) != value}
    return changed == {"graph" if lock.is_early else "measurement"} and dict(lock.variables) == dict(variables)


def _comparable(inputs: InputDigests, lock: Lock, graph: ModelGraph) -> InputDigests:
    """The inputs of now as far as a lock has them: early ones know no measurement, nor what was not at hand."""
    locked = lock.inputs.get("checkpoint")
    if locked is None or inputs.checkpoint is None:
        inputs = replace(inputs, checkpoint=locked)
    return replace(inputs, graph=early_graph_digest(graph), measurement=None) if lock.is_early else inputs


def _derived(lock: Lock, prepared: Prepared) -> Plan:
    """Return the plan that follows from what a lock decides: the assignments, and what runs them.

    Raises:
        LockError: where it decides what cannot be.
    """
    if prepared.is_for_vllm:
        from devmap_config.plan.pipelines import derive_pipeline  # with it comes numpy

        return derive_pipeline(lock, prepared)
    graph, executors = prepared.graph, executors_for(prepared)
    units = locked_units(lock, graph, prepared.inventory)
    executor = next((each for each in executors if each.name == lock.plan["executor"]), executors[0])
    executor = replace(executor, offload_buffers=lock.plan.get("offload_buffers", executor.offload_buffers))
    if executor not in executors:
        raise LockError(f"`offload_buffers` is {_shown(executor.offload_buffers)}, which its profile rules out")
    plan = assemble(
        graph, units, prepared.capacities, strategy=prepared.strategy, executor=executor, draft=prepared.draft
    )
    for each in plan.assignments:
        stored_on, runs_on = each.location.stored_on, each.location.runs_on
        if not plan.executor.can_run(each.location, plan.main_device):
            raise LockError(f"it runs `{each.unit}` on {runs_on}, which is stored on {stored_on}")
    if uncovered := [violation.message for violation in coverage(plan, graph)]:
        raise LockError(uncovered[0])
    return replace(plan, prediction=predict(plan, graph, prepared.inventory))


def _drift(broken: list[str], versions: str, moved: tuple[str, ...] = ()) -> Drift:
    if not versions:
        return Drift("broken-lock", tuple(broken))
    what = f" moves {', '.join(moved)}" if moved else ""
    return Drift("stale-lock", (f"{versions}{what}: {broken[0]}",))


def _contradictions(
    lock: Lock, plan: Plan, hardware: Mapping[str, Any], inputs: InputDigests, *, follows_measurement: bool
) -> Iterator[str]:
    """Everything that a lock says and that does not follow from what it decides and from its inputs."""
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
    """A plan with the names of its devices in place of what they hold."""
    return {**plan, "devices": [use["id"] for use in plan["devices"]]}


def _bad_bounds(lock: Lock, prepared: Prepared) -> Iterator[str]:
    """What is wrong with a bound whatever is proven: it is one only where there is a time, and is not above that."""
    decode, bound = lock.plan["prediction"]["decode_nanoseconds_per_token"], lock.plan["prediction"][BOUND]
    is_due = prepared.proves_bound and decode is not None
    if is_due != (bound is not None):
        proven = "one" if is_due else "none"
        yield f"`plan.prediction.{BOUND}` is {_shown(bound)}, and `{prepared.strategy}` proves {proven}"
    elif bound is not None and not 0 < bound <= decode:
        yield f"`plan.prediction.{BOUND}` is {_shown(bound)}, and the plan takes {_shown(decode)}"


def _bad_fastest(lock: Lock, prepared: Prepared) -> Iterator[str]:
    """What is wrong with the times of the fastest plan: none is looked for, they are below the bound, or no shorter."""
    prediction = lock.plan["prediction"]
    stated = {phase: prediction[name] for phase, name in FASTEST.items() if name in prediction}
    least = {phase: (prediction[BOUND] if phase == "decode" else None) or 1 for phase in stated}
    is_shorter = any(nanoseconds < (prediction[OWN[phase]] or 0) for phase, nanoseconds in stated.items())
    for phase, nanoseconds in stated.items():
        place = f"`plan.prediction.{FASTEST[phase]}` is {_shown(nanoseconds)}"
        if prepared.strategy != "fastest":
            yield f"{place}, and `{prepared.strategy}` looks for none"
        elif nanoseconds < least[phase]:
            yield f"{place}, and no plan is below {_shown(least[phase])}"
        elif not is_shorter:
            yield f"{place}, and the plan takes {_shown(prediction[OWN[phase]])}"


def _contradiction(route: str, stated: object, follows: object) -> str:
    if follows is _NOTHING:
        return f"`{route}` is {_shown(stated)}, and nothing of that name follows from its inputs"
    if stated is _NOTHING:
        return f"`{route}` is missing, and {_shown(follows)} follows from its inputs"
    return f"`{route}` is {_shown(stated)}, and {_shown(follows)} follows from its inputs"


_NOTHING = object()


def _differences(before: object, after: object, route: str) -> Iterator[tuple[str, object, object]]:
    """Each scalar in which two pieces of plain data differ, a type included, by its route."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(key, _NOTHING), after.get(key, _NOTHING), f"{route}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (item, now) in enumerate(zip(before, after, strict=True)):
            yield from _differences(item, now, f"{route}[{index}]")
    elif before is _NOTHING or after is _NOTHING or json.dumps(before) != json.dumps(after):
        yield route, before, after


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
