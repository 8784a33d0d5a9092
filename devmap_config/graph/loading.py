"""Gets the graph of a profile's model: finds the config, settles class and dtype, and builds the graph or reads it
back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from devmap_config.files import exists
from devmap_config.graph.adapter import AdapterError, LoraAdapter, find_adapter
from devmap_config.graph.beside_profile import (
    graph_beside,
    inputs_beside,
    source_beside,
    warn_of_stale_graph,
    with_checkpoint,
)
from devmap_config.graph.cache import cached_graph, graph_if_cached
from devmap_config.graph.checkpoint import CheckpointError
from devmap_config.graph.costs import PARTLY
from devmap_config.graph.failures import failure_of
from devmap_config.graph.findings import (
    report_cache,
    report_failure,
    report_media,
    report_positions,
    report_unmeasured,
    report_unread,
)
from devmap_config.graph.introspection import UnbuildableModelError, UntrustedCodeError, build_graph
from devmap_config.graph.model import ITEM_BYTES, LoadingFacts
from devmap_config.graph.other_formats import advice_on_missing
from devmap_config.graph.remote_code import READ_IT_FIRST, class_reference, code_files, listed
from devmap_config.graph.source import (
    ASSUMED_DTYPE,
    ModelNotFoundError,
    ModelSource,
    Resolved,
    hub_source,
    is_hub_id,
    is_local,
    local_source,
)
from devmap_config.graph.tiles import UnknownTilesError
from devmap_config.graph.vendoring import VendoredGraph, vendored_path
from devmap_config.graph.workload import workload_of
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.profile.permissions import NO_PERMISSIONS, Permissions
from devmap_config.quantization.arguments import QuantizationError
from devmap_config.quantization.method import UNCHANGED
from devmap_config.quantization.registry import effective_quantization

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.graph.costs import WorkloadShape
    from devmap_config.graph.model import ModelGraph
    from devmap_config.profile.loading import LoadedProfile
    from devmap_config.quantization.method import Quantization

BUILDABLE_ATTENTION = ("eager", "sdpa")
"""The implementations that need no extra package; the module tree is the same under all implementations."""

LIBRARIES_FOR_GRAPHS = ("torch", "transformers", "accelerate", "huggingface_hub", "safetensors")
"""Without these, a profile compiles only if its graph is vendored."""


def buildable_attention(attention: str | None) -> str | None:
    """Return the implementation with which a model is built without data; `None` for the one that
    transformers chooses.
    """
    return attention if attention in BUILDABLE_ATTENTION else None


@dataclass(frozen=True)
class LoadedModel:
    """A model's graph and its inputs. `attention` is `None` if transformers chooses it.

    `quantization` is what transformers applies; the graph counts it (`is_counted`) if its sizes are known. `dry_runs`
    holds the results of dry runs that are stored beside the profile. `adapter` is loaded on top of the model.
    """

    graph: ModelGraph
    source: ModelSource
    class_name: str
    dtype: str
    attention: str | None
    quantization: Quantization | None = None
    dry_runs: Mapping[str, Any] = field(default_factory=dict)
    adapter: LoraAdapter | None = None

    @property
    def is_counted(self) -> bool:
        """True if the graph counts the weights as they are after quantization."""
        return self.quantization is None or self.quantization.format() is not None

    @property
    def counts_quantized_weights(self) -> bool:
        """True if the graph counts weights that stay quantised."""
        return self.quantization is not None and self.quantization.format() not in (None, UNCHANGED)

    @property
    def lowers_budgets(self) -> bool:
        """True if the quantizer takes a tenth off every budget before transformers' planner fills it."""
        return self.quantization is not None and self.quantization.method.lowers_budgets


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The rules by which a model is looked up.

    Attributes:
        resolved: the commit to which the revision of a hub id was resolved before, valid while both are unchanged.
        must_ask: resolve the revision on the hub anew.
        use_vendored: use a graph beside the profile, if it is up to date.
        permissions: whether code that comes with the model may run, and formulas may stand in for a measurement.
    """

    resolved: Resolved | None = None
    must_ask: bool = False
    use_vendored: bool = True
    permissions: Permissions = NO_PERMISSIONS


@dataclass(frozen=True, kw_only=True)
class GraphInputs:
    """The inputs of a graph. Without a workload, nothing is measured; `quantization` is the one that the graph
    counts.
    """

    source: ModelSource
    class_name: str
    dtype: str
    attention: str | None = None
    workload: WorkloadShape | None = None
    quantization: Quantization | None = None
    adapter: LoraAdapter | None = None
    trust_remote_code: bool = False

    def compared(self) -> Mapping[str, object]:
        """Return the values that identify a graph's inputs, by their names in messages."""
        return {
            "config": self.source.config_digest,
            "class": self.class_name,
            "dtype": self.dtype,
            "attention": self.attention,
            "workload": self.workload,
            "quantization": _quantization_json(self.quantization),
            "adapter": _adapter_digest(self.adapter),
        }


def load_model_graph(loaded: LoadedProfile, lookup: Lookup, sink: Sink) -> LoadedModel | None:
    """Build, measure or look up the module tree of the model that a profile names.

    Args:
        loaded: the profile.
        lookup: the rules by which the model is looked up.
        sink: takes the diagnostics.

    Returns:
        The model with sizes in bytes, or `None` if it cannot be built.
    """
    try:
        model = _load_model_graph(loaded, lookup, sink)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LIBRARIES_FOR_GRAPHS:
            raise
        sink.error(
            "torch-missing",
            f"the model's graph has to be made, and {error.name} is not installed",
            loaded.profile.model.source.span,
            help=f"run `devmap compile --vendor {loaded.path}` where torch and transformers are, "
            f"and commit `{vendored_path(loaded.path).name}`",
        )
        return None
    if model is not None:
        _warn(loaded, model, lookup.permissions, sink)
    return model


def _load_model_graph(loaded: LoadedProfile, lookup: Lookup, sink: Sink) -> LoadedModel | None:
    vendored = graph_beside(loaded, sink) if lookup.use_vendored else None
    if vendored is not None and not is_local(loaded):
        source: ModelSource | None = with_checkpoint(source_beside(vendored, loaded))  # this does not ask the hub
    else:
        source = _find_source(loaded, lookup, sink)
    if source is None:
        return None
    profile_model = loaded.profile.model
    try:
        adapter = _find_adapter(loaded)
    except AdapterError as error:
        sink.error("bad-adapter", str(error), _adapter_span(loaded), help=error.help)
        return None
    class_name = profile_model.class_name.value or source.class_name
    if class_name is None:
        sink.error(
            "no-architecture",
            "the model's config does not name its class",
            profile_model.source.span,
            help="name it: `class: AutoModelForCausalLM`",
        )
        return None
    quantization = effective_quantization(
        profile_model.quantization.value, source.config, has_accelerator=_has_accelerator(loaded)
    )
    try:
        is_counted = quantization is not None and quantization.format() is not None
    except QuantizationError as error:
        sink.error("bad-quantization", str(error), profile_model.quantization.span, help=error.help)
        if quantization is not None and quantization.is_prequantized:
            return None
        quantization, is_counted = None, False  # the model without it shows the other mistakes
    try:
        workload = workload_of(loaded, source, None if vendored is None else vendored.workload)
    except UnknownTilesError as error:
        sink.error(
            "unfit-input",
            f"the processor of this model cuts an image into tiles, and into how many is not known: {error}",
            loaded.profile.workload.inputs.span,
            help="have the processor's files beside the config; or leave `image_size` out, and say as many `images` as"
            " there are tiles",
        )
        return None
    inputs = GraphInputs(
        source=source,
        class_name=class_name,
        dtype=source.dtype_for(profile_model.dtype.value),
        attention=profile_model.attention if "attention" in profile_model.model_fields_set else None,
        workload=workload,
        quantization=quantization if is_counted else None,
        adapter=adapter,
        trust_remote_code=lookup.permissions.trust_remote_code,
    )
    made_from = None if vendored is None else inputs_beside(vendored, loaded)
    if vendored is not None and made_from is not None and inputs.compared() == made_from:
        graph, dry_runs = vendored.graph, vendored.dry_runs
    else:
        if made_from is not None:
            warn_of_stale_graph(loaded, sink, _differing(inputs.compared(), made_from))
        built, dry_runs = _built(inputs, loaded, sink), {}
        if built is None:
            return None
        graph = built
    graph = replace(graph, loading=_loading_facts(graph, source, inputs.dtype, quantization))
    return LoadedModel(graph, source, class_name, inputs.dtype, inputs.attention, quantization, dry_runs, adapter)


def _find_adapter(loaded: LoadedProfile) -> LoraAdapter | None:
    """Return the adapter that a profile names.

    Raises:
        AdapterError: if there is none, or it cannot be used.
    """
    adapter = loaded.profile.model.adapter
    if adapter is None:
        return None
    return find_adapter(adapter.source.value, adapter.source.path, adapter.revision, loaded.boundary)


def _adapter_span(loaded: LoadedProfile) -> Span | None:
    adapter = loaded.profile.model.adapter
    return None if adapter is None else adapter.source.span


def _adapter_digest(adapter: LoraAdapter | None) -> str | None:
    return None if adapter is None else adapter.config.digest


def _loading_facts(
    graph: ModelGraph, source: ModelSource, dtype: str, quantization: Quantization | None
) -> LoadingFacts:
    """Return the facts about loading from the config alone, so that a lock holds even without the checkpoint."""
    quantises = quantization is not None and "quantization_config" not in source.config
    item_bytes = 0
    if quantization is not None and quantises:
        item_bytes = quantization.method.copies(quantization, ITEM_BYTES.get(dtype, 4)).quantising
    return LoadingFacts(
        merged=frozenset(graph.merged),
        stored_dtype=source.checkpoint_dtype() or dtype,
        dtype=dtype,
        quantises=quantises,
        quantising_item_bytes=item_bytes,
        method=None if quantization is None else quantization.method.name,
        running=None if quantization is None else quantization.running,
    )


def vendor(loaded: LoadedProfile, model: LoadedModel, dry_runs: Mapping[str, Any]) -> VendoredGraph:
    """Return the graph to store beside a profile, so that compiling does not need the model."""
    measured = model.graph.measurement
    return VendoredGraph(
        graph=model.graph,
        config=model.source.config,
        source=loaded.profile.model.source.value,
        revision=loaded.profile.model.revision,
        commit=model.source.commit,
        class_name=model.class_name,
        dtype=model.dtype,
        attention=model.attention,
        workload=workload_of(loaded, model.source, None if measured is None else measured.workload),
        quantization=_quantization_json(model.quantization if model.is_counted else None),
        adapter=_adapter_digest(model.adapter),
        dry_runs=dry_runs,
        stored_dtype=model.source.stored_dtype,
        checkpoint=model.source.checkpoint_digest,
    )


def _built(inputs: GraphInputs, loaded: LoadedProfile, sink: Sink) -> ModelGraph | None:
    try:
        return graph_from_source(inputs)
    except QuantizationError as error:
        sink.error("bad-quantization", str(error), loaded.profile.model.quantization.span, help=error.help)
        return None
    except AdapterError as error:
        sink.error("bad-adapter", str(error), _adapter_span(loaded), help=error.help)
        return None
    except UntrustedCodeError as error:
        sink.error("remote-code", str(error), loaded.profile.model.source.span, help=READ_IT_FIRST)
        return None
    except LibraryChangedError as error:
        report_failure(
            failure_of(error), "the model cannot be read", loaded.profile.model.source.span, sink, allowed=None
        )
        return None
    except UnbuildableModelError as error:
        model = loaded.profile.model
        sink.error(
            "unsupported-model",
            f"transformers cannot build this model: {error}",
            model.class_name.span if model.class_name.value else model.source.span,
            help=_building_advice(str(error)),
        )
        return None


def _differing(inputs: Mapping[str, object], made_from: Mapping[str, object]) -> str:
    return " and ".join(name for name, value in inputs.items() if value != made_from[name])


def graph_from_source(inputs: GraphInputs) -> ModelGraph:
    """Return the graph of a model, from the cache if it is there.

    Raises:
        UntrustedCodeError: if only code that comes with it can build it, and it may not run.
        UnbuildableModelError: if transformers cannot build it.
        AdapterError: if the adapter does not fit the model.
        QuantizationError: if the quantization's arguments cannot be meant.
    """
    source, workload, quantization = inputs.source, inputs.workload, inputs.quantization

    def make() -> ModelGraph:
        if workload is not None and (shared := _measured_alike(key, workload)) is not None:
            return shared
        with source.as_config() as config_path:
            return build_graph(
                config_path,
                class_name=inputs.class_name,
                dtype=inputs.dtype,
                attention=buildable_attention(inputs.attention),
                workload=workload,
                trust_remote_code=inputs.trust_remote_code,
                repository=source.repository,
                quantization=quantization,
                adapter=None if inputs.adapter is None else inputs.adapter.config,
            )

    key: dict[str, object] = {"config": source.config_digest, "class": inputs.class_name, "dtype": inputs.dtype}
    if workload is not None:
        key |= {"workload": workload.to_json(), "attention": inputs.attention}
    if quantization is not None and quantization.format() is not None:
        key["quantization"] = quantization.to_json()
    if inputs.adapter is not None:
        key["adapter"] = inputs.adapter.config.digest
    # Code that comes with a model may change without its config.
    graph = make() if inputs.trust_remote_code else cached_graph(key, make)
    apart = source.stored_apart(graph.ties)
    return replace(graph, ties=tuple(tie for tie in graph.ties if tie not in apart)) if apart else graph


MEASURED_ALIKE: Mapping[str, tuple[str, ...]] = {"dynamic": (PARTLY, "offloaded"), "offloaded": (PARTLY,)}
"""By kind of cache, other kinds that are measured by the same runs, of which more is recorded: measuring moves nothing,
and so fills transformers' dynamic cache for each.
"""


def _measured_alike(key: dict[str, object], workload: WorkloadShape) -> ModelGraph | None:
    """Return the graph that follows from a cached one whose workload differs in the kind of cache, if there is one."""
    for cache in MEASURED_ALIKE.get(workload.cache, ()):
        graph = graph_if_cached({**key, "workload": replace(workload, cache=cache).to_json()})
        if graph is not None and graph.measurement is not None and graph.measurement.measured:
            return replace(graph, measurement=graph.measurement.with_cache(workload.cache))
    return None


def _find_source(loaded: LoadedProfile, lookup: Lookup, sink: Sink) -> ModelSource | None:
    source, revision = loaded.profile.model.source, loaded.profile.model.revision
    text, span, path = source.value, source.span, source.path
    try:
        if exists(path):
            if not loaded.boundary.holds(path):
                sink.error(
                    "outside-repository",
                    f"`{text}` lies outside of the repository",
                    span,
                    help="keep the model's config in the repository, or pass `--allow-outside`",
                )
                return None
            return local_source(path, loaded.boundary)
        if text.startswith(("./", "../", "/")) or text.endswith(".json") or not is_hub_id(text):
            sink.error(
                "model-not-found",
                f"there is no `{text}`",
                span,
                help=advice_on_missing(text, path)
                or "paths are relative to the file that writes them; else name a hub id such as `Qwen/Qwen2.5-7B`",
            )
            return None
        known = lookup.resolved if lookup.resolved is not None and lookup.resolved.holds_for(text, revision) else None
        model_source = hub_source(text, revision, commit=known.commit if known else None, must_ask=lookup.must_ask)
        same = known is not None and known.commit == model_source.commit
        return replace(model_source, known_checkpoint=known.checkpoint) if known is not None and same else model_source
    except CheckpointError as error:
        sink.error(error.code, str(error), span, help=error.help)
        return None
    except ModelNotFoundError as error:
        sink.error(
            "model-not-found",
            str(error),
            span,
            help=error.help
            or advice_on_missing(text, path)
            or "without a network, keep its config.json in the repository, and name that folder as `model.source`",
        )
        return None


def _has_accelerator(loaded: LoadedProfile) -> bool:
    return any(device.is_accelerator for device in loaded.profile.hardware.listed)


def _quantization_json(quantization: Quantization | None) -> dict[str, object] | None:
    return None if quantization is None else quantization.to_json()


def _warn(loaded: LoadedProfile, model: LoadedModel, permissions: Permissions, sink: Sink) -> None:
    source, graph, allowed = model.source, model.graph, permissions.allow_unmeasured
    if permissions.trust_remote_code:
        _warn_of_code_left_out(model, loaded.profile.model.source.span, sink)
    if loaded.profile.model.dtype.value == "auto" and source.checkpoint_dtype() is None:
        sink.warning(
            "unknown-dtype",
            f"neither config nor checkpoint states the dtype: {ASSUMED_DTYPE} is assumed",
            loaded.profile.model.dtype.span,
            help="write `dtype: bfloat16`, or what the checkpoint holds",
        )
    if not model.is_counted:
        sink.warning(
            "quantization-not-measured",
            "the plan counts the weights as they are before quantization: it is an upper bound",
            loaded.profile.model.quantization.span,
            help="nothing needs to change: the plan leaves room; docs/quantization.md lists what is counted exactly",
        )
    if graph.unread is not None:
        report_unread(graph, graph.unread, loaded.profile.model.source.span, sink, allowed=allowed)
    workload = loaded.profile.workload
    asks_for_more = bool(workload.inputs.images or workload.inputs.audio_seconds)
    if asks_for_more and workload.context_length.value is None and "context_length" not in workload.doubtful:
        sink.error(
            "unused-key",
            "`inputs` has no effect without `context_length`: only weights are budgeted then",
            workload.inputs.span,
            help="name what the prompt and its answer take: `workload: {context_length: 4096}`",
        )
    is_asked_for = workload.cache.implementation not in ("dynamic", "static") and not workload.cache.doubtful
    if is_asked_for and workload.context_length.value is None and "context_length" not in workload.doubtful:
        sink.error(
            "unused-key",
            "`cache` has no effect without `context_length`: only weights are budgeted then",
            workload.cache.span,
            help="name what the prompt and its answer take: `workload: {context_length: 4096}`",
        )
    if graph.measurement is not None:
        report_positions(graph.measurement, workload.context_length.span, sink)
        if not workload.inputs.doubtful:
            report_media(graph.measurement, workload.inputs.span, sink)
        if not workload.cache.doubtful:
            report_cache(graph.measurement, workload.cache.span, sink)
        report_unmeasured(graph.measurement, workload.span, sink, allowed=allowed)


def _warn_of_code_left_out(model: LoadedModel, span: Span | None, sink: Sink) -> None:
    """Warn that code is allowed to run but does not: the config uses a class of transformers."""
    files, name = code_files(model.source.config), model.class_name
    if files and not name.startswith("Auto") and class_reference(model.source.config, name) is None:
        sink.warning(
            "remote-code",
            f"transformers' own `{name}` is used, and none of the code that the config names: {listed(files)}",
            span,
            help="to run that code, name its class, or the Auto class that `auto_map` gives it, as `class`",
        )


def _building_advice(reason: str) -> str:
    if "attn_implementation" in reason or "scaled_dot_product_attention" in reason:
        return "write `attention: eager`"
    return "check `class`, and that this version of transformers knows the model"
