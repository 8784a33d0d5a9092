"""Every architecture that transformers builds from a default config, as a meta model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_types() -> list[str]:
    """Every model type that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


SENSIBLE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
}
"""Arguments for the types whose default config builds a model that cannot run."""


def causal_model_types() -> list[str]:
    """Every model type that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(model_type: str, dtype: str = "float32") -> PreTrainedModel:
    """The meta model of a default config, by the most telling head that the type has.

    Raises:
        Exception: whatever transformers raises for a type without a valid default config or a package that is missing.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from devmap_config.graph.introspection import build_meta_model

    config = CONFIG_MAPPING[model_type](**SENSIBLE.get(model_type, {}))
    return build_meta_model(_class_of(config), config, getattr(torch, dtype))


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
