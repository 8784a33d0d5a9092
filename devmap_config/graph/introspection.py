"""Reads a `ModelGraph` off the real model, built by transformers on the meta device: no weights, no memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from devmap_config.graph.estimation import estimate
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorKind, TensorName
from devmap_config.graph.quantization import METHODS, Storage, quantized, stored_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from devmap_config.graph.costs import Measurement, Workload
    from devmap_config.graph.quantization import Quantization


class UnbuildableModelError(Exception):
    """transformers cannot build this model here; the text says why."""


def build_graph(
    config_path: Path,
    *,
    class_name: str,
    dtype: str,
    attention: str | None,
    workload: Workload | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> ModelGraph:
    """The graph of the model that `config_path` describes.

    Args:
        config_path: a `config.json`, or the directory that holds it.
        class_name: an Auto class or a concrete class of transformers.
        dtype: torch's name of the dtype in which the model is to be loaded.
        attention: transformers' `attn_implementation`; `None` for the one that it chooses itself.
        workload: what is to be measured besides the tree; where the model's code cannot be run without data,
            formulas stand in for the measurement, which says so.
        trust_remote_code: whether code that comes with the model may run.
        quantization: how its weights are quantised once loaded.

    Raises:
        UnbuildableModelError: where transformers does not know the architecture, or does not accept the config.
        QuantizationError: where the quantization's arguments cannot be meant.
        ModuleNotFoundError: where torch or transformers is not installed.
    """
    model = meta_model(
        config_path, class_name=class_name, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    import torch

    graph = graph_of(model, getattr(torch, dtype), quantization)
    if workload is None:
        return graph
    converted = {} if quantization is None else stored_tensors(model, quantization)
    measurement = _measured(model, graph, workload)
    if converted and quantization is not None:
        dense_bytes = {name: graph.tensors[TensorName(name)].element_count * model.dtype.itemsize for name in converted}
        measurement = quantized(measurement, graph, dense_bytes, dequantizes=METHODS[quantization.method].dequantizes)
    return replace(graph, measurement=measurement)


def meta_model(
    config_path: Path, *, class_name: str, dtype: str, attention: str | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model on the meta device; the arguments are those of `build_graph`.

    Raises:
        UnbuildableModelError: where transformers does not know the architecture, or does not accept the config.
    """
    try:
        import torch
        from transformers import AutoConfig
    except ModuleNotFoundError:  # of which the caller speaks: the model is not to blame
        raise
    except Exception as error:
        raise UnbuildableModelError(f"{type(error).__name__}: {_first_line(error)}") from error
    try:
        config = AutoConfig.from_pretrained(str(config_path), trust_remote_code=trust_remote_code)
        model_class = resolve_class(class_name, config, trust_remote_code=trust_remote_code)
        return build_meta_model(model_class, config, getattr(torch, dtype), attention)
    except UnbuildableModelError:
        raise
    except Exception as error:  # whatever a model's own code raises on a config that it does not accept
        raise UnbuildableModelError(f"{type(error).__name__}: {_first_line(error)}") from error


def _measured(model: PreTrainedModel, graph: ModelGraph, workload: Workload) -> Measurement:
    from devmap_config.graph.measurement import UnmeasurableModelError, measure

    text_config = model.config.get_text_config(decoder=True)
    try:
        return measure(model, graph, workload)
    except UnmeasurableModelError as error:
        return estimate(graph, text_config.to_dict(), workload, reason=str(error))


def resolve_class(class_name: str, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """The concrete model class that `class_name` means for this config."""
    import transformers

    found = getattr(transformers, class_name, None)
    if found is None:
        raise UnbuildableModelError(f"transformers {transformers.__version__} has no class `{class_name}`")
    if not hasattr(found, "_model_mapping"):
        return found
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and class_name in remote:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote[class_name], config.name_or_path)
    mapping = found._model_mapping  # noqa: SLF001 - the public `from_config` would build, and initialise, the model
    if type(config) not in mapping:
        raise UnbuildableModelError(f"`{class_name}` has no model for `{config.model_type}`")
    candidates = mapping[type(config)]
    if not isinstance(candidates, (list, tuple)):
        return candidates
    named = [candidate for candidate in candidates if candidate.__name__ in (config.architectures or [])]
    return (named or list(candidates))[0]


def build_meta_model(
    model_class: Any, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None = None
) -> PreTrainedModel:
    """The model on the meta device, in the state in which `from_pretrained` plans its device map."""
    if attention is not None:
        config._attn_implementation = attention  # noqa: SLF001 - as `from_pretrained` does
    config.dtype = dtype
    for key in config.sub_configs:
        if (sub_config := getattr(config, key, None)) is not None:
            sub_config.dtype = dtype
    with ExitStack() as stack:
        for context in model_class.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model: PreTrainedModel = model_class(config)
    return model


def graph_of(model: PreTrainedModel, dtype: torch.dtype, quantization: Quantization | None = None) -> ModelGraph:
    """The graph of a model that exists, on the meta device or a real one, as if loaded in `dtype` and quantised."""
    loaded_dtypes = _kept_dtypes(model, dtype)
    stored = {} if quantization is None else stored_tensors(model, quantization)
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
        return Tensor(
            name=TensorName(name),
            shape=tuple(value.shape),
            dtype=held.dtype,
            size_bytes=held.size_bytes,
            planner_bytes=held.planner_bytes,
            kind=kind,
            persistent=persistent,
            alias_of=first if first != name else None,
        )

    def module_of(module: torch.nn.Module, path: str) -> Module:
        prefix = f"{path}." if path else ""
        transient = module._non_persistent_buffers_set  # noqa: SLF001 - torch has no public name for it
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

    no_placement = getattr(model, "_no_placement_params", None)
    return ModelGraph(
        root=module_of(model, ""),
        ties=tuple((TensorName(target), TensorName(source)) for target, source in _ties(model).items()),
        no_split_classes=tuple(sorted(model._no_split_modules or ())),  # noqa: SLF001
        no_placement_parameters=None if no_placement is None else tuple(sorted(no_placement)),
        skip_keys=tuple(sorted(_as_names(model._skip_keys_device_placement))),  # noqa: SLF001
    )


def _ties(model: PreTrainedModel) -> Mapping[str, str]:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return ties


def _as_names(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif value is not None:
        yield from value  # type: ignore[misc]  # a list or a set of names


def _kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors that transformers loads in another dtype than asked for (`_keep_in_fp32_modules`)."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)  # noqa: SLF001
    if not plan:
        return {}
    from transformers.core_model_loading import build_glob_alternation

    alternation, pattern_of_group, _ = build_glob_alternation(list(plan))
    kept: dict[str, torch.dtype] = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and (match := alternation.search(name)):
            kept[name] = plan[pattern_of_group[match.lastgroup]]
    return kept


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")
