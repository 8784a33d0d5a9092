"""Tiny checkpoints of every architecture: default configs with few layers, narrow ones, and random weights."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
import zoo

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

LARGEST = 60_000_000
"""So many parameters a tiny model has at most."""

LAYERS = re.compile(
    r"^(num_|n_|encoder_|decoder_|.*_num_)?(hidden_|encoder_|decoder_|attention_)?(layers?|blocks)$|^depth$"
)
WIDTHS = re.compile(
    r"^(hidden_size|d_model|n_embd|embed_dim|dim|intermediate_size|ffn_dim|.*_ffn_dim|d_ff|n_inner|ffn_hidden_size"
    r"|moe_intermediate_size|shared_expert_intermediate_size|.*hidden_size|.*intermediate_size|.*hidden_dim|.*embed_dim"
    r"|projection_dim|projection_size|.*_dim_feedforward|lru_width|embedding_size|word_embed_proj_dim)$"
)
HEADS = re.compile(r"^(num_|n_)?(.*_)?(attention_|key_value_|query_|kv_)?heads?$|^n_head$|^num_.*heads$")
EXPERTS = re.compile(r"^(num_|n_)(local_|routed_)?experts$|^moe_num_experts$")
CHOSEN = re.compile(r"^(num_experts_per_tok|num_selected_experts|moe_k|moe_topk|top_k_experts|experts_per_token)$")
TOKENS = re.compile(r"_token_(id|index)$|^decoder_start_token_id$")
CACHES = ("cache", "past_key_values", "cache_params")
FACTORS = (32, 16, 8, 4, 3, 2, 1)
FEW_LAYERS, FEW_EXPERTS, FEW_WORDS = 4, 16, 512


def shrunk(values: dict[str, Any], factor: int, *, shallow: bool, words: bool) -> dict[str, Any]:
    """A config's values, and those of the configs within, with widths and heads divided, and few layers and words."""
    found: dict[str, Any] = {}
    layers = next((values[key] for key in values if LAYERS.match(key) and isinstance(values[key], int)), None)
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            found[key] = shrunk(value, factor, shallow=shallow, words=words)
        elif isinstance(value, list) and shallow and layers is not None and len(value) == layers:
            found[key] = value[:FEW_LAYERS]
        elif isinstance(value, bool) or not isinstance(value, int):
            found[key] = value
        elif LAYERS.match(key) and shallow:
            found[key] = min(value, FEW_LAYERS)
        elif EXPERTS.match(key) and shallow:
            found[key] = min(value, FEW_EXPERTS)
        elif CHOSEN.match(key) and shallow:
            found[key] = min(value, 2)
        elif WIDTHS.match(key) and value % factor == 0:
            found[key] = value // factor
        elif HEADS.match(key):
            found[key] = max(value // factor, 1)
        elif key in ("vocab_size", "unpadded_vocab_size", "decoder_vocab_size") and words:
            found[key] = min(value, FEW_WORDS)
        elif TOKENS.search(key) and words and value >= FEW_WORDS:
            found[key] = 100 + value % 300
        else:
            found[key] = value
    return found


def class_of(config: Any) -> Any:
    """The class with the most telling head that a type has: the one that uses the most of its tensors."""
    from transformers.models.auto import modeling_auto as auto

    for mapping in (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, (list, tuple)) else found
    raise LookupError(f"no model class for {type(config).__name__}")


def tiny_model(model_type: str) -> PreTrainedModel:
    """The narrowest and shallowest model of a type that transformers builds and that runs, with random weights.

    Raises:
        LookupError: where there is none, or none that is small.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    values = config_class(**zoo.SENSIBLE.get(model_type, {})).to_dict()
    found = []
    built, tried = None, 0
    for factor in FACTORS:
        for shallow, words in ((True, True), (True, False), (False, True), (False, False)):
            try:
                config = config_class.from_dict(shrunk(values, factor, shallow=shallow, words=words))
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in class_of(config)(config).parameters())
                if size > LARGEST:
                    found.append(f"{size:,} parameters")
                    continue
                torch.manual_seed(0)
                model = class_of(config)(config).eval()
                built, tried = built or model, tried + 1
                with torch.no_grad():
                    model(**inputs_for(model))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}"[:150])
                if tried >= 3:
                    return built
                continue
            return model
    if built is not None:
        return built
    raise LookupError("; ".join(dict.fromkeys(found)))


def save(model_type: str, folder: Path, dtype=torch.float32) -> PreTrainedModel:
    """A checkpoint with random weights."""
    model = tiny_model(model_type)
    kept = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in kept and tensor.is_floating_point() and tensor.numel() > 1 and tensor.unique().numel() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.02)  # all zeros would hide that they were not loaded
    model.to(dtype).save_pretrained(folder)
    return model


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of what a model returns, but for those of its cache."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return tensors_of([value for name, value in output.items() if name not in CACHES])
    return [tensor for each in output for tensor in tensors_of(each)] if isinstance(output, (list, tuple)) else []


def inputs_for(model: PreTrainedModel, device="cpu") -> dict[str, torch.Tensor]:
    """What a model of its kind takes, of numbers that depend on nothing."""
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)
    main = model.main_input_name
    tokens = (torch.arange(1, 13) * 7 % 90 + 4).unsqueeze(0)
    found: dict[str, torch.Tensor] = {}
    if "input_ids" in accepted and main not in ("pixel_values", "input_values", "input_features"):
        found["input_ids"] = tokens
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224) or 224
        size = size if isinstance(size, (list, tuple)) else (size, size)
        found["pixel_values"] = torch.randn((1, getattr(vision, "num_channels", 3), *size), generator=generator)
    if main == "input_features":
        found["input_features"] = torch.randn(
            (1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 100)),
            generator=generator,
        )
    if main == "input_values":
        found["input_values"] = torch.randn((1, 4000), generator=generator)
    if "decoder_input_ids" in accepted:
        found["decoder_input_ids"] = tokens[:, :7]
    if (
        main == "input_ids"
        and "pixel_values" in accepted
        and not model.can_generate()
        and "vision_config" in config.to_dict()
    ):
        vision = config.vision_config
        size = getattr(vision, "image_size", 224)
        found["pixel_values"] = torch.randn((1, getattr(vision, "num_channels", 3), size, size), generator=generator)
    if not found:
        found["input_ids"] = tokens
    if device == "meta":
        return {k: v.to("meta") for k, v in found.items()}
    return found
