"""Small consistent configs of models that take images or sound, by the case that each stands for."""

from __future__ import annotations

import copy
from typing import Any

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 100,
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **TOWER},
}
GEMMA3 = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "image_token_index": 100,
    "mm_tokens_per_image": 4,
    "text_config": {"model_type": "gemma3_text", "sliding_window": 64, **TEXT},
    "vision_config": {"model_type": "siglip_vision_model", **TOWER},
}
MLLAMA = {
    "model_type": "mllama",
    "architectures": ["MllamaForConditionalGeneration"],
    "image_token_index": 100,
    "text_config": {
        "model_type": "mllama_text_model",
        "cross_attention_layers": [1, 3],
        "pad_token_id": 0,
        **TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "vision_config": {
        "model_type": "mllama_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    },
}
QWEN2_5_VL: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
    "text_config": {"model_type": "qwen2_5_vl_text", "rope_parameters": SECTIONS, **TEXT},
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}
QWEN3_VL = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
    "text_config": {"model_type": "qwen3_vl_text", "rope_parameters": SECTIONS, **TEXT},
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
INTERNVL = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "image_token_id": 100,
    "image_seq_length": 4,
    "downsample_ratio": 0.5,
    "text_config": {"model_type": "qwen2", **TEXT},
    "vision_config": {"model_type": "internvl_vision", **TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
}
IDEFICS3 = {
    "model_type": "idefics3",
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 100,
    "scale_factor": 2,
    "pad_token_id": 0,
    "text_config": {"model_type": "llama", "pad_token_id": 0, **TEXT},
    "vision_config": {"model_type": "idefics3_vision", **TOWER},
}
BLIP2 = {
    "model_type": "blip-2",
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_token_index": 100,
    "num_query_tokens": 4,
    "vision_config": {"model_type": "blip_2_vision_model", **TOWER},
    "qformer_config": {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
        "vocab_size": 128,
    },
    "text_config": {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
    },
}
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 128,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
QWEN2_AUDIO = {
    "model_type": "qwen2_audio",
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_token_index": 100,
    "text_config": {"model_type": "qwen2", **TEXT},
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 32,
    },
}

QWEN2_5_OMNI = {
    "model_type": "qwen2_5_omni_thinker",
    "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
    "image_token_id": 100,
    "video_token_id": 101,
    "vision_start_token_id": 102,
    "vision_end_token_id": 103,
    "audio_token_id": 104,
    "audio_start_token_id": 105,
    "audio_end_token_id": 106,
    "text_config": {"model_type": "qwen2_5_omni_text", "rope_parameters": SECTIONS, **TEXT},
    "vision_config": {**QWEN2_5_VL["vision_config"], "model_type": "qwen2_5_omni_vision_encoder"},
    "audio_config": {
        "model_type": "qwen2_5_omni_audio_encoder",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 32,
        "n_window": 16,
        "output_dim": 32,
    },
}
VOXTRAL = {
    "model_type": "voxtral",
    "architectures": ["VoxtralForConditionalGeneration"],
    "audio_token_id": 100,
    "text_config": {"model_type": "llama", **TEXT},
    "audio_config": {
        "model_type": "voxtral_encoder",
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_mel_bins": 16,
        "max_source_positions": 32,
    },
}

IMAGE_MODELS = {
    config["model_type"]: config
    for config in (LLAVA, GEMMA3, MLLAMA, QWEN2_5_VL, QWEN3_VL, INTERNVL, IDEFICS3, BLIP2, QWEN2_5_OMNI)
}
SOUND_MODELS = {config["model_type"]: config for config in (WHISPER, QWEN2_AUDIO, VOXTRAL, QWEN2_5_OMNI)}

PROCESSORS: dict[str, dict[str, Any]] = {
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 32, "width": 32},
        "max_patches": 6,
    },
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
    },
}
"""What stands in `preprocessor_config.json` of those whose images are cut into tiles."""


def built(config: dict[str, Any], dtype: Any, *, on_meta: bool = False) -> Any:
    """Build the model of a config, with random weights or on the meta device."""
    import torch
    import transformers
    from transformers import AutoConfig

    from devmap_config.graph.introspection import build_meta_model

    values = copy.deepcopy(config)
    (architecture,) = values.pop("architectures")
    stated = AutoConfig.for_model(values.pop("model_type"), **values)
    if on_meta:
        return build_meta_model(getattr(transformers, architecture), stated, dtype)
    torch.manual_seed(0)
    return getattr(transformers, architecture)(stated).to(dtype).eval()
