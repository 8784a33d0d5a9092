"""Every architecture that transformers builds from a default config, as a model on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_types() -> list[str]:
    """Return every model type that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


ROTATION = {"rope_type": "default", "rope_theta": 10000.0}
GLM_POSITIONS = {"rope_parameters": {**ROTATION, "mrope_section": [16, 24, 24]}}
HALF_ROTATED = {"rope_parameters": {**ROTATION, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}

SENSIBLE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "num_hidden_layers": 4},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm46v": {"text_config": GLM_POSITIONS},
    "glm4v": {"text_config": GLM_POSITIONS},
    "glm4v_moe": {"text_config": {"head_dim": 128, "num_hidden_layers": 4, **GLM_POSITIONS, **HALF_ROTATED}},
    "glmga": {"text_config": GLM_POSITIONS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4},
    "ovis2": {"text_config": {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 12}},
    "qwen3_omni_moe_thinker": {"text_config": {"head_dim": 128, "num_attention_heads": 16, "num_hidden_layers": 4}},
    "step3p7": {"text_config": {"sliding_window": 512, "num_hidden_layers": 4}},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12},
}
"""Arguments for the types whose default config builds a model that cannot run."""


def causal_model_types() -> list[str]:
    """Return every model type that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sequence_model_types() -> list[str]:
    """Return every model type with a text encoder and a text decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def image_text_model_types() -> list[str]:
    """Return every model type that takes images with text and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def build(model_type: str, dtype: str = "float32") -> PreTrainedModel:
    """Build the meta model of a default config, with the head that uses the most of the model.

    Raises:
        Exception: whatever transformers raises for a type without a valid default config, or with a missing package.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from devmap_config.graph.introspection import build_meta_model

    config = CONFIG_MAPPING[model_type](**SENSIBLE.get(model_type, {}))
    return build_meta_model(_class_of(config), config, getattr(torch, dtype))


FEW_LAYERS = 4
"""The layers of a shallow model: enough for two alternating kinds, and for a run of them on each of two devices."""

SHALLOW = ({"num_hidden_layers": FEW_LAYERS}, {"n_layer": FEW_LAYERS}, {"n_layers": FEW_LAYERS})
"""The names under which configs state their number of layers."""


def build_shallow(model_type: str, dtype: str = "float32") -> PreTrainedModel:
    """Build the meta model with few layers, if its config can state their number and builds with it."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from devmap_config.graph.introspection import build_meta_model

    for depth in SHALLOW if model_type not in SENSIBLE else ():
        try:
            config = CONFIG_MAPPING[model_type](**depth)
            if next(iter(depth)) in config.to_dict():
                return build_meta_model(_class_of(config), config, getattr(torch, dtype))
        except Exception:  # noqa: S112 - such as lists by layer, whose lengths no longer match
            continue
    return build(model_type, dtype)


def image_model_types() -> list[str]:
    """Return every model type that takes images and writes text."""
    return image_text_model_types()


def sound_model_types() -> list[str]:
    """Return every model type that takes sound and writes text, or transcribes it."""
    from transformers.models.auto import modeling_auto as auto

    names = {*auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    return sorted((names - {*auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}) | {*ALSO_OF_SOUND})


ALSO_OF_SOUND = (
    *("apertus1p5", "dots3_note", "muse_spark"),
    *("gemma3n", "gemma4", "gemma4_unified", "nemotron_h_omni", "qwen2_5_omni_thinker"),
    *("qwen3_omni_moe_thinker",),
)
"""The types of image-text models that take sound as well."""


def build_media(model_type: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """Build the meta model of a small consistent config, of a type that takes images or sound.

    Raises:
        Exception: whatever transformers raises for a type without a valid default config, or with a missing package.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from devmap_config.graph.introspection import build_meta_model

    config = CONFIG_MAPPING[model_type](**{**SENSIBLE.get(model_type, {}), **MEDIA.get(model_type, {})})
    if model_type not in AS_DEEP_AS_IT_IS:
        _make_shallow(config)
    _make_consistent(config)
    return build_meta_model(_media_class_of(config), config, getattr(torch, dtype))


MEDIA: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "conformance" / "media_configs.yaml").read_text()
)

AS_DEEP_AS_IT_IS = ("mllama", "molmo2", "nemo_speechlm", "vipllava")

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "speech_encoder_layers"),
)


def _make_shallow(config: Any) -> None:
    depth = next((value for name in DEPTHS if isinstance(value := getattr(config, name, None), int)), 0)
    for name in DEPTHS:
        if isinstance(value := getattr(config, name, None), int) and value > FEW_LAYERS:
            setattr(config, name, FEW_LAYERS)
    if depth > FEW_LAYERS:
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == depth:
                setattr(config, name, value[:FEW_LAYERS])
    for inner in _within(config):
        _make_shallow(inner)


def _within(config: Any) -> list[Any]:
    found = [getattr(config, name, None) for name in config.sub_configs]
    return [each for each in found if hasattr(each, "sub_configs")]


WIDTHS = ("out_hidden_size", "projection_dim", "output_dim")


def _make_consistent(config: Any) -> None:
    """Make the outputs of towers as wide as the text's embeddings, which default configs do not ensure."""
    text = getattr(config, "text_config", None)
    for inner in _within(config):
        if text is not None and inner is not text:
            for name in WIDTHS:
                if isinstance(getattr(inner, name, None), int):
                    setattr(inner, name, text.hidden_size)
        _make_consistent(inner)


def _media_class_of(config: Any) -> Any:
    from transformers.models.auto import modeling_auto as auto

    for mapping in (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return _class_of(config)


def _class_of(config: Any) -> Any:
    from transformers.models.auto import modeling_auto as auto

    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise LookupError(f"no model class for {type(config).__name__}")
