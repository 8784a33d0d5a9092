"""Checks that machine, model and checkpoint go together: the dtype, the quantizer's devices, the stored tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmap_config.devices import CPU, OFFLOADING_KIND
from devmap_config.execution.loading import is_quantised
from devmap_config.files import exists
from devmap_config.graph.adapter import AdapterError, stored_names
from devmap_config.graph.checkpoint_check import match_checkpoint
from devmap_config.graph.checkpoint_match import judge
from devmap_config.graph.costs import OFFLOADED, PARTLY
from devmap_config.graph.failures import failure_of
from devmap_config.graph.findings import report_failure
from devmap_config.graph.model import SAVED, TensorName
from devmap_config.graph.source import COMMIT, is_hub_id
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.profile.schema import OPTIMAL_STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.graph.loading import LoadedModel
    from devmap_config.prepared import Prepared
    from devmap_config.profile.permissions import Permissions
    from devmap_config.profile.schema import Assistant


def check_dtype(prepared: Prepared, sink: Sink) -> None:
    """Report accelerators of the catalogue that do not compute in the model's dtype."""
    model, profile = prepared.model, prepared.loaded.profile.model
    method = None if model.quantization is None else model.quantization.method
    wants_fp8 = model.dtype.startswith("float8") or (method is not None and method.needs_fp8)
    for device in prepared.inventory.devices:
        card = device.accelerator
        if card is None:
            continue
        if wants_fp8 and not card.supports_fp8:
            dtype, mend = "fp8", "choose another quantization, or a card of the Ada or Hopper generation or later"
        elif model.dtype == "bfloat16" and not card.supports_bf16:
            dtype, mend = "bfloat16", "write `dtype: float16`"
        else:
            continue
        sink.error(
            "unsupported-dtype",
            f"a {card.name} ({device.id}) does not compute in {dtype}",
            (profile.quantization if wants_fp8 and method else profile.dtype).span,
            help=mend,
        )


def check_compute_dtype(prepared: Prepared, sink: Sink) -> None:
    """Report a quantizer that computes in float32 though the model has another dtype, unless it was asked to."""
    model, quantization = prepared.model, prepared.loaded.profile.model.quantization
    if model.quantization is None or model.quantization.computes_in != "float32" or model.dtype == "float32":
        return
    if "bnb_4bit_compute_dtype" in model.quantization.arguments:
        return
    sink.warning(
        "computes-in-float32",
        f"{model.quantization} computes in float32, though the model is in {model.dtype}: more slowly, and with a copy"
        " of each weight that is twice as large while it is used",
        quantization.span,
        help=f"write `bnb_4bit_compute_dtype: {model.dtype}`; or `float32`, if that is meant",
    )


def check_conversion(prepared: Prepared, sink: Sink) -> None:
    """Report a quantization of the profile that converts no weight of the model."""
    model, facts = prepared.model, prepared.graph.loading
    if model.quantization is None or facts is None or not (facts.quantises and model.counts_quantized_weights):
        return
    if not any(is_quantised(tensor, facts) for tensor in prepared.graph.tensors.values()):
        sink.error(
            "bad-quantization",
            f"{model.quantization.method.name} finds no weights to quantise in a {model.class_name}",
            prepared.loaded.profile.model.quantization.span,
            help="leave `quantization` out, or name another method",
        )


def check_cache(prepared: Prepared, sink: Sink) -> None:
    """Report a cache that the machine cannot offload, and a kind of cache that was never tested with a draft model."""
    workload, name = prepared.loaded.profile.workload, prepared.loaded.profile.workload.cache.implementation
    if name in ("dynamic", "static") or workload.context_length.value is None:
        return
    kinds = sorted({device.kind for device in prepared.capacities if device.is_accelerator})
    if prepared.loaded.profile.model.assistant is not None:
        reason, help = "offloaded and quantised caches were never tested with a draft model", "leave `cache` out"
    elif name not in OFFLOADED:
        return
    elif not kinds:
        reason, help = "there is no accelerator from which the cache could be offloaded", "leave `cache` out"
    elif kinds != [OFFLOADING_KIND]:
        reason = f"transformers offloads a cache from {OFFLOADING_KIND} devices only, and these are {kinds[0]}"
        help = "leave `cache` out"
    elif name == PARTLY and prepared.strategy not in OPTIMAL_STRATEGIES:
        reason = f"the strategy must choose the offloaded layers of the cache, and `{prepared.strategy}` does not"
        help = f"write `strategy: {OPTIMAL_STRATEGIES[0]}`; or `cache: offloaded`, which is all of them"
    elif CPU not in prepared.capacities:
        reason = "the cache should be on the CPU, but the profile does not list it: what is not listed does not exist"
        help = "list it with what it has: `cpu: {memory: 64GiB}`"
    else:
        return
    sink.error("unfit-cache", reason, workload.cache.span, help=help)


def check_quantizer(stored_on: Mapping[str, Device], prepared: Prepared, sink: Sink) -> None:
    """Report the devices of a map onto which the model's quantizer refuses to load."""
    quantization = prepared.model.quantization
    if quantization is None:
        return
    devices, refusal = set(stored_on.values()), quantization.method.refusal
    used = devices.intersection(quantization.refused_devices)
    joined, advice = " or ", "give the accelerators more room, or leave these devices out of the profile"
    if refusal.one_device_only and len(devices) > 1:
        used, joined, advice = devices, " together with ", "write `strategy: single`"
    elif devices == {CPU} and refusal.whole_is_fine:
        used, advice = (
            used if len(stored_on) > 1 else set(),
            "write `strategy: single`, which puts the whole model there by one key",
        )
    elif devices == {CPU} and refusal.alone_is_fine and not quantization.is_told_to_accept:
        return
    if not used:
        return
    argument = quantization.accepting_argument
    nothing = "nothing of a quantised checkpoint" if quantization.is_prequantized else "nothing"
    sink.error(
        "quantizer-refuses",
        f"{quantization.method.name} loads {nothing} onto {joined.join(map(str, sorted(used)))}",
        prepared.loaded.profile.model.quantization.span,
        help=f"write `{argument}: true`, or {advice}" if argument else advice,
    )


def check_adapter(prepared: Prepared, sink: Sink) -> None:
    """Report targets of an adapter that the model does not have, and a file that lacks what the config adds."""
    model, adapter = prepared.model, prepared.loaded.profile.model.adapter
    if model.adapter is None or adapter is None:
        return
    targets = model.adapter.config.targets
    unknown = [
        f"`{name}`"
        for name in (() if isinstance(targets, str) else targets)
        if not any(f".{path}".endswith(f".{name}") for path in model.graph.modules)
    ]
    if unknown:
        sink.warning(
            "ignored-key",
            f"the adapter's `target_modules` name {', '.join(unknown)}, and {model.class_name} has no such module",
            adapter.source.span,
            help="PEFT ignores such names; if one is misspelt, correct it in `adapter_config.json`",
        )
    try:
        stored_names(model.adapter, model.graph, must_be_there=False)
    except AdapterError as error:
        sink.error("bad-adapter", str(error), adapter.source.span, help=error.help)


def check_adapter_placement(streamed: Collection[TensorName], prepared: Prepared, sink: Sink) -> None:
    """Report an adapter that needs the weights of streamed modules between two forwards, when they are not there.

    LoRA's two matrices stay beside the module; all other adapters read or replace the module's own weights.
    """
    model, adapter = prepared.model, prepared.loaded.profile.model.adapter
    if model.adapter is None or adapter is None:
        return
    config = model.adapter.config
    for module in model.graph.adapted_modules:
        own = {tensor.name.rpartition(".")[2] for tensor in module.own_tensors}
        held_away = [tensor.name for tensor in module.parameters if tensor.name in streamed]
        if not held_away:
            continue
        if "lora_magnitude_vector" in own:
            what = "DoRA (`use_dora`) reads its weights while it does not run"
        elif any(name.startswith(SAVED) for name in own):
            what = "`modules_to_save` replaces it"
        elif config.bias != "none" and "bias" in own:
            what = f"`bias: {config.bias}` replaces its bias"
        else:
            continue
        sink.error(
            "unfit-adapter",
            f"`{module.path}` is copied to where it runs at every forward, and {what} in this adapter",
            adapter.source.span,
            help=f"pin it to where it runs: `{{match: {module.path}, device: …}}`; or merge the adapter into the"
            " checkpoint by `merge_and_unload()` of peft",
        )
        return


def check_source_of_assistant(assistant: Assistant, sink: Sink) -> bool:
    """Return whether the source of a draft model is fixed, by a local path or a commit; report it otherwise."""
    source = assistant.source
    if exists(source.path) or not is_hub_id(source.value) or COMMIT.fullmatch(assistant.revision or ""):
        return True
    sink.error(
        "unfit-assistant",
        f"`{source.value}` is a draft model on the hub, and its commit is not named",
        source.span,
        help="say which: `assistant: {source: …, revision: …}` with the 40 digits of a commit",
    )
    return False


def check_assistant(prepared: Prepared, draft: LoadedModel, sink: Sink) -> None:
    """Report a workload that a draft model does not support, and a draft model with another vocabulary."""
    profile = prepared.loaded.profile
    workload, assistant = profile.workload, profile.model.assistant
    mine, its = (_vocabulary(model.source.config) for model in (prepared.model, draft))
    problems = {
        "transformers supports a draft model only for one sequence at a time": workload.batch_size > 1,
        "transformers does not support a draft model with a static cache": workload.cache.implementation == "static",
        f"its vocabulary has {its} words, and the model's {mine}": None not in (mine, its) and mine != its,
        "it would be given images and sound as well": bool(workload.inputs.images or workload.inputs.audio_seconds),
        "it proposes tokens, but this model does not generate any": not prepared.graph.decodes,
        "`longest-context` does not count the draft model's cache": prepared.strategy == "longest-context",
    }
    for problem, is_there in problems.items():
        if is_there:
            help = "leave `assistant` out, or change what is said there"
            span = None if assistant is None else assistant.span
            sink.error("unfit-assistant", f"a draft model is not possible here: {problem}", span, help=help)


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model knows, by its config."""
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size", config.get("vocab_size"))
    return size if isinstance(size, int) else None


def check_checkpoint(prepared: Prepared, sink: Sink, permissions: Permissions) -> Prepared:
    """Report differences between the checkpoint, if one is at hand, and the model.

    Args:
        prepared: the profile with its model.
        sink: takes the diagnostics.
        permissions: what the user allows the profile.

    Returns:
        The profile, with those tensors marked that are in no file because transformers computes them.
    """
    model, resolution, span = prepared.model, prepared.resolution, prepared.loaded.profile.model.source.span
    try:
        match = match_checkpoint(model, trust_remote_code=permissions.trust_remote_code)
    except LibraryChangedError as error:
        consequence = "whether the checkpoint holds this model was not checked"
        report_failure(failure_of(error), consequence, span, sink, allowed=permissions.allow_unmeasured)
        return prepared
    if match is None:
        return prepared
    if match.unchecked is not None:
        sink.warning(
            "unchecked-checkpoint",
            f"it was not checked that the checkpoint holds this model: {match.unchecked}",
            span,
            help="install what is missing, and compile again",
        )
        return prepared
    judgement = judge(match, model.source.config, frozenset(resolution.new))
    if judgement.error is not None:
        sink.error("wrong-checkpoint", judgement.error, span, help=judgement.error_help)
    if judgement.warning is not None:
        sink.warning(
            "unexpected-tensors",
            f"the checkpoint holds more than this {match.class_name}: {judgement.warning}",
            span,
            help="tensors that are not in the model are not loaded; check that its class is the one that was saved",
        )
    lacking = {*match.missing, *(mismatch.name for mismatch in match.mismatched)}
    needless = {name: rule for name, rule in resolution.new.items() if name not in lacking}
    for rule in {id(rule): rule for rule in needless.values()}.values():
        if all(name in needless for name, other in resolution.new.items() if other is rule):
            sink.warning(
                "not-new",
                f"`{rule.text}` is in the checkpoint, and is loaded from there",
                rule.span,
                help="leave it out of `allow_new`",
            )
    graph = replace(model.graph, computed=frozenset(map(TensorName, match.computed)))
    return replace(prepared, model=replace(model, graph=graph))
