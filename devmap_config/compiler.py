"""The pipeline: a profile in, a verified plan out. Each stage is a function over immutable data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Diagnostic, ProfileError, Sink
from devmap_config.graph.loading import load_model_graph, source_from_here
from devmap_config.hardware.inventory import build_inventory, declared_devices
from devmap_config.placement.compatibility import check_dtype, check_quantizer
from devmap_config.placement.constraints import problem_of, settle_aim, settle_single_device
from devmap_config.placement.executor import Executor
from devmap_config.placement.shortage import report_shortages
from devmap_config.placement.strategies import Infeasible, place
from devmap_config.placement.units import fold, whole_model
from devmap_config.plan.drift import Drift, held
from devmap_config.plan.inputs import inputs_of
from devmap_config.plan.keeping import kept
from devmap_config.plan.plan import assemble
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import review
from devmap_config.profile.loading import load_profile, on_other_hardware
from devmap_config.rules.resolution import resolve
from devmap_config.rules.rule import rules_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.graph.loading import LoadedModel
    from devmap_config.graph.model import ModelGraph
    from devmap_config.graph.source import Resolved
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.strategies import Placed
    from devmap_config.plan.lock import Inputs, Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.schema import Hardware
    from devmap_config.rules.resolution import Resolution


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be compiled.

    `variables` are as `--set` gives them, `remembered` those that the lock holds, `resolved` is what the model's
    revision was resolved to before, and with `must_ask` only the hub may say what it resolves to. With `use_vendored` a
    graph that is kept beside the profile is used where it is still right.
    With `locked` the plan of this lock stands in for placing, where nothing that it was made from has changed and it
    holds; with `keep` the plan of this lock is preferred to a new one where it is as good. With `hardware` another
    machine than the profile's is asked, by `strategy` if the profile's is not one of ours.
    """

    path: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    remembered: Mapping[str, str] = field(default_factory=dict)
    resolved: Resolved | None = None
    must_ask: bool = False
    allow_outside: bool = False
    trust_remote_code: bool = False
    use_vendored: bool = True
    locked: Lock | None = None
    keep: Lock | None = None
    hardware: Hardware | None = None
    strategy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What a compilation gave: all that was found, in which texts, and what the stages that were reached made.

    `drift` is why the lock that it was to be read from does not hold; `plan` then is a new one.
    """

    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]
    loaded: LoadedProfile | None = None
    inventory: Inventory | None = None
    model: LoadedModel | None = None
    resolution: Resolution | None = None
    plan: Plan | None = None
    inputs: Inputs | None = None
    drift: Drift | None = None

    @property
    def has_errors(self) -> bool:
        """Whether the profile is wrong or cannot be satisfied."""
        return any(diagnostic.severity == "error" for diagnostic in self.diagnostics)


def compile_profile(path: str | Path, *, variables: Mapping[str, object] | None = None) -> Plan:
    """The plan of a profile.

    Args:
        path: the profile's file.
        variables: values for its templates, as `--set` gives them.

    Raises:
        ProfileError: where the profile is wrong or cannot be satisfied; it carries every diagnostic.
    """
    texts = {name: str(value) for name, value in (variables or {}).items()}
    compilation = run_pipeline(Request(path=Path(path), variables=texts))
    if compilation.plan is None:
        raise ProfileError(compilation.diagnostics, compilation.texts)
    return compilation.plan


def run_pipeline(request: Request) -> Compilation:
    """Every stage in turn; one that cannot go on leaves its reasons in the sink, and the others say what they can."""
    sink = Sink()
    loaded = load_profile(
        request.path,
        sink,
        overrides=request.variables,
        remembered=request.remembered,
        allow_outside=request.allow_outside,
    )
    if loaded is None:
        return Compilation(diagnostics=sink.diagnostics, texts=sink.texts)
    if request.hardware is not None:
        loaded = on_other_hardware(loaded, request.hardware, request.strategy)
    inventory = build_inventory(loaded, sink)
    rules = rules_of(loaded, declared_devices(loaded), inventory.kind, sink)
    model = load_model_graph(
        loaded,
        sink,
        resolved=request.resolved,
        must_ask=request.must_ask,
        trust_remote_code=request.trust_remote_code,
        use_vendored=request.use_vendored,
    )
    if model is None:
        return Compilation(diagnostics=sink.diagnostics, texts=sink.texts, loaded=loaded, inventory=inventory)

    graph, strategy = model.graph, loaded.profile.placement.strategy
    check_dtype(loaded, inventory, model, sink)
    resolution = resolve(rules, graph, source_from_here(loaded), sink)
    problem = problem_of(model, inventory, resolution, sink)
    single_device = settle_single_device(loaded, problem, sink)
    reached = Compilation(
        diagnostics=(), texts=sink.texts, loaded=loaded, inventory=inventory, model=model, resolution=resolution
    )
    if sink.has_errors:
        return replace(reached, diagnostics=sink.diagnostics)

    executor = Executor(offload_buffers=loaded.profile.placement.offload.buffers)
    aim = settle_aim(loaded, inventory, executor, sink)
    if sink.has_errors:
        return replace(reached, diagnostics=sink.diagnostics)
    inputs, drift = inputs_of(loaded, model, inventory), None
    plan: Plan | None = None
    if request.locked is not None:
        locked = held(request.locked, inputs, loaded.overrides, graph, inventory, resolution, executor)
        plan, drift = (None, locked) if isinstance(locked, Drift) else (locked, None)
    if plan is None:
        placed = place(problem, strategy, single_device=single_device, aim=aim)
        if isinstance(placed, Infeasible):
            report_shortages(placed, problem, resolution, loaded, strategy, sink, aim=aim)
            return replace(reached, diagnostics=sink.diagnostics)
        plan = _finished(placed, loaded, graph, inventory, resolution, executor)
        if request.keep is not None:
            plan = kept(plan, request.keep, graph, inventory, resolution)
    check_quantizer(plan.placement, loaded, model, sink)
    review(plan, graph, inventory.capacities, resolution, loaded, sink)
    return replace(
        reached,
        diagnostics=sink.diagnostics,
        plan=None if sink.has_errors else plan,
        inputs=inputs,
        drift=drift,
    )


def _finished(
    placed: Placed,
    loaded: LoadedProfile,
    graph: ModelGraph,
    inventory: Inventory,
    resolution: Resolution,
    executor: Executor,
) -> Plan:
    """What was placed as a plan: in units, with what each device holds and what running it takes."""
    strategy = loaded.profile.placement.strategy
    homes = {
        name: (device, placed.compute.get(name) or resolution.compute_of(name))
        for name, device in placed.placement.items()
    }
    units = whole_model(graph, homes) if strategy == "single" else fold(graph, homes)
    plan = assemble(graph, units, inventory.capacities, strategy=strategy, executor=executor)
    bound = placed.bound_nanoseconds if loaded.profile.workload.optimize == "decode" else None
    return replace(plan, prediction=predict(plan, graph, inventory, bound_decode_nanoseconds=bound))
