"""Tiny checkpoints of every architecture: default configs made narrow, with few layers and random weights."""

from __future__ import annotations

import inspect
import re
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import zoo

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    r"|projection_dim|projection_size|.*_dim_feedforward|lru_width|embedding_size|word_embed_proj_dim|emb_dim"
    r"|mamba_d_ssm)$"
)
HEADS = re.compile(r"^(?!.*d_head$)(num_|n_)?(.*_)?(attention_|key_value_|query_|kv_)?heads?$|^n_head$|^num_.*heads$")
EXPERTS = re.compile(r"^(num_|n_)(local_|routed_)?experts$|^moe_num_experts$")
CHOSEN = re.compile(r"^(num_experts_per_tok|num_selected_experts|moe_k|moe_topk|top_k_experts|experts_per_token)$")
WORDS = re.compile(r"^(unpadded_|decoder_)?vocab_size(_per_layer_input)?$|^n_words$")
LAYERS_OF_A_KIND = re.compile(r"^num_\w+_layers$")
TOKENS = re.compile(r"_token_(id|index)$|^decoder_start_token_id$")
CACHES = ("cache", "past_key_values", "cache_params")
FACTORS = (32, 16, 8, 4, 3, 2, 1)
FEW_LAYERS, FEW_EXPERTS, FEW_WORDS = 4, 16, 512

LEFT_OUT = {
    "head_dim": 16,
    "layer_types": ["conv", "full_attention"] * 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 1,
    "prediction_length": 4,
}
"""Fields without which models do not build, and that default configs leave out."""

INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "head_dim": 64,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
OF_TWO_KINDS = {"full_attention": zoo.ROTATION, "sliding_attention": zoo.ROTATION}
WIDE = {"hidden_size": 4096, "num_attention_heads": 32}

OTHERWISE = {
    "bailing_hybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "chameleon": {"vocabulary_map": {"<image>": 3, "IMGIMGAZ": 4}},
    "cohere_compass": {"text_config": {"rope_parameters": OF_TWO_KINDS}},
    "cohere_compass_text": {"rope_parameters": OF_TWO_KINDS},
    "csm": {"codec_config": {"upsample_groups": 16}},
    "deepseek_v2": {"moe_intermediate_size": 1408},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "esm": {"vocab_size": FEW_WORDS, "mask_token_id": 3, "pad_token_id": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm4v_moe_text": zoo.SENSIBLE["glm4v_moe"]["text_config"],
    "glm4v_text": zoo.GLM_POSITIONS,
    "glm_image_text": zoo.GLM_POSITIONS,
    "glm_ocr": {"text_config": {**WIDE, **zoo.GLM_POSITIONS}},
    "glm_ocr_text": {**WIDE, **zoo.GLM_POSITIONS},
    "helium": {**WIDE, "num_key_value_heads": 32},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 4},
    "mamba2": {"n_groups": 1},
    "mobilebert": {"intra_bottleneck_size": 4},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron_h": {"n_groups": 1},
    "qwen2_5_omni_thinker": {"text_config": WIDE},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {"is_decoder": True},
    "xlstm": {"embedding_dim": 128},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "mamba_headdim": 160},
}
"""Values with which a type builds and runs, where those of its default config do not."""


def shrunk(values: dict[str, Any], factor: int, *, shallow: bool, words: bool) -> dict[str, Any]:
    """Return the values of a config and its inner configs with widths and heads divided, and few layers and words."""
    found: dict[str, Any] = {}
    layers = number_of_layers(values)
    for key, value in values.items():
        if isinstance(value, dict) and key not in NO_CONFIGS:
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
        elif WORDS.match(key) and words:
            found[key] = min(value, FEW_WORDS)
        elif TOKENS.search(key) and words and value >= FEW_WORDS:
            found[key] = 100 + value % 300
        else:
            found[key] = value
    return found


NO_CONFIGS = (
    "projector_patch_to_query_dict",
    "vocabulary_map",
    "rope_parameters",
    "rope_scaling",
    "id2label",
    "label2id",
)


def number_of_layers(values: dict[str, Any]) -> int | None:
    """Return the number of layers of a config, if it states one."""
    return next((values[key] for key in values if LAYERS.match(key) and isinstance(values[key], int)), None)


def kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """Choose this number of layers: the first and last of each kind, as far as there is room."""
    kinds = values.get("layer_types") or values.get("layers_block_type") or [None] * layers
    last = {kind: place for place, kind in enumerate(kinds)}
    chosen = dict.fromkeys([*(kinds.index(kind) for kind in last), *last.values(), *range(layers)])
    return sorted(list(chosen)[:FEW_LAYERS])


def prepared(values: dict[str, Any], *, shallow: bool) -> dict[str, Any]:
    """Return the values of a config and its inner configs, changed so that they stay consistent when divided.

    Missing values are filled in, the number of heads is a power of two, and lists with one value per layer are
    shortened.
    """
    found = {key: LEFT_OUT.get(key) if value is None else value for key, value in values.items()}
    found |= with_even_heads(found)
    layers = number_of_layers(values)
    kept = kept_layers(values, layers) if layers is not None and shallow else None
    for key, value in found.items():
        if isinstance(value, dict) and key not in NO_CONFIGS:
            is_by_layer = value and all(str(place).isdigit() for place in value)
            if is_by_layer and kept is not None:
                by_layer = {int(place): each for place, each in value.items()}
                found[key] = {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}
            elif not is_by_layer:
                found[key] = prepared(value, shallow=shallow)
        elif isinstance(value, list) and kept is not None and len(value) == layers:
            found[key] = [value[place] for place in kept]
        elif isinstance(value, int) and kept is not None and LAYERS.match(key):
            found[key] = min(value, FEW_LAYERS)
        elif isinstance(value, int) and kept is not None and LAYERS_OF_A_KIND.match(key):
            found[key] = min(value, FEW_LAYERS // 2)
    return found


def with_even_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Return the width and numbers of heads of a config, with heads of the same width and a power of two of them."""
    width = next((key for key in ("hidden_size", "d_model", "n_embd", "emb_dim") if values.get(key)), None)
    heads = next((values[key] for key in ("num_attention_heads", "n_heads", "n_head") if values.get(key)), None)
    if width is None or not isinstance(heads, int):
        return {}
    even = 1 << (heads.bit_length() - 1)
    same = {key: even for key, value in values.items() if HEADS.match(key) and value == heads}
    return {**same, width: values[width] // heads * even}


def classes_of(config_class: Any) -> list[Any]:
    """Return the classes of a type, first the one whose head uses the most of the model's tensors."""
    from transformers.models.auto import modeling_auto as auto

    telling = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MASKED_LM_MAPPING,
        auto.MODEL_MAPPING,
    )
    others = (mapping for name, mapping in vars(auto).items() if re.match(r"MODEL_FOR_\w+_MAPPING$", name))
    found = [each for mapping in (*telling, *others) if (each := _class_in(mapping, config_class)) is not None]
    return list(dict.fromkeys(each[0] if isinstance(each, (list, tuple)) else each for each in found))


def _class_in(mapping: Any, config_class: Any) -> Any:
    try:
        return mapping.get(config_class, None)
    except ValueError:  # the mapping names a class that transformers does not have
        return None


def tiny_model(model_type: str) -> PreTrainedModel:
    """Return the narrowest and shallowest model of a type that transformers builds and that runs, with random weights.

    A default config is made smaller directly; if that fails, it is prepared first.

    Raises:
        LookupError: if there is none, or none that is small.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    classes = classes_of(config_class)
    if not classes:
        raise LookupError(f"no model class for {config_class.__name__}")
    values = config_class(**zoo.SENSIBLE.get(model_type, {}) | OTHERWISE.get(model_type, {})).to_dict()
    refused: dict[str, None] = {}
    built = None
    for model_class, prepare in ((classes[0], False), *((each, True) for each in classes)):
        model = smallest(model_class, config_class, values, refused, prepare=prepare)
        if model is not None and runs(model, inputs_for(model)):
            return model
        built = built or model
    if built is None:
        raise LookupError("; ".join(refused))
    return built


def smallest(model_class, config_class, values, refused, *, prepare) -> PreTrainedModel | None:
    """Return the first of ever wider and deeper models that runs, or else that builds; `refused` gets the reasons."""
    built: list[PreTrainedModel] = []
    for factor in FACTORS:
        for shallow, words in ((True, True), (True, False), (False, True), (False, False)):
            try:
                ready = prepared(values, shallow=shallow) if prepare else values
                config = config_class.from_dict(shrunk(ready, factor, shallow=shallow, words=words))
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in model_class(config).parameters())
                if size > LARGEST:
                    refused[f"{size:,} parameters"] = None
                    continue
                torch.manual_seed(0)
                built.append(model_class(config).eval())
            except Exception as error:
                refused[f"{type(error).__name__}: {error}"[:150]] = None
                continue
            if runs(built[-1], inputs_for(built[-1])):
                return built[-1]
            if len(built) >= 3:
                return built[0]
    return built[0] if built else None


def save(model_type: str, folder: Path, dtype=torch.float32) -> PreTrainedModel:
    """Save a checkpoint with random weights."""
    model = tiny_model(model_type)
    kept = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in kept and tensor.is_floating_point() and tensor.numel() > 1 and tensor.unique().numel() == 1:
                tensor.add_(torch.randn_like(tensor) * 0.02)  # all zeros would hide that they were not loaded
    model.to(dtype).save_pretrained(folder)
    return model


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output, without its cache."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return tensors_of([value for name, value in output.items() if name not in CACHES])
    return [tensor for each in output for tensor in tensors_of(each)] if isinstance(output, (list, tuple)) else []


def inputs_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return fixed inputs for a model: the first kind of inputs by which it runs."""
    kinds = list(kinds_of_inputs(model))
    return next((inputs for inputs in kinds if runs(model, inputs)), kinds[0])


@torch.no_grad()
def runs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    """Tell whether a model returns anything for these inputs."""
    try:
        return bool(tensors_of(model(**inputs)))
    except Exception:
        return False


def kinds_of_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the usual inputs of a model, then the inputs that models take instead of them or in addition."""
    accepted = inspect.signature(model.forward).parameters
    usual = usual_inputs(model)
    required = {name for name, each in accepted.items() if each.default is each.empty}
    for others in ({}, *others_than_usual(model, usual)):
        inputs = {name: value for name, value in {**usual, **others}.items() if name in accepted and value is not None}
        yield dict.fromkeys(required & set(OF_TEXT), TOKENS_GIVEN) | inputs


TOKENS_GIVEN = (torch.arange(1, 13) * 7 % 90 + 4).unsqueeze(0)
OF_TEXT = ("input_ids", "qformer_input_ids")


def others_than_usual(model: PreTrainedModel, usual: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Return inputs by name; each replaces the usual inputs of these names, or is added to them."""
    text = {"input_ids": TOKENS_GIVEN, "qformer_input_ids": TOKENS_GIVEN}
    boxes = torch.arange(48).reshape(1, 12, 4) % 4 * 2
    few_words = {"input_ids": TOKENS_GIVEN % 30}
    yield from (text, few_words, {"bbox": boxes}, {"bbox": boxes / 8})
    config = model.config.to_dict()
    matrices = sorted(
        (weight for weight in model.parameters() if weight.dim() > 1), key=lambda weight: weight.dim() < 4
    )
    patch = matrices[0].shape[1:] if matrices else (1,)
    row = prod(patch)
    grid = torch.tensor([[1, 4, 4]])
    grids = {"grid_thw": grid, "image_grid_thw": grid, "merge_sizes": torch.tensor([1])}
    for patches in (drawn(16, row), drawn(16, *patch)):
        yield {"input_ids": None, "hidden_states": patches, "pixel_values": patches, **grids}
    patches = drawn(16, row)
    shapes = {"pixel_attention_mask": torch.ones(1, 16, dtype=torch.long), "spatial_shapes": grid[:, 1:]}
    yield {"pixel_values": patches.unsqueeze(0), **shapes}
    for bins in dict.fromkeys((within(config, "num_mel_bins"), within(config, "input_feat_per_channel"), 80, 128, row)):
        for features in (drawn(1, bins or 80, 200), drawn(1, 200, bins or 80)):
            mask = torch.ones(1, features.shape[2 if features.shape[1] == bins else 1], dtype=torch.long)
            masks = {"input_features_mask": mask, "audio_mel_mask": mask == 0}
            yield {"input_ids": None, "input_features": features, "audio_mel": features, "input_values": None, **masks}
    if "input_features" in usual:
        yield {"input_features_mask": torch.ones(1, usual["input_features"].shape[2], dtype=torch.long)}
    for sound in (drawn(1, 4000), drawn(1, 1, 4000)):
        yield {"input_values": sound}
        yield {"input_values": sound, "padding_mask": torch.ones(1, 4000, dtype=torch.bool)}
    yield {"input_values": drawn(1, within(config, "max_length") or 1024, within(config, "num_mel_bins") or 128)}
    size = within(config, "image_size")
    height, width = size if isinstance(size, (list, tuple)) else (size or 224,) * 2
    image = drawn(1, 3, height, width)
    yield {"input_ids": None, "pixel_values": image, "target_sizes": torch.tensor([[14, 14]])}
    yield {"pixel_values": image} | text
    for count in (within(config, "num_frames") or 2, 1):
        images = drawn(1, count, 3, height, width)
        yield {"input_ids": usual.get("input_ids"), "pixel_values": images, "pixel_values_videos": images}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def within(config: dict[str, Any], key: str) -> Any:
    """Return a value of a config, or of the first of its inner configs that has it."""
    configs = [config, *(value for value in config.values() if isinstance(value, dict))]
    return next((each[key] for each in configs if each.get(key)), None)


def usual_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the fixed inputs that models of this kind usually take."""
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)
    main = model.main_input_name
    tokens = TOKENS_GIVEN
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
    return found
