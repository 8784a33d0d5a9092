"""Loads the model of a profile by its lock, and verifies that it is on the devices of the lock."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devmap_config.compiler import Rejected
from devmap_config.devices import DISK
from devmap_config.diagnostics.diagnostic import DevmapWarning, ProfileError, Sink
from devmap_config.execution.pieces import pieces_ahead
from devmap_config.graph.checkpoint_check import match_checkpoint
from devmap_config.graph.checkpoint_match import judge
from devmap_config.graph.source import HubAccess, cached_checkpoint
from devmap_config.graph.workload import PROPOSED_TOKENS
from devmap_config.locked import compile_locked
from devmap_config.plan.drift import remedy
from devmap_config.plan.lock import Lock, LockError, lock_at, lock_path, profile_of
from devmap_config.plan.readiness import differences, kind_needed
from devmap_config.profile.document import whole_file
from devmap_config.profile.permissions import NO_PERMISSIONS, Permissions
from devmap_config.profile.variables import texts_of
from devmap_config.runner.arguments import require_passable
from devmap_config.runner.caches import give_cache, require_cache
from devmap_config.runner.compilation import compile_decoding, require_compilable
from devmap_config.runner.loading import LoadRequest, RunnerError, UnfitMachineError, load, telling_of_changes
from devmap_config.runner.receipts import never_seen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from devmap_config.compiler import Compiled
    from devmap_config.diagnostics.codes import Code
    from devmap_config.diagnostics.diagnostic import Diagnostic
    from devmap_config.graph.checkpoint_match import CheckpointMatch
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.plan.plan import Plan
    from devmap_config.runner.loading import Loaded

EXAMPLES_SHOWN = 3


@dataclass(frozen=True)
class Deployment:
    """A locked plan with everything that is needed to load it.

    Attributes:
        lock: the lock, with figures by the installed libraries.
        match: the comparison of the checkpoint's headers with the model; `None` if they are not available before
            loading.
        has_random_weights: the checkpoint is random: loading it shows that tensors fit, but the model's output is
            meaningless.
        compiles: decode with compiled code.
        assistant: the deployment of the draft model.
    """

    compiled: Compiled
    request: LoadRequest
    lock: Lock
    match: CheckpointMatch | None = None
    has_random_weights: bool = False
    compiles: bool = False
    assistant: Deployment | None = None

    @property
    def plan(self) -> Plan:
        """The plan of the lock."""
        return self.compiled.plan

    def given(self, arguments: Mapping[str, Any]) -> Deployment:
        """Return the deployment with further arguments of `from_pretrained`, also for its draft model."""
        request = replace(self.request, arguments=arguments)
        draft = None if self.assistant is None else self.assistant.given(arguments)
        return replace(self, request=request, assistant=draft)

    @property
    def base_plan(self) -> Plan:
        """The plan without an adapter's tensors, for the model that transformers loads."""
        added = frozenset(self.compiled.model.graph.adapter_tensors)
        assignments = (
            replace(assignment, tensors=tuple(name for name in assignment.tensors if name not in added))
            for assignment in self.plan.assignments
        )
        return replace(self.plan, assignments=tuple(assignments)) if added else self.plan

    @property
    def loaded_bytes(self) -> dict[str, int]:
        """The bytes of each tensor that is in memory after loading: all tensors except those that stay on the disk."""
        graph, plan = self.compiled.model.graph, self.base_plan
        return {
            name: plan.executor.held_bytes(graph.tensors[name], assignment.location, plan.main_device)
            for assignment in plan.assignments
            if assignment.location.stored_on != DISK
            for name in assignment.tensors
        }

    @property
    def unchecked(self) -> str | None:
        """The reason why it is not certain that every tensor comes from the checkpoint; `None` if it is.

        transformers' own report covers this, too, except for tensors on disk.
        """
        if self.has_random_weights:
            return "the weights are random"
        reads_disk = any(assignment.location.stored_on == DISK for assignment in self.plan.assignments)
        return self.match.unchecked if self.match is not None and reads_disk else None

    @property
    def left_out(self) -> str | None:
        """A phrase about the checkpoint's tensors that are not loaded; `None` if there are none."""
        if self.match is None or self.match.unchecked is not None:
            return None
        return judge(self.match, self.compiled.model.source.config, _allowed(self.compiled)).warning

    @property
    def new(self) -> tuple[str, ...]:
        """The tensors that are allowed to be new, and that the checkpoint does not hold."""
        lacking = (
            () if self.match is None else (*self.match.missing, *(mismatch.name for mismatch in self.match.mismatched))
        )
        return tuple(name for name in lacking if name in _allowed(self.compiled))


def load_model(
    path: str | Path,
    *,
    variables: Mapping[str, object] | None = None,
    allow_outside: bool = False,
    trust_remote_code: bool = False,
    allow_unmeasured: bool = False,
    probe: bool = True,
    compile: bool = False,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load the model of a profile by its lock, and verify it.

    Args:
        path: the profile's file, or its lock.
        variables: values for its templates, as `--set` gives them; the values of its lock hold for all others.
        allow_outside: allow paths in the profile that lead out of its repository.
        trust_remote_code: allow Python code that comes with the model to run.
        allow_unmeasured: accept a plan whose costs were estimated by formulas because a library has changed so that the
            model cannot be measured.
        probe: check first that this machine can run the plan.
        compile: decode with compiled code and a static cache in `generate`; the whole model must be on one CUDA card,
            or in float32 on the CPU.
        from_pretrained: further arguments of transformers' `from_pretrained`: `local_files_only`, `token`, `cache_dir`
            and the like, but none that the profile decides (`dtype`, `device_map`, `revision`, …).

    Returns:
        The model: every tensor from the checkpoint, on the device that the plan gives it. With an adapter, it is PEFT's
            model around that; with a draft model, `generate` uses that as `assistant_model`.

    Raises:
        ArgumentError: if an argument is decided by the profile, or `from_pretrained` has none of that name.
        ProfileError: if the profile is missing or wrong; it carries every diagnostic.
        RunnerError: if the lock is missing or stale, or if the machine or the loaded model differs from it.

    Warns:
        DevmapWarning: about everything that `devmap run` warns of, such as an untested version of a library.

    Example:
        >>> model = load_model("profiles/quickstart.yaml", local_files_only=True)
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    require_passable(from_pretrained)
    texts = texts_of(variables)
    access = HubAccess(**{name: from_pretrained[name] for name in HubAccess.NAMES if name in from_pretrained})
    with access.used():
        deployment = prepare(
            profile_of(Path(path)),
            variables=texts,
            permissions=Permissions(
                allow_outside=allow_outside, trust_remote_code=trust_remote_code, allow_unmeasured=allow_unmeasured
            ),
        )
        deployment = replace(deployment.given(from_pretrained), compiles=compile)
        for notice in notices(deployment, asks_machine=probe):
            warnings.warn(f"{notice.message} [{notice.code}]", DevmapWarning, stacklevel=2)
        model: PreTrainedModel = load_adapted(deployment)  # PEFT's model delegates attributes to the inner one
        with_draft(model, load_draft(deployment))
        return model


@telling_of_changes("whether the checkpoint holds this model cannot be told")
def prepare(
    path: Path,
    *,
    variables: Mapping[str, str],
    permissions: Permissions = NO_PERMISSIONS,
    needs_weights: bool = True,
) -> Deployment:
    """Read a profile's lock and check that it still holds; nothing is loaded.

    Args:
        path: the profile's.
        variables: values for its templates.
        permissions: what reading it may do.
        needs_weights: whether there must be weights; a config suffices if random weights replace them.

    Raises:
        ProfileError: if the profile is wrong.
        RunnerError: if the lock is missing, damaged or stale, or there are no weights.
        NotForTransformersError: if the plan is for vLLM.
    """
    lock = _locked(path, permissions)
    compiled, drift = compile_locked(path, lock, variables=variables, permissions=permissions)
    if isinstance(compiled, Rejected):
        _raise_unreadable_checkpoint(compiled)
        raise ProfileError(compiled.diagnostics, compiled.texts)
    model, plan, match = compiled.model, compiled.plan, None
    plan.require_transformers()
    # If the checkpoint has changed, its errors say more than that the lock is stale.
    if drift is None or lock.inputs.get("checkpoint") not in (None, model.source.checkpoint_digest):
        match = match_checkpoint(model, trust_remote_code=permissions.trust_remote_code)
        require_match(match, compiled)
    if drift is not None:
        raise RunnerError(drift.code, f"`{lock_path(path)}` {drift.message}", remedy(drift.code, path))
    _require_weights(compiled, needs_weights=needs_weights)
    lock = replace(lock, plan=plan.to_json(), hardware=compiled.inventory.accelerators_to_json())
    deployment = Deployment(compiled, _load_request(compiled, permissions), lock, match)
    if (draft := compiled.assistant) is None:
        return deployment
    _require_weights(draft, needs_weights=needs_weights)
    match = match_checkpoint(draft.model, trust_remote_code=permissions.trust_remote_code)
    require_match(match, draft)
    return replace(deployment, assistant=Deployment(draft, _load_request(draft, permissions), lock, match))


def _require_weights(compiled: Compiled, *, needs_weights: bool) -> None:
    source = compiled.model.source
    if source.weights is None and needs_weights:
        raise RunnerError(
            "no-weights",
            f"there is only a config at `{compiled.loaded.profile.model.source.value}`, and no weights",
            "name a directory with weights, or a hub id, as `model.source`; `--random-weights` tries the plan without",
        )


def _load_request(compiled: Compiled, permissions: Permissions) -> LoadRequest:
    loaded, model, plan = compiled.loaded, compiled.model, compiled.plan
    folder = loaded.profile.placement.offload.folder
    return LoadRequest(
        weights=model.source.weights or str(model.source.location),
        class_name=model.class_name,
        dtype=model.dtype,
        attention=model.attention,
        revision=model.source.commit,
        quantization=dict(loaded.profile.model.quantization.value or {}),
        offload_folder=None if folder.value is None else folder.path,
        trust_remote_code=permissions.trust_remote_code,
        config=model.source.config,
        pieces=pieces_ahead(model.graph, plan.locations, plan.executor, plan.main_device),
    )


def _raise_unreadable_checkpoint(rejected: Rejected) -> None:
    """Raise an error about unreadable files of the checkpoint, as the profile itself is not wrong."""
    for finding in rejected.diagnostics:
        if finding.code in ("unreadable-checkpoint", "no-safetensors"):
            raise RunnerError(finding.code, finding.message, finding.help)


def _allowed(compiled: Compiled) -> frozenset[str]:
    return frozenset(compiled.resolution.new)


def require_match(match: CheckpointMatch | None, compiled: Compiled) -> None:
    """Refuse a checkpoint that does not hold the model.

    Raises:
        RunnerError: if it does not; the error names the tensors.
    """
    if match is None or match.unchecked is not None:
        return
    judgement = judge(match, compiled.model.source.config, _allowed(compiled))
    if judgement.error is not None:
        raise RunnerError("wrong-checkpoint", judgement.error, judgement.error_help)


SAID_AGAIN: tuple[Code, ...] = (
    "untried-version",
    "library-changed",
    "library-warning",
    "measuring-failed",
    "figures-moved",
    "remote-code",
)
"""The diagnostics of compiling that are repeated when a plan is run: about libraries, and code that comes with the
model.
"""


def notices(deployment: Deployment, *, asks_machine: bool) -> tuple[Diagnostic, ...]:
    """Return the warnings before loading: about libraries, the checkpoint and, if it is checked, this machine.

    Raises:
        UnfitMachineError: if this machine cannot run the plan; the error has every reason.
    """
    sink = Sink()
    sink.report_all(finding for finding in deployment.compiled.diagnostics if finding.code in SAID_AGAIN)
    if deployment.left_out is not None:
        sink.warning("unexpected-tensors", f"the checkpoint holds more than is loaded: {deployment.left_out}")
    if asks_machine:
        sink.report_all(require_fit_machine(deployment))
    if (untried := never_seen(deployment.plan)) is not None:
        sink.warning("never-on-cards", untried)
    return sink.diagnostics


def require_fit_machine(deployment: Deployment) -> tuple[Diagnostic, ...]:
    """Check that this machine can run the plan now, and return the warnings.

    Raises:
        UnfitMachineError: if it cannot; it carries every reason.
    """
    from devmap_config.probe.probe import probe_machine

    folder = deployment.request.offload_folder
    seen = probe_machine(os.environ, folder or Path(), kind=kind_needed(deployment.lock))
    place = whole_file(str(deployment.compiled.loaded.path))
    # Weights that the checkpoint has in the loaded form are read from there, and not written again.
    findings = differences(deployment.lock, seen, place, disk_may_be_read_in_place=True)
    if any(finding.is_error for finding in findings):
        raise UnfitMachineError(findings)
    return findings


def require_model_alone(deployment: Deployment, what: str) -> None:
    """Refuse a feature that does not support adapters, if the deployment has one.

    Raises:
        RunnerError: if one is.
    """
    if deployment.compiled.model.adapter is not None:
        raise RunnerError(
            "unfit-adapter",
            f"{what}, and this profile has an adapter",
            "try it by a profile without `model.adapter`",
        )


def load_draft(deployment: Deployment) -> PreTrainedModel | None:
    """Return the draft model, loaded and verified as the model is; `None` if there is none.

    Raises:
        RunnerError: as `load_verified`.
    """
    return None if deployment.assistant is None else load_verified(deployment.assistant)


def with_draft(model: PreTrainedModel, draft: PreTrainedModel | None) -> None:
    """Have a model generate with a draft model, if there is one."""
    if draft is not None:  # not as an attribute, which would make it a part of the model
        draft.generation_config.num_assistant_tokens = PROPOSED_TOKENS  # the plan has room for these
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        model.generate = partial(model.generate, assistant_model=draft)


def load_verified(deployment: Deployment) -> PreTrainedModel:
    """Load and verify the model: every tensor is from the checkpoint, and is stored and runs on its planned device.

    An adapter is attached; a draft model is not loaded.

    Raises:
        RunnerError: if it cannot be loaded here, tensors are not from the checkpoint, or are on other devices.
    """
    loaded = load_adapted(deployment)
    model: PreTrainedModel = loaded if deployment.compiled.model.adapter is None else loaded.get_base_model()
    return model


@telling_of_changes("whether the loaded model is what was planned cannot be told")
def load_adapted(deployment: Deployment) -> Any:
    """Load and verify the model; with an adapter, return PEFT's model around it.

    Raises:
        RunnerError: as `load_verified`, and if PEFT is missing or the adapter does not match its config.
    """
    from devmap_config.runner.adapter import attach, require_peft, stored_adapter
    from devmap_config.runner.inspection import (
        misplaced_tensors,
        misread_by_quantizer,
        misread_tensors,
        misrun_modules,
        unquantized_tensors,
    )

    if deployment.compiles:
        require_compilable(deployment.plan, deployment.compiled.model, deployment.compiled.loaded.profile.workload)
    require_cache(deployment.compiled.loaded.profile.workload.cache)
    compiled, plan, stored = deployment.compiled.model, deployment.base_plan, None
    if compiled.adapter is not None:  # this check is fast, whereas loading is not
        require_peft()
        stored = None if deployment.has_random_weights else stored_adapter(compiled.adapter, compiled.graph)
    if otherwise := misread_by_quantizer(plan, compiled.graph):
        raise RunnerError(
            "dequantized",
            f"this version of transformers would not quantise as the plan counts: {_some(list(otherwise))}",
            "before 5.21 it takes the key of one layer on the CPU (`model.layers.1`) for others as well"
            " (`model.layers.10`): upgrade transformers",
        )
    loaded = load(plan, deployment.request)
    model = loaded.model
    _require_loaded(loaded, deployment, compiled)
    if compiled.counts_quantized_weights and not getattr(model, "is_quantized", False):
        raise RunnerError(
            "dequantized",
            "transformers dequantised the weights while loading: they take more room than the plan has for them",
            "install the kernels that the quantization needs, or write `dequantize: true`, and compile again",
        )
    if unquantized := unquantized_tensors(model, plan, compiled.graph):
        raise RunnerError(
            "dequantized",
            f"transformers left unquantised what the plan counts quantised: {_some(list(unquantized))}",
            "this version of transformers may read the map in another way: please report it",
        )
    misplaced = misplaced_tensors(model, plan, compiled.graph, is_quantized=compiled.quantization is not None)
    if misplaced:
        raise RunnerError(
            "misplaced-tensors",
            "the loaded model is not where the plan says: "
            + _some([f"{tensor.tensor} is on {tensor.found}, planned on {tensor.planned}" for tensor in misplaced]),
            "the checkpoint may hold another model than its config says; please report it if not",
        )
    if misrun := misrun_modules(model, plan):
        raise RunnerError(
            "misplaced-tensors",
            "the loaded model does not run where the plan says: "
            + _some([f"{module.module} runs on {module.found}, planned on {module.planned}" for module in misrun]),
            "this version of transformers or accelerate may dispatch it otherwise; please report it",
        )
    if misread := misread_tensors(model, plan, compiled.graph):
        raise RunnerError("wrong-checkpoint", f"what is read from disk is not the model's: {_some(misread)}", ANEW)
    adapted = None
    if compiled.adapter is not None:
        adapted = attach(model, deployment.plan, compiled.graph, compiled.adapter, stored)
    give_cache(model, deployment.compiled.loaded.profile.workload.cache, deployment.plan.offloaded_caches)
    if deployment.compiles:
        compile_decoding(model)
    return adapted or model


ANEW = "download the checkpoint again, and empty the offload folder"


def _require_loaded(loaded: Loaded, deployment: Deployment, compiled: LoadedModel) -> None:
    """Refuse a model in which transformers has initialised tensors that the checkpoint lacks.

    Raises:
        RunnerError: if it has.
    """
    if deployment.match is None and compiled.source.weights is not None and compiled.source.commit is not None:
        source = compiled.source  # it has been downloaded by now
        checkpoint = cached_checkpoint(compiled.source.weights, compiled.source.commit, source.config)
        require_match(
            match_checkpoint(replace(compiled, source=replace(source, checkpoint=checkpoint))), deployment.compiled
        )
    made_up = sorted((loaded.missing | loaded.mismatched) - _allowed(deployment.compiled))
    if made_up:
        names = _some([f"`{name}`" for name in made_up])
        raise RunnerError("wrong-checkpoint", f"transformers filled tensors with random numbers: {names}", ANEW)


def _some(findings: list[str]) -> str:
    more = len(findings) - EXAMPLES_SHOWN
    return "; ".join(findings[:EXAMPLES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _locked(profile: Path, permissions: Permissions) -> Lock:
    path = lock_path(profile)
    try:
        return lock_at(path, allow_outside=permissions.allow_outside)
    except LockError as error:
        raise RunnerError(error.code, f"`{path}` {error}", remedy(error.code, profile)) from None
