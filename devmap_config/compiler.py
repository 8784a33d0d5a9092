"""The pipeline: a profile in, a verified plan out. Each stage is a function over immutable data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from devmap_config.compatibility import (
    check_adapter,
    check_assistant,
    check_cache,
    check_checkpoint,
    check_compute_dtype,
    check_conversion,
    check_dtype,
    check_source_of_assistant,
)
from devmap_config.diagnostics.diagnostic import ProfileError, Sink, TooManyErrorsError
from devmap_config.diagnostics.overheard import passing_on
from devmap_config.graph.failures import failure_of
from devmap_config.graph.findings import report_failure
from devmap_config.graph.loading import Lookup, load_model_graph
from devmap_config.graph.source import source_from_here
from devmap_config.hardware.declared import build_inventory, declared_devices
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.versions import never_tried, untried
from devmap_config.pipeline.settings import check_settings
from devmap_config.placement.constraints import build_problem
from devmap_config.plan.drift import Drift, ReusedPlan, report_moved_figures, reuse_locked_plan
from devmap_config.plan.inputs import inputs_of
from devmap_config.plan.lock import lock_beside, profile_of
from devmap_config.plan.planner import Planner, accepted, draft_of
from devmap_config.plan.prediction import missing_figures, time_bases
from devmap_config.plan.process_memory import process_memory
from devmap_config.plan.review import review
from devmap_config.prepared import Prepared
from devmap_config.profile.document import whole_file
from devmap_config.profile.loading import for_engine, load_profile, of_assistant, on_other_hardware, with_workload
from devmap_config.profile.permissions import NO_PERMISSIONS, Permissions
from devmap_config.profile.variables import texts_of
from devmap_config.rules.resolution import resolve
from devmap_config.rules.rule import rules_of
from devmap_config.simulate.rehearsal import Rehearsal, rehearse
from devmap_config.stages import begin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.execution.segments import MissingFigureError, Phase
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.lock import InputDigests, Lock
    from devmap_config.plan.plan import Plan
    from devmap_config.plan.prediction import TimeBasis
    from devmap_config.plan.process_memory import ProcessMemory
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.profile.schema import Hardware
    from devmap_config.simulate.simulation import Verdict


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to compile a profile: its file, its user's choices, and the stages that are asked for.

    Attributes:
        path: the profile.
        variables: values for its templates, as `--set` gives them.
        lock: a lock whose `--set` values and commit are used if the request names none.
        permissions: what the user allows the profile.
        must_ask: resolve the model's revision on the hub, whatever the lock or a cache says.
        use_vendored: read the graph that is kept beside the profile, if it is up to date.
        hardware: another machine to compile for than the profile's.
        strategy: the strategy on that other machine.
        engine: another engine to plan for than the profile's target.
        groups: with `engine`, the devices that share each layer there.
        workload: fields of the workload that replace the profile's, such as `context_length`.
        keeps_plan: prefer the lock's plan to a new one that is no better.
        simulates: dry-run the plan.
        checks_checkpoint: compare the checkpoint, if it is at hand, with the model.
        advises: if no plan exists, try which changes to the profile would give one.
    """

    path: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    lock: Lock | None = None
    permissions: Permissions = NO_PERMISSIONS
    must_ask: bool = False
    use_vendored: bool = True
    hardware: Hardware | None = None
    strategy: str = "fastest"
    engine: str | None = None
    groups: tuple[tuple[Device, ...], ...] = ()
    workload: Mapping[str, Any] = field(default_factory=dict)
    keeps_plan: bool = False
    simulates: bool = False
    checks_checkpoint: bool = False
    advises: bool = True

    @classmethod
    def for_profile(
        cls, path: Path, *, lock: Lock | None = None, permissions: Permissions = NO_PERMISSIONS, **options: Any
    ) -> Request:
        """Return the request for a profile with what its lock remembers: `--set` values, and the model's commit.

        Args:
            path: the profile.
            lock: its lock, if it was read already; otherwise the lock beside the profile is read, if it can be.
            permissions: what its user allows it.
            options: further fields of the request; `variables` outrank those of the lock.
        """
        lock = lock or lock_beside(path, allow_outside=permissions.allow_outside)
        return cls(path=path, lock=lock, permissions=permissions, **options)

    @property
    def remembered(self) -> Mapping[str, str]:
        """The `--set` values of the lock; none without a lock."""
        return {} if self.lock is None else self.lock.variables

    @property
    def lookup(self) -> Lookup:
        """The rules by which the model is looked up: at the lock's commit, unless the hub must be asked."""
        resolved = None if self.lock is None or self.must_ask else self.lock.resolved
        return Lookup(
            resolved=resolved, must_ask=self.must_ask, use_vendored=self.use_vendored, permissions=self.permissions
        )


@dataclass(frozen=True, kw_only=True)
class Compiled(Prepared):
    """A profile with its verified plan.

    Attributes:
        plan: the plan.
        inputs: digests of what the plan was made from, as its lock holds them.
        verdicts: the results of the dry runs, by the digest of the plan that was run.
        diagnostics: the warnings.
        texts: the files that the diagnostics point into, by the names under which they are shown.
    """

    plan: Plan
    inputs: InputDigests
    verdicts: Mapping[str, Verdict]
    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]
    assistant: Compiled | None = None
    """The draft model's profile with its plan, if the profile names a draft model."""

    @cached_property
    def time_bases(self) -> dict[Phase, TimeBasis]:
        """The basis of each predicted time."""
        return time_bases(self.plan, self.graph, self.inventory)

    @property
    def missing_figures(self) -> dict[Phase, tuple[MissingFigureError, ...]]:
        """The figures of the machine that are missing for the times that are not predicted."""
        return missing_figures(self.plan, self.graph, self.inventory)

    @property
    def process_memory(self) -> ProcessMemory | None:
        """The memory of the process that runs the plan, if it is known."""
        return process_memory(self.plan, self.graph, self.inventory)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the basis of its times, which no lock holds."""
        return {**self.plan.to_json(), "basis": {phase: asdict(basis) for phase, basis in self.time_bases.items()}}


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A profile without a plan, and the diagnostics that say why.

    Attributes:
        diagnostics: errors and warnings.
        texts: the files that the diagnostics point into, by the names under which they are shown.
        reached: the profile with its model and rules, if compilation got as far as placing.
        refused: a plan that was placed, but that the dry run showed not to run.
    """

    diagnostics: tuple[Diagnostic, ...]
    texts: Mapping[str, str]
    reached: Prepared | None = None
    refused: Plan | None = None


Compilation: TypeAlias = "Compiled | Rejected"


def compile_profile(
    path: str | Path,
    *,
    variables: Mapping[str, object] | None = None,
    allow_outside: bool = False,
    trust_remote_code: bool = False,
    allow_unmeasured: bool = False,
) -> Plan:
    """Compile a profile and return its plan; nothing is written.

    Args:
        path: the profile's file, or its lock.
        variables: values for its templates, as `--set` gives them; the values of its lock hold for all others.
        allow_outside: allow paths in the profile that lead out of its repository.
        trust_remote_code: allow Python code that comes with the model to run.
        allow_unmeasured: estimate costs by formulas if a library has changed so that the model cannot be measured.

    Returns:
        The plan, dry-run if the model's code allows it. Its `diagnostics` are the warnings. Sizes are in bytes, times
        in nanoseconds.

    Raises:
        ProfileError: if the profile is missing, is wrong or cannot be satisfied; it carries every diagnostic.
        DevmapError, TypeError: if the name of a variable is not text.

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
            permissions=Permissions(
                allow_outside=allow_outside, trust_remote_code=trust_remote_code, allow_unmeasured=allow_unmeasured
            ),
            simulates=True,
            checks_checkpoint=True,
        )
    )
    if isinstance(compilation, Rejected):
        raise ProfileError(compilation.diagnostics, compilation.texts)
    return replace(compilation.plan, diagnostics=compilation.diagnostics)


def run_pipeline(request: Request) -> Compilation:
    """Run the stages in turn, and stop at the first that fails.

    Args:
        request: the profile, and what is asked of it.

    Returns:
        The profile with its plan, or the diagnostics that say why there is none.
    """
    return hold_to_lock(request, None)[0]


def hold_to_lock(request: Request, lock: Lock | None) -> tuple[Compilation, Drift | None]:
    """Compile a profile with the plan of a lock, or with a new plan if the lock's no longer holds.

    Args:
        request: the profile, and what is asked of it.
        lock: the lock whose plan is reused; with `None`, a new plan is made.

    Returns:
        The compilation, and the reasons for which the lock's plan was not reused; `None` if it was, or if there was no
        lock.
    """
    sink = Sink()
    try:
        with passing_on(sink):
            compilation, drift = _run_stages(request, lock, sink)
        return replace(compilation, diagnostics=sink.diagnostics), drift
    except TooManyErrorsError as error:
        return Rejected(diagnostics=error.diagnostics, texts=error.texts), None
    except LibraryChangedError as error:  # raised if no stage has a substitute for what the library lacks
        place = whole_file(str(request.path))
        report_failure(failure_of(error), "the profile cannot be compiled", place, sink, allowed=None)
        return Rejected(diagnostics=sink.diagnostics, texts=sink.texts), None


def _run_stages(request: Request, lock: Lock | None, sink: Sink) -> tuple[Compilation, Drift | None]:
    loaded = _load(request, sink)
    prepare = partial(_prepare, request.lookup)
    prepared = None if loaded is None else prepare(loaded, None, sink)
    if prepared is not None and request.checks_checkpoint:
        prepared = check_checkpoint(prepared, sink, request.permissions)
        check_adapter(prepared, sink)
        _check_assistant_checkpoint(request, prepared, sink)
    if prepared is None or not _can_be_placed(prepared, sink):
        return Rejected(diagnostics=sink.diagnostics, texts=sink.texts, reached=prepared), None

    inputs = inputs_of(prepared)
    reused = None if lock is None else reuse_locked_plan(lock, prepared, inputs)
    if isinstance(reused, ReusedPlan):
        report_moved_figures(reused, prepared.loaded, sink)
        rehearsal = Rehearsal(accepted(reused.plan, prepared, sink))
    else:
        previous = request.lock if request.keeps_plan else None
        planner = Planner(prepared, sink, prepare if request.advises else None, previous)
        rehearsal = _place(planner, request, sink)
    result = _result(prepared, inputs, rehearsal, sink)
    if isinstance(result, Compiled) and prepared.draft is not None:
        # Its diagnostics were reported when the profile was prepared.
        result = replace(result, assistant=_compiled_assistant(request.lookup, prepared.loaded, Sink()))
    return result, reused if isinstance(reused, Drift) else None


def _can_be_placed(prepared: Prepared, sink: Sink) -> bool:
    if prepared.is_for_vllm:
        from devmap_config.plan.pipelines import pipeline_problem  # imports numpy

        return not sink.has_errors and pipeline_problem(prepared, sink) is not None
    return build_problem(prepared, sink) is not None


def _load(request: Request, sink: Sink) -> LoadedProfile | None:
    loaded = load_profile(
        request.path,
        sink,
        overrides=request.variables,
        remembered=request.remembered,
        allow_outside=request.permissions.allow_outside,
    )
    if loaded is None:
        return None
    for library in untried():
        sink.warning("untried-version", never_tried(library))
    if request.workload:
        loaded = with_workload(loaded, **request.workload)
    if request.hardware is not None:
        loaded = on_other_hardware(loaded, request.hardware, request.strategy)
    return loaded if request.engine is None else for_engine(loaded, request.engine, request.groups)


def _prepare(lookup: Lookup, loaded: LoadedProfile, model: LoadedModel | None, sink: Sink) -> Prepared | None:
    check_settings(loaded, sink)
    inventory = build_inventory(loaded, sink)
    rules = rules_of(loaded, declared_devices(loaded.profile.hardware), inventory.kind, sink)
    if model is None:
        begin("read", f"reading {loaded.profile.model.source.value}")
        model = load_model_graph(loaded, lookup, sink)
    if model is None:
        return None
    resolution = resolve(rules, model.graph, source_from_here(loaded), sink)
    inventory = inventory.in_dtype(model.dtype)
    prepared = Prepared(loaded=loaded, inventory=inventory, model=model, resolution=resolution)
    check_dtype(prepared, sink)
    check_compute_dtype(prepared, sink)
    check_conversion(prepared, sink)
    check_cache(prepared, sink)
    if loaded.profile.model.assistant is None:
        return prepared
    assistant = _compiled_assistant(lookup, loaded, sink)
    if assistant is None:
        return None
    check_assistant(prepared, assistant.model, sink)
    return replace(prepared, draft=draft_of(assistant.plan, assistant.model, assistant.inputs.graph))


def _check_assistant_checkpoint(request: Request, prepared: Prepared, sink: Sink) -> None:
    assistant = _compiled_assistant(request.lookup, prepared.loaded, Sink()) if prepared.draft is not None else None
    if assistant is not None:
        check_checkpoint(assistant, draft_sink := Sink(), request.permissions)
        _report_of_draft(draft_sink, sink)


def _report_of_draft(draft_sink: Sink, sink: Sink) -> None:
    sink.report_all(
        replace(finding, message=f"of the draft model: {finding.message}") for finding in draft_sink.diagnostics
    )


def _compiled_assistant(lookup: Lookup, loaded: LoadedProfile, sink: Sink) -> Compiled | None:
    """Compile the draft model by itself, whole on its device; report its diagnostics as the draft model's."""
    assistant = loaded.profile.model.assistant
    if assistant is None or not check_source_of_assistant(assistant, sink):
        return None
    draft_sink = Sink()
    lookup = replace(lookup, resolved=None, must_ask=False, use_vendored=False)
    prepared = _prepare(lookup, of_assistant(loaded, assistant), None, draft_sink)
    plan = None if prepared is None else Planner(prepared, draft_sink, None).plan()
    _report_of_draft(draft_sink, sink)
    if prepared is None or plan is None:
        return None
    result = _result(prepared, inputs_of(prepared), Rehearsal(plan), Sink())
    return result if isinstance(result, Compiled) else None


def _place(planner: Planner, request: Request, sink: Sink) -> Rehearsal:
    plan = planner.plan()
    if plan is None or not request.simulates or plan.pipeline is not None:
        return Rehearsal(plan)  # only accelerate's hooks can be dry-run
    return rehearse(plan, planner.prepared, planner.plan, request.permissions, sink)


def _result(prepared: Prepared, inputs: InputDigests, rehearsal: Rehearsal, sink: Sink) -> Compilation:
    plan, refused = rehearsal.plan, rehearsal.refused
    if (placed := plan or refused) is not None:
        sink.report_all(review(placed, prepared))
    if plan is None:
        return Rejected(diagnostics=sink.diagnostics, texts=sink.texts, reached=prepared, refused=refused)
    return Compiled(
        loaded=prepared.loaded,
        inventory=prepared.inventory,
        model=prepared.model,
        resolution=prepared.resolution,
        draft=prepared.draft,
        plan=plan,
        inputs=inputs,
        verdicts=rehearsal.verdicts,
        diagnostics=sink.diagnostics,
        texts=sink.texts,
    )
