"""The pipeline: a profile in, a verified plan out. Each stage is a function over immutable data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic, ProfileError, Sink
from devmap_config.graph.failures import failure_of
from devmap_config.graph.loading import load_model_graph, report_failure, source_from_here
from devmap_config.graph.model import TensorName
from devmap_config.hardware.inventory import build_inventory, declared_devices
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.versions import never_tried, untried
from devmap_config.placement.buffers import (
    are_to_be_compared,
    can_be_offloaded,
    executors_for,
    report_left_buffers,
)
from devmap_config.placement.compatibility import check_checkpoint, check_dtype, check_quantizer
from devmap_config.placement.constraints import keeping, problem_of, settle_aim, settle_single_device
from devmap_config.placement.shortage import report_shortages
from devmap_config.placement.strategies import Infeasible, place
from devmap_config.placement.units import fold, whole_model
from devmap_config.placement.ways_out import Change
from devmap_config.plan.comparison import best_of
from devmap_config.plan.drift import Asked, Drift, Held, disproofs, held
from devmap_config.plan.inputs import inputs_of
from devmap_config.plan.keeping import kept
from devmap_config.plan.lock import lock_beside, profile_of
from devmap_config.plan.plan import Plan, assemble
from devmap_config.plan.prediction import predict
from devmap_config.plan.review import review
from devmap_config.plan.verify import stranded_tensors
from devmap_config.profile.document import whole_file
from devmap_config.profile.loading import load_profile, on_other_hardware
from devmap_config.profile.schema import Device
from devmap_config.rules.resolution import resolve
from devmap_config.rules.rule import rules_of
from devmap_config.simulate.rehearsal import (
    UNMENDED,
    UNREPAIRED_STRATEGIES,
    Mending,
    Rehearsal,
    rehearse,
    tell_what_stays,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.graph.loading import LoadedModel
    from devmap_config.graph.source import Resolved
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.placement.executor import Executor
    from devmap_config.placement.problem import Aim, DeviceId, Problem
    from devmap_config.placement.strategies import Placed
    from devmap_config.plan.lock import Inputs, Lock
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.schema import Hardware
    from devmap_config.rules.resolution import Resolution
    from devmap_config.simulate.simulation import Verdict


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be compiled.

    `variables` are as `--set` gives them, `remembered` those that the lock holds, `resolved` is what the model's
    revision was resolved to before, and with `must_ask` only the hub may say what it resolves to. With `use_vendored` a
    graph that is kept beside the profile is used where it is still right.
    With `locked` the plan of this lock stands in for placing, where nothing that it was made from has changed and it
    holds; with `keep` the plan of this lock is preferred to a new one where it is as good. With `hardware` another
    machine than the profile's is asked, by `strategy` if the profile's is not one of ours. A new plan is dry-run where
    this `simulates`. The checkpoint, where one is at hand, is held to the model where this `checks_checkpoint`.
    With `allow_unmeasured` formulas stand in where a library that changed, or a mistake of ours, kept the model from
    being measured or the plan from being tried; else that is an error.
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
    simulates: bool = False
    checks_checkpoint: bool = False
    allow_unmeasured: bool = False

    @classmethod
    def for_profile(cls, path: Path, *, lock: Lock | None = None, must_ask: bool = False, **options: Any) -> Request:
        """Return the request for a profile with what its lock remembers: `--set` values, and the model's commit.

        Args:
            path: the profile.
            lock: its lock, where that was read already; else the one beside it, if that can be read.
            must_ask: whether the hub is to say what the model's commit is, and not the lock.
            options: further fields of the request; `variables` outrank those of the lock.
        """
        lock = lock or lock_beside(path)
        remembered = {} if lock is None else dict(lock.variables)
        resolved = None if lock is None or must_ask else lock.resolved
        return cls(path=path, remembered=remembered, resolved=resolved, must_ask=must_ask, **options)


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What a compilation gave: all that was found, in which texts, and what the stages that were reached made.

    `drift` is why the lock that it was to be read from does not hold; `plan` then is a new one. `verdicts`
    are those on the plans that were dry-run, by the plans' digests; `refused` is a plan that does not run.
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
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    refused: Plan | None = None

    @property
    def has_errors(self) -> bool:
        """Whether the profile is wrong or cannot be satisfied."""
        return any(diagnostic.severity == "error" for diagnostic in self.diagnostics)


def compile_profile(
    path: str | Path,
    *,
    variables: Mapping[str, object] | None = None,
    allow_outside: bool = False,
    trust_remote_code: bool = False,
    allow_unmeasured: bool = False,
) -> Plan:
    """Return the plan of a profile; nothing is written.

    Args:
        path: the profile's file, or its lock.
        variables: values for its templates, as `--set` gives them; else those that its lock holds.
        allow_outside: whether paths of the profile may lead out of its repository.
        trust_remote_code: whether Python code that comes with the model may run.
        allow_unmeasured: whether formulas may stand in where a library that changed keeps it from being measured.

    Returns:
        The plan, dry-run where that can be done here; its `diagnostics` are what is to be warned of.

    Raises:
        ProfileError: where the profile is missing, is wrong or cannot be satisfied; it carries every diagnostic.
        DevmapError, TypeError: where the name of a variable is not text.

    Example:
        >>> plan = compile_profile("profiles/quickstart.yaml")
        >>> plan.device_map["lm_head"], plan.device_map["model.norm"]
        ('cpu', 'disk')
        >>> plan.prediction.streamed_bytes_per_token > 0
        True
    """
    texts = texts_of(variables)
    compilation = run_pipeline(
        Request.for_profile(
            profile_of(Path(path)),
            variables=texts,
            allow_outside=allow_outside,
            trust_remote_code=trust_remote_code,
            simulates=True,
            checks_checkpoint=True,
            allow_unmeasured=allow_unmeasured,
        )
    )
    if compilation.plan is None:
        raise ProfileError(compilation.diagnostics, compilation.texts)
    return replace(compilation.plan, diagnostics=compilation.diagnostics)


class VariableNameError(DevmapError, TypeError):
    """The name of a variable is not text."""

    def __init__(self, name: object) -> None:
        message, help = f"the names of variables are text, and {name!r} is none", f'write it as text: "{name}"'
        finding = Diagnostic.error("unknown-variable", message, help=help)
        super().__init__(f"{message}: {help}", (finding,))


def texts_of(variables: Mapping[str, object] | None) -> dict[str, str]:
    """Return the values of variables as `--set` gives them.

    Raises:
        VariableNameError: where a name is not text.
    """
    for name in variables or {}:
        if not isinstance(name, str):
            raise VariableNameError(name)
    return {name: str(value) for name, value in (variables or {}).items()}


def run_pipeline(request: Request) -> Compilation:
    """Every stage in turn; one that cannot go on leaves its reasons in the sink, and the others say what they can."""
    sink = Sink()
    try:
        return _run_stages(request, sink)
    except LibraryChangedError as error:  # of which no stage could say what comes of it
        place = whole_file(str(request.path))
        report_failure(failure_of(error), "the profile cannot be compiled", place, sink, allowed=None)
        return Compilation(diagnostics=sink.diagnostics, texts=sink.texts)


def _run_stages(request: Request, sink: Sink) -> Compilation:
    loaded = load_profile(
        request.path,
        sink,
        overrides=request.variables,
        remembered=request.remembered,
        allow_outside=request.allow_outside,
    )
    if loaded is None:
        return Compilation(diagnostics=sink.diagnostics, texts=sink.texts)
    for library in untried():
        sink.warning("untried-version", never_tried(library))
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
        allow_unmeasured=request.allow_unmeasured,
    )
    if model is None:
        return Compilation(diagnostics=sink.diagnostics, texts=sink.texts, loaded=loaded, inventory=inventory)

    check_dtype(loaded, inventory, model, sink)
    resolution = resolve(rules, model.graph, source_from_here(loaded), sink)
    if request.checks_checkpoint:
        model = check_checkpoint(
            loaded,
            model,
            resolution,
            sink,
            trust_remote_code=request.trust_remote_code,
            allow_unmeasured=request.allow_unmeasured,
        )
    placing = _Placing(request, loaded, inventory, model, resolution, sink)
    reached = Compilation(
        diagnostics=(), texts=sink.texts, loaded=loaded, inventory=inventory, model=model, resolution=resolution
    )
    if placing.posed() is None:
        return replace(reached, diagnostics=sink.diagnostics)

    inputs, drift = inputs_of(loaded, model, inventory), None
    rehearsal: Rehearsal | None = None
    if request.locked is not None:
        locked = placing.held(request.locked, inputs)
        if isinstance(locked, Drift):
            drift = locked
        else:
            rehearsal = Rehearsal(placing.accepted(locked.plan))
            _tell_what_moved(locked, loaded, sink)
    if rehearsal is None:
        rehearsal = Rehearsal(placing.planned())
        if rehearsal.plan is not None and request.simulates:
            rehearsal = rehearse(
                rehearsal.plan,
                model,
                loaded,
                resolution,
                placing.planned,
                sink,
                trust_remote_code=request.trust_remote_code,
                allow_unmeasured=request.allow_unmeasured,
            )
    if (shown := rehearsal.plan or rehearsal.refused) is not None:
        for finding in placing.findings(shown):
            sink.report(finding)
    return replace(
        reached,
        diagnostics=sink.diagnostics,
        plan=rehearsal.plan,
        inputs=inputs,
        drift=drift,
        verdicts=rehearsal.verdicts,
        refused=rehearsal.refused,
    )


def _tell_what_moved(locked: Held, loaded: LoadedProfile, sink: Sink) -> None:
    if locked.moved is not None:
        sink.warning(
            "figures-moved",
            f"the lock's plan holds, by other figures than it was made with: {locked.moved}",
            whole_file(str(loaded.path)),
            help="compile again where the new figures are wanted in the lock",
        )


def compile_locked(path: Path, lock: Lock | None, **options: Any) -> Compilation:
    """Hold a lock to its profile: the plan is the lock's, or `drift` says why not and the plan is a new one.

    Args:
        path: the profile.
        lock: its lock; without one, the plan is a new one.
        options: further fields of the request.
    """
    request = Request.for_profile(path, lock=lock, locked=lock, **options)
    compilation = run_pipeline(request)
    if compilation.plan is not None or not request.remembered:
        return compilation
    without = run_pipeline(replace(request, locked=None, remembered={}))
    if without.plan is None:
        return compilation
    values = ", ".join(f"{name}={value}" for name, value in request.remembered.items())
    reason = next(each.message for each in compilation.diagnostics if each.severity == "error")
    return replace(without, drift=Drift("broken-lock", (f"its `--set` values ({values}) do not fit: {reason}",)))


def prove(request: Request, lock: Lock) -> Drift | None:
    """Place anew what a lock holds, and return what of its plan or bound that does not prove; `None` where it does.

    A plan that is as good as the new one, and nearer to the lock, is its plan: `--keep` makes such locks.
    """
    unproven: tuple[str, ...] = ()
    for simulates in (False, True):
        plan = run_pipeline(replace(request, locked=None, keep=lock, simulates=simulates)).plan
        if plan is None:
            return Drift("unproven-lock", ("placing anew gives no plan",))
        unproven = disproofs(lock, plan)
        if (plan.placement, plan.compute) == (lock.plan["device_map"], lock.plan["compute"]):
            break  # else the dry run may have mended it, which takes longer to see
    return Drift("unproven-lock", unproven) if unproven else None


@dataclass(frozen=True)
class _Placing:
    """The stages that make a plan of what those before gave; a dry run may ask for another plan."""

    request: Request
    loaded: LoadedProfile
    inventory: Inventory
    model: LoadedModel
    resolution: Resolution
    sink: Sink
    kept: dict[Executor, dict[TensorName, DeviceId]] = field(default_factory=dict)
    """What is kept where it is used, by what runs the plan."""

    @cached_property
    def executors(self) -> tuple[Executor, ...]:
        """What may run the plan; the first with which it fits is to."""
        return executors_for(self.loaded, self.model, self.inventory.capacities)

    def posed(self, mending: Mending = UNMENDED) -> tuple[Problem, DeviceId | None, Aim | None] | None:
        """The problem, with what the strategy is told besides; `None` where something is wrong with it."""
        problem = problem_of(
            self.model,
            self.inventory,
            self.resolution,
            self.sink,
            together=mending.together,
            executor=self.executors[0],
        )
        problem = keeping(replace(problem, capacities=mending.room(problem.capacities)), mending.kept)
        single_device = settle_single_device(self.loaded, problem, self.sink)
        if self.sink.has_errors:
            return None
        aim = settle_aim(self.loaded, self.inventory, problem, self.sink)
        return None if self.sink.has_errors else (problem, single_device, aim)

    def planned(self, mending: Mending = UNMENDED) -> Plan | None:
        """A verified plan that is mended so; `None` where there is none, and why is in the sink."""
        if (posed := self.posed(mending)) is None:
            return None
        problem, single_device, aim = posed
        tries = self.tries(problem, single_device, aim)
        plans = [each for each in tries if isinstance(each, Plan)]
        if not plans:
            # Of all tries, the last needs the least room.
            self.report_failure(tries[-1], replace(problem, executor=self.executors[-1]), aim, mending)
            return None
        plan = best_of(plans, aim)
        if found := self.kept.get(plan.executor):
            tell_what_stays(found, plan, self.loaded, self.sink)
        if self.request.keep is not None:
            plan = kept(plan, self.request.keep, self.model.graph, self.inventory, self.resolution)
        return self.accepted(plan)

    def tries(
        self, problem: Problem, single_device: DeviceId | None, aim: Aim | None
    ) -> list[Plan | Infeasible | tuple[Diagnostic, ...]]:
        """What trying gave with each of what may run the plan, up to the first that fits unless more may be better."""
        found: list[Plan | Infeasible | tuple[Diagnostic, ...]] = []
        for executor in self.executors:
            found.append(self.tried(replace(problem, executor=executor), single_device, aim))
            if isinstance(found[-1], Plan) and not are_to_be_compared(self.loaded, self.model.graph):
                break
        return found

    def stranded(self, plan: Plan, problem: Problem) -> dict[TensorName, DeviceId]:
        """The tensors that this plan, and no rule, leaves where they are of no use, and where to keep them."""
        names = [TensorName(name) for name in stranded_tensors(plan, self.model.graph)]
        return {name: plan.main_device for name in names if name not in problem.pinned}

    def tried(
        self, problem: Problem, single_device: DeviceId | None, aim: Aim | None
    ) -> Plan | Infeasible | tuple[Diagnostic, ...]:
        """The plan of a problem; else why nothing can be placed, or what is wrong with the plan."""
        placed = place(problem, self.loaded.profile.placement.strategy, single_device=single_device, aim=aim)
        if isinstance(placed, Infeasible):
            return placed
        plan = self.finished(placed, problem.executor)
        if stranded := self.stranded(plan, problem):
            self.kept[problem.executor] = self.kept.get(problem.executor, {}) | stranded
            return self.tried(keeping(problem, stranded), single_device, aim)
        found = self.findings(plan)
        if not any(each.severity == "error" for each in found):
            return plan
        # What loading takes besides is not for the strategy to fill: so much less than the plan takes there.
        room = dict(problem.capacities)
        for use in plan.devices:
            missing_bytes = use.loading_bytes - use.capacity_bytes
            if use.id in room and use.id != "disk" and missing_bytes > 0:
                room[use.id] = min(room[use.id], use.capacity_bytes - use.free_bytes) - missing_bytes
        if self.is_placed_here and room != problem.capacities and min(room.values()) >= 0:
            again = self.tried(replace(problem, capacities=room), single_device, aim)
            return again if isinstance(again, Plan) else found
        return found

    @property
    def is_placed_here(self) -> bool:
        """Whether the strategy decides where anything is."""
        return self.loaded.profile.placement.strategy not in UNREPAIRED_STRATEGIES

    def report_failure(
        self,
        failure: Plan | Infeasible | tuple[Diagnostic, ...],
        problem: Problem,
        aim: Aim | None,
        mending: Mending,
    ) -> None:
        """Say why there is no plan; where the profile wants buffers left and that is all, say so."""
        loaded, trials = self.loaded, _Trials(self, mending)
        is_left = loaded.profile.placement.offload.buffers is False
        if is_left and can_be_offloaded(problem.graph, problem.capacities):
            infeasible = failure if isinstance(failure, Infeasible) else None
            for strategy in (None, ANY_FIT):
                if strategy is not None and trials.compiles(Change(strategy=strategy)):
                    break  # then the buffers are not what is in the way
                if trials.compiles(Change(strategy=strategy, offload_buffers=True)):
                    report_left_buffers(infeasible, strategy, loaded, self.sink)
                    return
        if isinstance(failure, Infeasible):
            report_shortages(failure, problem, self.resolution, self.model, loaded, self.sink, trials=trials, aim=aim)
        elif not isinstance(failure, Plan):
            for each in failure:
                self.sink.report(each)

    def finished(self, placed: Placed, executor: Executor) -> Plan:
        """What was placed as a plan: in units, with what each device holds and what running it takes."""
        graph, strategy = self.model.graph, self.loaded.profile.placement.strategy
        homes = {
            name: (device, placed.compute.get(name) or self.resolution.compute_of(name))
            for name, device in placed.placement.items()
        }
        units = whole_model(graph, homes) if strategy == "single" else fold(graph, homes)
        plan = assemble(graph, units, self.inventory.capacities, strategy=strategy, executor=executor)
        bound = placed.bound_nanoseconds if self.loaded.profile.workload.optimize == "decode" else None
        return replace(plan, prediction=predict(plan, graph, self.inventory, bound_decode_nanoseconds=bound))

    def accepted(self, plan: Plan) -> Plan | None:
        """The plan, where it verifies; else what is wrong with it is in the sink."""
        found = self.findings(plan)
        if not any(each.severity == "error" for each in found):
            return plan
        for each in found:
            self.sink.report(each)
        return None

    def findings(self, plan: Plan) -> tuple[Diagnostic, ...]:
        """What is found of a plan; where it is mended, what was found of the one before is of no interest."""
        found = Sink()
        check_quantizer(plan.placement, self.loaded, self.model, found)
        review(plan, self.model.graph, self.inventory.capacities, self.resolution, self.loaded, found)
        return found.diagnostics

    def held(self, lock: Lock, inputs: Inputs) -> Held | Drift:
        """The plan of a lock, where nothing that it was made from has changed and it holds; else what does not."""
        strategy = self.loaded.profile.placement.strategy
        asked = Asked(
            inputs=inputs,
            variables=self.loaded.overrides,
            strategy=strategy,
            proves_bound=strategy == "fastest" and self.loaded.profile.workload.optimize == "decode",
            graph=self.model.graph,
            inventory=self.inventory,
            resolution=self.resolution,
            executors=self.executors,
        )
        return held(lock, asked)

    def changed(self, change: Change, *, measures: bool) -> _Placing | None:
        """The same of a profile that says this otherwise, as compiling it would have it; `None` where that is wrong.

        Unless it `measures`, another context is reckoned from the measurement at hand.
        """
        loaded, sink = _with(self.loaded, change), Sink()
        model: LoadedModel | None = self.model
        if change.quantization is not None or (measures and change.is_of_model):
            try:
                model = load_model_graph(
                    loaded,
                    sink,
                    resolved=self.request.resolved,
                    trust_remote_code=self.request.trust_remote_code,
                    use_vendored=self.request.use_vendored,
                    allow_unmeasured=self.request.allow_unmeasured,
                )
            except LibraryChangedError:
                return None
        elif change.context_length is not None and (measurement := self.model.graph.measurement) is not None:
            graph = replace(self.model.graph, measurement=measurement.at(change.context_length))
            model = replace(self.model, graph=graph)
        if model is None:
            return None
        inventory = build_inventory(loaded, sink)
        check_dtype(loaded, inventory, model, sink)
        left_out = {rule.span for rule in change.without}
        rules = rules_of(loaded, declared_devices(loaded), inventory.kind, sink)
        resolution = resolve(
            tuple(rule for rule in rules if rule.span not in left_out), model.graph, source_from_here(loaded), sink
        )
        return None if sink.has_errors else _Placing(self.request, loaded, inventory, model, resolution, sink)


ANY_FIT = "fewest-devices"
"""The strategy that finds what fits without knowing how fast anything is."""


@dataclass(frozen=True)
class _Trials:
    """Tries changed profiles, as they would be compiled: up to the dry run."""

    placing: _Placing
    mending: Mending

    def fits(self, change: Change) -> bool:
        """Whether there is a plan, whatever it takes; the model is not measured anew."""
        placing = self.placing.changed(change, measures=False)
        posed = None if placing is None else placing.posed(self.mending)
        if placing is None or posed is None:
            return False
        problem, single_device, aim = posed
        if aim is not None:
            strategy = _with(placing.loaded, Change(strategy="fastest"))
            placing, aim = replace(placing, loaded=strategy), replace(aim, phases=())
        return _is_planned(placing.tries(problem, single_device, aim))

    def compiles(self, change: Change) -> bool:
        """Whether compiling the changed profile gives a plan."""
        placing = self.placing.changed(change, measures=True)
        posed = None if placing is None else placing.posed(self.mending)
        return placing is not None and posed is not None and _is_planned(placing.tries(*posed))


def _is_planned(tries: list[Plan | Infeasible | tuple[Diagnostic, ...]]) -> bool:
    return any(isinstance(each, Plan) for each in tries)


def _with(loaded: LoadedProfile, change: Change) -> LoadedProfile:
    """The profile as it is with this change."""
    profile = loaded.profile
    model, workload, hardware, placement = profile.model, profile.workload, profile.hardware, profile.placement
    if change.quantization is not None:
        model = model.model_copy(update={"quantization": change.quantization})
    if change.context_length is not None:
        workload = workload.model_copy(update={"context_length": change.context_length})
    devices = dict(hardware.devices)
    for name, description in change.devices.items():
        devices[name] = devices.get(name, Device()).model_copy(update=dict(description))
    offload = placement.offload
    if "disk" in change.devices and offload.folder is None:
        offload = offload.model_copy(update={"folder": "offload"})
    if change.offload_buffers is not None:
        offload = offload.model_copy(update={"buffers": change.offload_buffers})
    placement = placement.model_copy(update={"offload": offload, "strategy": change.strategy or placement.strategy})
    hardware = hardware.model_copy(update={"devices": devices})
    changed = {"model": model, "workload": workload, "hardware": hardware, "placement": placement}
    return replace(loaded, profile=profile.model_copy(update=changed))
