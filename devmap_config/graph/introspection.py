"""Reads a `ModelGraph` from the real model, which transformers builds on the meta device, without weights or memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.graph.config_values import doubtful_values, unreasonable_number
from devmap_config.graph.estimation import estimate
from devmap_config.graph.failures import failure_of
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorKind, TensorName
from devmap_config.graph.quantized_costs import quantized
from devmap_config.graph.remote_code import class_reference, code_files, fails_without, hub_kernel, not_run
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.libraries.remote_code import class_from_code, code_of_models
from devmap_config.libraries.torch import non_persistent_buffers, telling_of_parts
from devmap_config.libraries.transformers import (
    init_contexts,
    is_auto_class,
    is_made_while_loading,
    kept_dtypes,
    model_mapping,
    no_placement_parameters,
    no_split_classes,
    set_attention,
    skip_keys,
    ties,
)
from devmap_config.quantization.storage import Storage, stored_tensors
from devmap_config.wording import closest, first_line, first_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from devmap_config.graph.adapter import AdapterConfig
    from devmap_config.graph.costs import Measurement, WorkloadShape
    from devmap_config.quantization.method import Copies, Quantization


class UnbuildableModelError(Exception):
    """transformers cannot build this model here; the text says why."""


class UntrustedCodeError(UnbuildableModelError):
    """The model cannot be built without the code that comes with it, which was not allowed to run."""


def build_graph(
    config_path: Path,
    *,
    class_name: str,
    dtype: str,
    attention: str | None,
    workload: WorkloadShape | None = None,
    trust_remote_code: bool = False,
    repository: tuple[str, str] | None = None,
    quantization: Quantization | None = None,
    adapter: AdapterConfig | None = None,
) -> ModelGraph:
    """Return the graph of the model that `config_path` describes.

    Args:
        config_path: a `config.json`, or the directory that holds it.
        class_name: an Auto class or a concrete class of transformers.
        dtype: torch's name of the dtype in which the model is to be loaded.
        attention: transformers' `attn_implementation`; `None` for the one that it chooses itself.
        workload: the workload to measure; if the model's code cannot be run without data, formulas replace the
            measurement, which says so.
        trust_remote_code: whether code that comes with the model may run.
        repository: the hub id and commit of the config, from which its code is fetched.
        quantization: the quantization of its weights when they are loaded.
        adapter: the adapter that is added to it when it is loaded.

    Raises:
        UnbuildableModelError: if transformers does not know the architecture, or does not accept the config.
        AdapterError: if the adapter does not fit the model.
        LibraryChangedError: if a library lacks something that reading a model needs.
        QuantizationError: if the quantization's arguments are invalid.
        ModuleNotFoundError: if torch or transformers is not installed.
    """
    model = meta_model(
        config_path,
        class_name=class_name,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        repository=repository,
    )
    import torch

    converted = stored_tensors(model, quantization)  # before the adapter is added, in the same order as loading does
    if adapter is not None:
        _adapt(model, adapter)
    graph = graph_of(model, getattr(torch, dtype), stored=converted)
    if workload is None:
        return graph
    with code_of_models(allowed=trust_remote_code):
        measurement = _measured(model, graph, workload)
    if converted and quantization is not None:
        elements = {name: graph.tensors[TensorName(name)].element_count for name in converted}
        dense_bytes = {name: count * model.dtype.itemsize for name, count in elements.items()}
        copies = _copies(quantization, model.dtype)
        copy_bytes = {name: count * copies.multiplying for name, count in elements.items()}
        measurement = quantized(
            measurement, graph, dense_bytes, copy_bytes, copies_for_each_token=copies.for_each_token
        )
    return replace(graph, measurement=measurement)


def _copies(quantization: Quantization, dtype: torch.dtype) -> Copies:
    """Return the dense copies of quantised weights that modules make for their products."""
    import torch

    computes_in = quantization.computes_in
    computing: torch.dtype = dtype if computes_in is None else getattr(torch, computes_in)
    return quantization.method.copies(quantization, computing.itemsize)


def meta_model(
    config_path: Path,
    *,
    class_name: str,
    dtype: str,
    attention: str | None,
    trust_remote_code: bool = False,
    repository: tuple[str, str] | None = None,
    adapter: AdapterConfig | None = None,
) -> PreTrainedModel:
    """Return the model on the meta device; the arguments are those of `build_graph`.

    Raises:
        AdapterError: if the adapter does not fit the model.
        UntrustedCodeError: if only code that comes with the model can build it, and it may not run.
        UnbuildableModelError: if transformers does not know the architecture, or does not accept the config.
    """
    try:
        import torch
    except ModuleNotFoundError:  # the caller reports it: the model is not to blame
        raise
    except Exception as error:
        raise UnbuildableModelError(f"{type(error).__name__}: {first_line(error)}") from error
    with code_of_models(allowed=trust_remote_code):
        config, model_class = config_and_class(
            config_path, class_name, trust_remote_code=trust_remote_code, repository=repository
        )
        try:
            model = build_meta_model(model_class, config, getattr(torch, dtype), attention)
        except Exception as error:  # a model's own code may raise anything on a config that it does not accept
            stated, _ = config.get_config_dict(str(config_path))
            raise _unbuildable(error, stated, class_name, trust_remote_code) from error
    if adapter is not None:
        _adapt(model, adapter)
    return model


def _adapt(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    from devmap_config.graph.adapted import adapt

    adapt(model, adapter)


def config_and_class(
    config_path: Path, class_name: str, *, trust_remote_code: bool = False, repository: tuple[str, str] | None = None
) -> tuple[PreTrainedConfig, Any]:
    """Return the model's config and its concrete class: those that `from_pretrained` takes.

    If code that comes with the model may run, the class may be one of that code.

    Raises:
        UntrustedCodeError: if only code that comes with the model has them, and it may not run.
        UnbuildableModelError: if transformers does not know the architecture, or does not accept the config.
    """
    stated: dict[str, Any] = {}
    try:
        with code_of_models(allowed=trust_remote_code):
            from transformers import AutoConfig, PreTrainedConfig

            stated, _ = PreTrainedConfig.get_config_dict(str(config_path))
            _check_config(stated, trust_remote_code)
            reference = class_reference(stated, class_name) if trust_remote_code else None
            with_code = reference is not None or (
                trust_remote_code and bool(code_files(stated)) and not _is_own(class_name)
            )
            location, revision = _where_code_is(config_path, repository) if with_code else (str(config_path), None)
            config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=with_code)
            if reference is not None:
                return config, class_from_code(reference, location, revision)
            return config, resolve_class(class_name, config)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("torch", "transformers"):
            raise
        raise _unbuildable(error, stated, class_name, trust_remote_code) from error
    except Exception as error:  # transformers, or a model's own code, may raise anything
        raise _unbuildable(error, stated, class_name, trust_remote_code) from error


def _check_config(stated: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise if a config has an impossible number, or would fetch code from the hub without asking.

    Such code is fetched only if it may run.
    """
    if (problem := unreasonable_number(stated)) is not None:
        raise UnbuildableModelError(f"in its config {problem}")
    if not trust_remote_code and hub_kernel(stated) is not None:
        raise UntrustedCodeError(not_run(stated))


def _unbuildable(
    error: Exception, stated: dict[str, Any], class_name: str, trust_remote_code: bool
) -> UnbuildableModelError:
    """Return the error for a config and a class from which no model can be built."""
    has_none = isinstance(error, UnbuildableModelError) and class_reference(stated, class_name) is not None
    if not trust_remote_code and (has_none or fails_without(stated, class_name, error)):
        return UntrustedCodeError(not_run(stated))
    if isinstance(error, LibraryChangedError):
        raise error
    if isinstance(error, UnbuildableModelError):
        return UnbuildableModelError(str(error))
    doubtful = first_of(tuple(doubtful_values(stated, _usual_config(stated))))
    likely = f"; of its config, {doubtful}" if doubtful else ""
    return UnbuildableModelError(f"{type(error).__name__}: {first_line(error)}{likely}")


def _usual_config(stated: dict[str, Any]) -> dict[str, Any]:
    """Return the default config of this type; empty if the type is unknown."""
    try:
        from transformers import CONFIG_MAPPING

        usual: dict[str, Any] = CONFIG_MAPPING[stated["model_type"]]().to_dict()
    except Exception:  # the type may be anything, and a config may need arguments
        return {}
    return usual


def _where_code_is(config_path: Path, repository: tuple[str, str] | None) -> tuple[str, str | None]:
    """Return the folder, or the repository and its commit, from which transformers takes the code for a config."""
    if repository is not None:
        return repository
    return str(config_path.parent if config_path.name == "config.json" else config_path), None


def _is_own(class_name: str) -> bool:
    """Return whether a class is a concrete one of transformers, with a config of transformers."""
    import transformers

    model_class = getattr(transformers, class_name, None)
    return model_class is not None and not is_auto_class(model_class)


def _measured(model: PreTrainedModel, graph: ModelGraph, workload: WorkloadShape) -> Measurement:
    text_config = model.config.get_text_config(decoder=True)
    try:
        from devmap_config.graph.measurement import UnmeasurableModelError, measure
    except LibraryChangedError as error:  # a library lacks something that every measurement needs
        return estimate(graph, text_config.to_dict(), workload, failure_of(error))
    try:
        return measure(model, graph, workload)
    except UnmeasurableModelError as error:
        return replace(estimate(graph, text_config.to_dict(), workload, error.failure), positions=error.positions)


RENAMED_CLASSES = {
    "AutoModelForVision2Seq": "AutoModelForImageTextToText",
    "AutoModelWithLMHead": "AutoModelForCausalLM",
}
"""The replacements of classes that transformers 5 has removed."""


def resolve_class(class_name: str, config: PreTrainedConfig) -> Any:
    """Return the concrete class of transformers that `class_name` resolves to for this config."""
    import transformers

    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        close = RENAMED_CLASSES.get(class_name) or closest(class_name, dir(transformers))
        hint = f"; did you mean `{close}`?" if close else ""
        raise UnbuildableModelError(f"transformers {transformers.__version__} has no class `{class_name}`{hint}")
    if not is_auto_class(model_class):
        return model_class
    mapping = model_mapping(model_class)  # the public `from_config` would build and initialise the model
    if type(config) not in mapping:
        raise UnbuildableModelError(f"`{class_name}` has no model for `{config.model_type}`")
    candidates = mapping[type(config)]
    if not isinstance(candidates, (list, tuple)):
        return candidates
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or [])]
    return (named or list(candidates))[0]


MOST_PARTS = 500_000
"""The most modules and parameters of a model; the largest of transformers has 430,000 (switch-c-2048)."""


@dataclass
class _Parts:
    made: int = 0

    def count(self) -> None:
        self.made += 1
        if self.made > MOST_PARTS:
            raise UnbuildableModelError(f"it has more than {MOST_PARTS:,} modules and parameters")


def build_meta_model(
    model_class: Any, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """Return the model on the meta device, in the state in which `from_pretrained` plans its device map."""
    if attention is not None:
        set_attention(config, attention)
    config.dtype = dtype
    for key in config.sub_configs:
        if (sub_config := getattr(config, key, None)) is not None:
            sub_config.dtype = dtype
    with ExitStack() as stack:
        for context in init_contexts(model_class, dtype):
            stack.enter_context(context)
        stack.enter_context(telling_of_parts(_Parts().count))
        model: PreTrainedModel = model_class(config)
    return model


def graph_of(
    model: PreTrainedModel,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    *,
    stored: Mapping[str, Storage] | None = None,
) -> ModelGraph:
    """Return the graph of a model on the meta device or a real one, as if it were loaded in `dtype` and quantised.

    `stored` holds the quantised storage of tensors, if it is known already.
    """
    loaded_dtypes = kept_dtypes(model, dtype)
    stored = stored_tensors(model, quantization) if stored is None else stored
    first_names: dict[int, TensorName] = {}

    def tensor_of(name: str, value: torch.Tensor, kind: TensorKind, persistent: bool) -> Tensor:
        loaded_dtype = loaded_dtypes.get(name, value.dtype)
        first = first_names.setdefault(id(value), TensorName(name))
        dense = Storage(
            dtype=str(loaded_dtype).removeprefix("torch."),
            size_bytes=value.numel() * loaded_dtype.itemsize,
            planner_bytes=value.numel() * value.element_size(),
        )
        held = stored.get(name, dense)
        is_dense_offloaded = name in stored and held.is_dense_where_offloaded
        return Tensor(
            name=TensorName(name),
            shape=tuple(value.shape),
            dtype=held.dtype,
            size_bytes=held.size_bytes,
            planner_bytes=held.planner_bytes,
            kind=kind,
            persistent=persistent,
            alias_of=first if first != name else None,
            in_buffer=held.in_buffer,
            offloaded_bytes=dense.size_bytes if is_dense_offloaded else None,
        )

    def module_of(module: torch.nn.Module, path: str) -> Module:
        prefix = f"{path}." if path else ""
        transient = non_persistent_buffers(module)
        return Module(
            path=ModulePath(path),
            class_name=type(module).__name__,
            parameters=tuple(
                tensor_of(prefix + name, value, "parameter", persistent=True)
                for name, value in module.named_parameters(recurse=False)
            ),
            buffers=tuple(
                tensor_of(prefix + name, value, "buffer", persistent=name not in transient)
                for name, value in module.named_buffers(recurse=False)
            ),
            children=tuple(module_of(child, prefix + name) for name, child in module.named_children()),
        )

    merged, unread = _made_while_loading(model)
    return ModelGraph(
        root=module_of(model, ""),
        ties=tuple((TensorName(target), TensorName(source)) for target, source in ties(model).items()),
        no_split_classes=no_split_classes(model),
        no_placement_parameters=no_placement_parameters(model),
        skip_keys=tuple(sorted(_as_names(skip_keys(model)))),
        merged=merged,
        unread=unread,
    )


def _made_while_loading(model: PreTrainedModel) -> tuple[tuple[TensorName, ...], str | None]:
    """Return the parameters that transformers merges from several tensors while loading, or why they are unknown."""
    try:
        made = is_made_while_loading(model, [name for name, _ in model.named_parameters()])
    except LibraryChangedError as error:
        return (), failure_of(error).reason
    return tuple(map(TensorName, made)), None


def _as_names(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        yield from value  # type: ignore[misc]  # a list or a set of names
