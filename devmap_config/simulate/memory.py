"""Caches dry runs: the same plan of the same model is tried only once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from devmap_config.graph.cache import LIBRARIES, code_digest, default_directory, keep, kept, library_versions
from devmap_config.graph.digest import digest
from devmap_config.graph.failures import failure_of
from devmap_config.graph.loading import buildable_attention
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.simulate.simulation import Simulation, Verdict
from devmap_config.stages import begin

if TYPE_CHECKING:
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.plan import Plan

SCHEMA = "devmap-dry-run/4"
"""Changes whenever the result of a dry run may change."""


def verdict_on(plan: Plan, model: LoadedModel, *, trust_remote_code: bool = False) -> Verdict | None:
    """Return the verdict on a plan, from the cache or by a dry run; `None` if torch is needed but not installed."""
    with suppress(KeyError, ValueError):  # no verdict is beside the profile, or one of another version
        verdict = Verdict.from_json(model.dry_runs[plan_digest(plan)])
        if {device.id for device in verdict.devices} <= {use.id for use in plan.devices}:
            return verdict
    path = default_directory().parent / "dry-runs" / f"{_key(plan, model)}.json"
    # Code that comes with a model may change while its config stays the same.
    if not trust_remote_code and (value := kept(path)) is not None:
        return Verdict.from_json(value)
    if not can_simulate():
        return None
    verdict = Verdict.of(simulation_of(plan, model, trust_remote_code=trust_remote_code))
    if not trust_remote_code and verdict.cause == "model":
        keep(path, verdict.to_json())
    return verdict


def can_simulate() -> bool:
    """Return whether the libraries for a dry run are installed."""
    return all(find_spec(library) is not None for library in LIBRARIES)


def simulation_of(
    plan: Plan, model: LoadedModel, *, decoded_tokens: int = 1, trust_remote_code: bool = False
) -> Simulation:
    """Build the plan's model without data, and dry-run it. Imports torch."""
    from devmap_config.graph.introspection import UnbuildableModelError, meta_model
    from devmap_config.libraries.remote_code import code_of_models

    begin("rehearse", f"running {model.class_name} on simulated devices")
    try:
        from devmap_config.simulate.dry_run import dry_run
    except LibraryChangedError as error:  # a library lacks something that every dry run needs
        failure = failure_of(error)
        return Simulation(outcome="unsimulated", reason=failure.reason, cause=failure.cause)
    try:
        with model.source.as_config() as config_path:
            built = meta_model(
                config_path,
                class_name=model.class_name,
                dtype=model.dtype,
                attention=buildable_attention(model.attention),
                trust_remote_code=trust_remote_code,
                repository=model.source.repository,
                adapter=None if model.adapter is None else model.adapter.config,
            )
    except UnbuildableModelError as error:
        return Simulation(outcome="unsimulated", reason=str(error))
    with code_of_models(allowed=trust_remote_code):
        return dry_run(built, model.graph, plan, decoded_tokens=decoded_tokens)


def plan_digest(plan: Plan) -> str:
    """Return the digest of everything besides the model on which a plan's dry run depends."""
    executor = asdict(plan.executor)
    if executor["offloaded_caches"] is None:
        del executor["offloaded_caches"]  # so that verdicts from before this field existed still hold
    return digest(
        {
            "assignments": [
                [assignment.unit, str(assignment.location.stored_on), str(assignment.location.runs_on)]
                for assignment in plan.assignments
            ],
            "devices": [str(use.id) for use in plan.devices],
            "executor": executor,
            "main_device": str(plan.main_device),
        }
    )


def _key(plan: Plan, model: LoadedModel) -> str:
    measurement = model.graph.measurement
    key: dict[str, Any] = {
        "schema": SCHEMA,
        "config": model.source.config_digest,
        "class": model.class_name,
        "dtype": model.dtype,
        "attention": model.attention,
        "quantization": None if model.quantization is None else model.quantization.to_json(),
        "workload": None if measurement is None else asdict(measurement.workload),
        "adapter": None if model.adapter is None else model.adapter.config.digest,
        "plan": plan_digest(plan),
        "libraries": library_versions(),
        "code": code_digest("dispatch", "graph", "libraries", "quantization", "simulate"),
    }
    return digest(key).removeprefix("sha256:")
