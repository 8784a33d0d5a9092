"""The uses of private parts of transformers. Imports transformers when they are called."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from devmap_config.libraries.private import Private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch
    from transformers import CompileConfig, PreTrainedConfig, PreTrainedModel

# -- the cache ---------------------------------------------------------------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names under which models return and take their cache: the first since transformers 5.24, the others in older
code that comes with models.
"""

CACHE_CLASS = Private("transformers.Cache", "recognises a cache among the outputs of a model")


def unnamed_cache(output: Any) -> str | None:
    """Return the name under which a model returned a cache, if it did."""
    class_ = CACHE_CLASS.find()
    items = output.items() if hasattr(output, "items") else ()
    return next((name for name, value in items if isinstance(value, class_)), None)


STATES = ("conv_states", "recurrent_states")
"""The states of layers with linear attention, in addition to keys and values or instead of them."""

TAKES_CACHES = Private(
    "transformers.GenerationMixin._supports_default_dynamic_cache",
    "tells whether `generate` makes the cache that was asked for, or the model makes its own",
)
QUANTO_LAYER = Private(
    "transformers.cache_utils.QuantoQuantizedLayer", "patched, since the package quanto need not be installed"
)
QUANTIZED_LAYER = Private(
    "transformers.cache_utils.QuantizedLayer",
    "decides when a layer of a cache is quantised, and returns its keys and values",
)


def supports_caches(model: PreTrainedModel) -> bool:
    """Return whether `generate` supports choosing a cache for a model."""
    supports: bool = TAKES_CACHES.of(model)()
    return supports


@contextmanager
def quantizing_layers(quantize: Callable[..., tuple[Any, ...]], dequantize: Callable[..., Any]) -> Iterator[None]:
    """Let caches be quantised without quanto while the context lasts, by `quantize` and `dequantize`."""
    base: Any = QUANTIZED_LAYER.find()

    class Layer(base):  # type: ignore[misc]
        __module__ = base.__module__  # so that a cache counts as transformers' own

        def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[Any, ...]:
            del axis  # groups are the same on either axis
            return (*quantize(tensor, self.nbits), tensor.shape)

        def _dequantize(self, made: tuple[Any, ...]) -> Any:
            return dequantize(*made[:-1], bits=self.nbits, shape=made[-1])

    QUANTO_LAYER.find()
    with patch(QUANTO_LAYER.name, Layer):
        yield


def is_own_model(model: Any) -> bool:
    """Return whether a model's class is one of transformers, rather than of code that comes with the model."""
    return type(model).__module__.startswith("transformers.")


# -- building a model --------------------------------------------------------------------------------------------------

MODEL_MAPPING = Private(
    "transformers.AutoModel._model_mapping",
    "the class that an Auto class chooses; the public `from_config` would build and initialise the model",
)
INIT_CONTEXT = Private(
    "transformers.PreTrainedModel.get_init_context",
    "the contexts in which `from_pretrained` builds a model on the meta device",
)
ATTENTION = Private(
    "transformers.PreTrainedConfig._attn_implementation", "the attention implementation, as `from_pretrained` sets it"
)


def is_auto_class(class_: Any) -> bool:
    """Return whether a class of transformers selects another class by the config."""
    return hasattr(class_, MODEL_MAPPING.attribute)


def model_mapping(auto_class: Any) -> Mapping[Any, Any]:
    """Return the model classes that an Auto class stands for, by config class."""
    mapping: Mapping[Any, Any] = MODEL_MAPPING.of(auto_class)
    return mapping


def init_contexts(model_class: Any, dtype: torch.dtype) -> Iterable[Any]:
    """Return the contexts in which `from_pretrained` builds a model before loading weights."""
    contexts: Iterable[Any] = INIT_CONTEXT.of(model_class)(dtype, False, False, None)
    return contexts


def set_attention(config: PreTrainedConfig, implementation: str) -> None:
    """Have a model of this config built with an implementation of attention."""
    setattr(config, ATTENTION.attribute, implementation)


def attention_of(config: Any) -> str | None:
    """Return the implementation of attention that a config has been given, if any."""
    return getattr(config, ATTENTION.attribute, None)


# -- what a model says of its placing ----------------------------------------------------------------------------------

NO_SPLIT_MODULES = Private(
    "transformers.PreTrainedModel._no_split_modules", "the classes of modules that must stay on one device"
)
SKIP_KEYS = Private(
    "transformers.PreTrainedModel._skip_keys_device_placement",
    "the arguments that accelerate does not copy between devices, such as the cache",
)
NO_PLACEMENT = Private(
    "transformers.PreTrainedModel._no_placement_params",
    "the tensors that some models keep off accelerators; most models have none",
)
TIES = Private("transformers.PreTrainedModel.all_tied_weights_keys", "the tensors that transformers ties to each other")
DTYPE_PLAN = Private(
    "transformers.PreTrainedModel._get_dtype_plan",
    "the tensors that are loaded in another dtype than the one asked for",
)
GLOB_ALTERNATION = Private(
    "transformers.core_model_loading.build_glob_alternation",
    "matches the patterns of that dtype plan as transformers does",
)


def no_split_classes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the module classes that must stay on one device, sorted."""
    return tuple(sorted(NO_SPLIT_MODULES.of(model) or ()))


def skip_keys(model: PreTrainedModel) -> Any:
    """Return the names of arguments that are not copied to a module's device, in the form for accelerate."""
    return SKIP_KEYS.of(model)


def no_placement_parameters(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Return the tensors that a model keeps off accelerators; `None` if it does not have this attribute."""
    names = getattr(model, NO_PLACEMENT.attribute, None)
    return None if names is None else tuple(sorted(names))


def ties(model: PreTrainedModel) -> Mapping[str, str]:
    """Return the source of each tied tensor, by name."""
    tied: Mapping[str, str] = TIES.of(model) or {}
    return tied


def kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of tensors that are not loaded in the requested dtype (`_keep_in_fp32_modules`)."""
    plan: dict[str, torch.dtype] = DTYPE_PLAN.of(model)(dtype)
    if not plan:
        return {}
    alternation, pattern_of_group, _ = GLOB_ALTERNATION.find()(list(plan))
    dtypes: dict[str, torch.dtype] = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and (match := alternation.search(name)):
            dtypes[name] = plan[pattern_of_group[match.lastgroup]]
    return dtypes


# -- experts -----------------------------------------------------------------------------------------------------------

EXPERTS_MARK = Private(
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts._is_expert_parallel",
    "an attribute that `use_experts_implementation` leaves on a class; it tells whether the class lets its "
    "product with the experts be chosen",
)
EXPERTS = Private(
    "transformers.PreTrainedConfig._experts_implementation", "the product with the experts that a module uses"
)


def chooses_experts_implementation(module: torch.nn.Module) -> bool:
    """Return whether `use_experts_implementation` decorates a module's class, by the attributes that it sets."""
    return hasattr(module, EXPERTS_MARK.attribute) and hasattr(module, "config")


def set_experts_implementation(config: Any, implementation: str) -> None:
    """Have modules of this config use an implementation of experts; sub-configs keep theirs."""
    # As a dict: a bare string would be passed on to the sub-configs.
    setattr(config, EXPERTS.attribute, {"": implementation})


# -- quantizers --------------------------------------------------------------------------------------------------------

NOT_CONVERTED = Private(
    "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert",
    "the modules that a quantizer leaves as they are",
)
KEEP_IN_FP32 = Private(
    "transformers.PreTrainedModel._keep_in_fp32_modules",
    "the modules kept in float32, which every quantizer passes to `get_modules_to_not_convert`",
)
SHOULD_CONVERT = Private(
    "transformers.quantizers.quantizers_utils.should_convert_module", "tells whether a quantizer converts a module"
)
CONV1D = Private("transformers.pytorch_utils.Conv1D", "GPT-2's linear module, whose weight is transposed")
QUANTIZATION_CONFIG = Private(
    "transformers.quantizers.auto.AutoQuantizationConfig.from_dict",
    "makes a quantization's config from its method's name",
)


def modules_not_converted(model: PreTrainedModel, skipped: list[str] | None, *, add_default_skips: bool) -> list[str]:
    """Return the patterns of modules that are not converted, by the rule of transformers' quantizers."""
    patterns: list[str] = NOT_CONVERTED.find()(model, skipped, KEEP_IN_FP32.of(model), add_default_skips)
    return patterns


def should_convert_module(name: str, kept: list[str]) -> bool:
    """Return whether a quantizer converts a module, given the patterns that it does not convert."""
    return bool(SHOULD_CONVERT.find()(name, kept))


def is_conv1d(module: torch.nn.Module) -> bool:
    """Return whether a module is GPT-2's linear one, whose weight is `(in, out)`."""
    return isinstance(module, CONV1D.find())


def quantization_config(arguments: Mapping[str, Any]) -> Any:
    """Return the config of a quantization, by `quant_method` and its arguments."""
    return QUANTIZATION_CONFIG.find()(dict(arguments))


# -- loading -----------------------------------------------------------------------------------------------------------

LOADING_REPORT = Private(
    "transformers.modeling_utils.log_state_dict_report",
    "logs which names of a checkpoint did not match the model, and raises errors for some; patched to record "
    "them, since some classes do not return them",
    takes=("loading_info",),
)
CONVERSIONS = Private(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "lists what is renamed, merged or split while a model is loaded; lists of experts are merged in the order of "
    "their names",
)


REVERT_CONVERSIONS = Private(
    "transformers.core_model_loading.revert_weight_conversion",
    "returns a model's tensors as its checkpoint names them, before they are renamed, merged or split in loading",
)


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that a checkpoint holds, with the first of tied ones."""
    tied = ties(model)
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors: dict[str, torch.Tensor] = REVERT_CONVERSIONS.find()(model, held)
    return tensors


PROGRESS_HOOK = Private(
    "transformers.utils.logging.set_tqdm_hook",
    "receives what transformers shows progress bars for; while a model loads, the names of its tensors",
)
PROGRESS_OF_LOADING = "Loading weights"
"""The label of transformers' progress bar for loading."""


@contextmanager
def watching_load(watch: Callable[[list[str]], Callable[[str], None]]) -> Iterator[None]:
    """Call `watch` with the names of the tensors when a load begins, and the function that it returns after each of
    them.

    This replaces transformers' own progress bar, and does nothing while bars are disabled.
    """
    set_hook = PROGRESS_HOOK.find()
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") != PROGRESS_OF_LOADING or not logging.is_progress_bar_enabled():
            return factory(*arguments, **options)
        return watched(arguments[0])

    def watched(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        loaded = watch([name for name, _ in items])
        for name, tensors in items:
            yield name, tensors
            loaded(name)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)


@contextmanager
def taking_loading_reports(*, passes_on: bool) -> Iterator[list[Any]]:
    """Collect transformers' reports on names while loading (`LoadStateDictInfo`).

    With `passes_on`, transformers also logs the reports, and raises for errors in them.
    """
    reports: list[Any] = []
    log = LOADING_REPORT.find()

    def report(*, loading_info: Any, **others: Any) -> None:
        reports.append(loading_info)
        if passes_on:
            log(loading_info=loading_info, **others)

    from transformers import modeling_utils

    with patch.object(modeling_utils, LOADING_REPORT.attribute, report):
        yield reports


@contextmanager
def noting_what_is_lacking(model_class: Any) -> Iterator[set[str]]:
    """Collect the tensors that a checkpoint lacks, before transformers drops those that it computes, by its own lists.

    In between, transformers ties weights with a public method, which gets the missing names.
    """
    lacking: set[str] = set()
    tie_weights = model_class.tie_weights

    def noting(self: Any, missing_keys: set[str] | None = None, **others: Any) -> None:
        tie_weights(self, missing_keys=missing_keys, **others)
        lacking.update(missing_keys or ())  # tied names have been removed from these

    with patch.object(model_class, "tie_weights", noting):
        yield lacking


def merged_names(model: PreTrainedModel) -> list[str]:
    """Return the names of lists of tensors that loading merges into one, with `*` for a number."""
    conversions = CONVERSIONS.find()(model)
    return [pattern for conversion in conversions for pattern in conversion.source_patterns if "*" in pattern]


def is_made_while_loading(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of a model's tensors that transformers merges from several, or makes in another way than by
    renaming.
    """
    conversions = CONVERSIONS.find()(model)
    targets = [
        target
        for conversion in conversions
        if hasattr(conversion, "operations")
        for target in conversion.target_patterns
    ]
    if not targets:
        return []
    # Targets refer to groups of the source's expression, which match numbers and names.
    made = re.compile("|".join(re.sub(r"\\\d", ".*", target.strip("^$")) for target in targets))
    return [name for name in names if made.search(name)]


TILES = Private(
    "transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches",
    "computes the number of tiles that an image of some size is cut into; models call it as well",
)


def tiles_of(height: int, width: int, pinpoints: Any, side: int) -> int:
    """Return the number of squares of a side that an image is cut into, including the one of the whole image."""
    count: int = TILES.find()([height, width], pinpoints, side)
    return count


COMPILES = Private(
    "transformers.GenerationMixin._valid_auto_compile_criteria",
    "tells whether `generate` compiles decoding with a static cache",
    takes=("model_kwargs", "generation_config"),
)


COMPILES_ANYWHERE = Private(
    "transformers.CompileConfig._compile_all_devices",
    "makes `generate` compile decoding on a CPU as on an accelerator",
)


def compiling_on_a_cpu() -> CompileConfig:
    """Return the configuration that makes `generate` compile on a CPU, which it does not do by default."""
    from transformers import CompileConfig

    COMPILES_ANYWHERE.find()
    config = CompileConfig(mode="default")
    setattr(config, COMPILES_ANYWHERE.attribute, True)
    return config


def compiles_generation(model: Any) -> bool:
    """Return whether transformers compiles decoding for a model in its present place, once its cache is static.

    Some models, such as Llama 4, declare that they cannot be compiled, and are called without compiling.
    """
    from transformers import StaticCache

    if model.get_compiled_call(model.generation_config.compile_config) == model.__call__:
        return False
    COMPILES.find()
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=2)
    compiles: bool = COMPILES.of(model)(dict.fromkeys(CACHE_NAMES, cache), model.generation_config)
    return compiles


DISPATCH = Private(
    "transformers.integrations.accelerate.dispatch_model",
    "accelerate's function, patched to pass a main device: transformers passes none, and accelerate takes any",
    takes=("main_device", "force_hooks"),
)


@contextmanager
def streaming_to(device: int | str) -> Iterator[None]:
    """Make accelerate stream offloaded modules to this device.

    transformers does not pass `main_device` on, so accelerate would take the first of a set. Hooks are forced, because
    older versions of accelerate refuse a model that is entirely on disk.
    """
    original = DISPATCH.find()
    from transformers.integrations import accelerate as integration

    integration.dispatch_model = partial(original, main_device=device, force_hooks=True)
    try:
        yield
    finally:
        integration.dispatch_model = original
