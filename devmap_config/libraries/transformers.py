"""The uses of transformers that it does not promise to keep. Imports transformers when they are called."""

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
"""Under which models return their cache, and take it: by the first from transformers 5.24 on, code that comes with a
model by what it was written for."""

CACHE_CLASS = Private("transformers.Cache", "recognises a cache among the outputs of a model")


def unnamed_cache(output: Any) -> str | None:
    """Return by which name a model returned a cache, if it did."""
    class_ = CACHE_CLASS.find()
    items = output.items() if hasattr(output, "items") else ()
    return next((name for name, value in items if isinstance(value, class_)), None)


STATES = ("conv_states", "recurrent_states")
"""What layers keep whose attention is linear, beside keys and values or in their stead."""

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
    """Return whether `generate` makes a model the cache that it is asked for."""
    supports: bool = TAKES_CACHES.of(model)()
    return supports


@contextmanager
def quantizing_layers(quantize: Callable[..., tuple[Any, ...]], dequantize: Callable[..., Any]) -> Iterator[None]:
    """Let caches that quanto quantises be made within as if it were there; `quantize` and `dequantize` stand in."""
    base: Any = QUANTIZED_LAYER.find()

    class Layer(base):  # type: ignore[misc]
        __module__ = base.__module__  # a cache is looked through as transformers' own

        def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[Any, ...]:
            del axis  # of one sequence or several, groups are cut alike
            return (*quantize(tensor, self.nbits), tensor.shape)

        def _dequantize(self, made: tuple[Any, ...]) -> Any:
            return dequantize(*made[:-1], bits=self.nbits, shape=made[-1])

    QUANTO_LAYER.find()
    with patch(QUANTO_LAYER.name, Layer):
        yield


def is_own_model(model: Any) -> bool:
    """Return whether a model's class is one of transformers, and not of code that comes with the model."""
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
    """Return whether a class of transformers stands for others, by the config."""
    return hasattr(class_, MODEL_MAPPING.attribute)


def model_mapping(auto_class: Any) -> Mapping[Any, Any]:
    """Return the model classes that an Auto class stands for, by config class."""
    mapping: Mapping[Any, Any] = MODEL_MAPPING.of(auto_class)
    return mapping


def init_contexts(model_class: Any, dtype: torch.dtype) -> Iterable[Any]:
    """Return the contexts in which `from_pretrained` builds a model that it does not fill yet."""
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
    """Return the names of arguments that are not copied to where a module runs, as accelerate takes them."""
    return SKIP_KEYS.of(model)


def no_placement_parameters(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Return the tensors that a model keeps off accelerators; `None` for a model that says nothing of that."""
    names = getattr(model, NO_PLACEMENT.attribute, None)
    return None if names is None else tuple(sorted(names))


def ties(model: PreTrainedModel) -> Mapping[str, str]:
    """Return the tensors that are the same as others, by the names of those others."""
    tied: Mapping[str, str] = TIES.of(model) or {}
    return tied


def kept_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the tensors that are loaded in another dtype than asked for (`_keep_in_fp32_modules`), with theirs."""
    plan: dict[str, torch.dtype] = DTYPE_PLAN.of(model)(dtype)
    if not plan:
        return {}
    alternation, pattern_of_group, _ = GLOB_ALTERNATION.find()(list(plan))
    kept: dict[str, torch.dtype] = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point() and (match := alternation.search(name)):
            kept[name] = plan[pattern_of_group[match.lastgroup]]
    return kept


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
    """Return whether `use_experts_implementation` decorates a module's class, seen by what it sets."""
    return hasattr(module, EXPERTS_MARK.attribute) and hasattr(module, "config")


def set_experts_implementation(config: Any, implementation: str) -> None:
    """Have modules of this config take one product with the experts; sub-configs keep theirs."""
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
    """Return the patterns of modules that stay as they are, by the rule of transformers' quantizers."""
    kept: list[str] = NOT_CONVERTED.find()(model, skipped, KEEP_IN_FP32.of(model), add_default_skips)
    return kept


def should_convert_module(name: str, kept: list[str]) -> bool:
    """Return whether a quantizer converts a module, where it leaves what matches `kept`."""
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
    """Return the tensors that a checkpoint holds of a model: those that are saved of it, of tied ones the first."""
    tied = ties(model)
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors: dict[str, torch.Tensor] = REVERT_CONVERSIONS.find()(model, held)
    return tensors


PROGRESS_HOOK = Private(
    "transformers.utils.logging.set_tqdm_hook",
    "receives what transformers shows progress bars for; while a model loads, the names of its tensors",
)
PROGRESS_OF_LOADING = "Loading weights"
"""What transformers writes on the bar of a load."""


@contextmanager
def watching_load(watch: Callable[[list[str]], Callable[[str], None]]) -> Iterator[None]:
    """Call `watch`, within, as a load begins, with the names of its tensors, and what it returns after each of them.

    It stands in for transformers' own bar, and is not called while these are disabled.
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
    """Take what transformers finds of names while it loads (`LoadStateDictInfo`).

    Where this `passes_on` it, transformers logs it besides, and raises for errors in it.
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
    """Note what a checkpoint lacks, before transformers leaves out what its lists say that it computes.

    It ties weights in between, by a public method that it tells what is missing.
    """
    lacking: set[str] = set()
    tie_weights = model_class.tie_weights

    def noting(self: Any, missing_keys: set[str] | None = None, **others: Any) -> None:
        tie_weights(self, missing_keys=missing_keys, **others)
        lacking.update(missing_keys or ())  # of which what is tied was taken out

    with patch.object(model_class, "tie_weights", noting):
        yield lacking


def merged_names(model: PreTrainedModel) -> list[str]:
    """Return the names, `*` for a number, of lists of tensors that become one while a model is loaded."""
    conversions = CONVERSIONS.find()(model)
    return [pattern for each in conversions for pattern in each.source_patterns if "*" in pattern]


def is_made_while_loading(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return those of a model's tensors that transformers makes of several tensors, or otherwise than by renaming."""
    conversions = CONVERSIONS.find()(model)
    targets = [target for each in conversions if hasattr(each, "operations") for target in each.target_patterns]
    if not targets:
        return []
    # Targets refer to groups of the source's expression, which stand for numbers and names.
    made = re.compile("|".join(re.sub(r"\\\d", ".*", target.strip("^$")) for target in targets))
    return [name for name in names if made.search(name)]


TILES = Private(
    "transformers.models.llava_next.modeling_llava_next.image_size_to_num_patches",
    "computes the number of tiles that an image of some size is cut into; models call it as well",
)


def tiles_of(height: int, width: int, pinpoints: Any, side: int) -> int:
    """Return in how many squares of a side an image is given, the whole of it included."""
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
    """Return the configuration with which `generate` compiles on a CPU, which it does not by itself."""
    from transformers import CompileConfig

    COMPILES_ANYWHERE.find()
    config = CompileConfig(mode="default")
    setattr(config, COMPILES_ANYWHERE.attribute, True)
    return config


def compiles_generation(model: Any) -> bool:
    """Return whether transformers compiles what decodes, where a model is and as it is, once its cache is static.

    Of some it says so, and calls them as they are: of Llama 4.
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

    transformers does not pass `main_device` on, and accelerate then takes the first of a set. Hooks are forced, since
    older versions of accelerate refuse a model that is on disk as a whole.
    """
    original = DISPATCH.find()
    from transformers.integrations import accelerate as integration

    integration.dispatch_model = partial(original, main_device=device, force_hooks=True)
    try:
        yield
    finally:
        integration.dispatch_model = original
