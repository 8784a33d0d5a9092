"""Makes the folder in which inputs are tried: tiny models, a profile that uses most of the language, and its lock."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cases.test_cases import cases, read, with_defaults
from click.testing import CliRunner
from conftest import LLAMA, MIXTURE, MODELS, REPOSITORY, write_models
from small_media_models import LLAVA, WHISPER

from devmap_config.cli import devmap

if TYPE_CHECKING:
    from collections.abc import Iterator

GOOD = """\
version: 1
name: good
description: what the language has, in few lines
variables: {last: 2, size: 1GiB}
extends: [machine.yaml]
x-pin: &pin {device: cuda:1}
model: {source: llama, dtype: bfloat16, class: AutoModelForCausalLM, attention: sdpa}
workload:
  {batch_size: 1, context_length: "{{ 64 * last }}", prompt_length: 16, logits: last, cache: dynamic, optimize: decode}
hardware:
  devices:
    cuda:0: {memory: 900KiB, reserve: 10%, slack: 1%, overhead: 1KiB}
    disk: {memory: "{{ size }}", bandwidth: 6GB/s}
placement:
  strategy: sequential
  max_memory: {1: 800KiB, cpu: 50%}
  pins:
    - {<<: *pin, match: lm_head}
    - {match: "model.layers.[-{{ last }}:]", device: cpu, override: true}
    - {match: "model.layers.[4].mlp", not_on: [cuda:1], optional: true}
    - {match: "class:LlamaRMSNorm in model.layers.0", keep_together: true, optional: true}
  offload: {folder: ./offload, buffers: false}
targets: [transformers]
"""

PICTURED = """\
version: 1
model: {source: pictured}
workload: {context_length: 64, prompt_length: 48, inputs: {images: 2, image_size: [32, 32]}}
hardware: {devices: {"cuda:[0-1]": {memory: 1MiB}, cpu: {memory: 64MiB}}}
placement:
  strategy: sequential
  pins: [{match: "model.vision_tower.**", device: "cuda:1", optional: true}]
"""

HEARD = """\
version: 1
model: {source: heard}
workload: {context_length: 16, inputs: {audio_seconds: 1}}
hardware: {devices: {cuda:0: {memory: 1MiB}, cpu: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

ADAPTED = """\
version: 1
model: {source: weights, adapter: adapter}
workload: {context_length: 32}
hardware: {devices: {cuda:0: {memory: 12KiB}, cpu: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

DRAFTED = """\
version: 1
model: {source: llama, assistant: {source: llama, dtype: float32, device: cpu}}
workload: {context_length: 64}
hardware: {devices: {"cuda:[0-1]": {memory: 900KiB}, cpu: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

AWAY = """\
version: 1
model: {source: llama}
workload: {context_length: 64, cache: offloaded}
hardware: {devices: {"cuda:[0-1]": {memory: 900KiB}, cpu: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

SQUEEZED = AWAY.replace("offloaded", "{implementation: quantized, backend: quanto, bits: 4}")
"""Refused, since these models' heads are too narrow; what it says stands in other profiles, too."""

ADAPTERS: list[dict[str, Any]] = [
    {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
     "bias": "none", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True,
     "base_model_name_or_path": "weights", "inference_mode": True, "lora_dropout": 0.1, "fan_in_fan_out": False},
    {"peft_type": "LORA", "r": 8, "target_modules": r".*\.(\d+)\.(self_attn|mlp)\.(q|up)_proj", "bias": "all",
     "use_dora": True, "exclude_modules": ["down_proj"], "modules_to_save": ["norm"], "lora_bias": False},
    {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.[12]\..*",
     "layers_to_transform": [0, 1], "layers_pattern": "layers", "init_lora_weights": True, "auto_mapping": None,
     "target_parameters": None, "layer_replication": None, "megatron_config": None, "eva_config": None},
]  # fmt: skip
"""Three kinds of `adapter_config.json`, with most of what such a file may say."""

MACHINE = """\
hardware:
  host: {dispatch: 12us}
  devices:
    "cuda:[0-1]": {memory: 1MiB, bandwidth: 1000GB/s, flops: 100TFLOP/s, efficiency: 80%}
    cpu:
      memory: 64MiB
      bandwidth: 80GB/s measured
      flops: 1TFLOP/s calibrated
      attention: {decode: 6GFLOP/s measured, prefill: 200GFLOP/s}
      experts: 12GB/s measured
      products: {decode: 17000/s measured, prefill: 9000/s}
      dtypes: {float32: {bandwidth: 25GB/s, flops: 100GFLOP/s}, float16: {flops: 30GFLOP/s measured}}
  links: {host: {bandwidth: 25GB/s, latency: 10us}, peer: 12GB/s, "cuda:0-cuda:1": 20GB/s, together: 40GB/s}
  spread: {decode: 94-108%, prefill: 90-117%}
"""

LOCKED = """\
version: 1
model: {source: small}
variables: {context: 64}
workload: {context_length: "{{ context }}"}
extends: machine.yaml
hardware: {devices: {disk: {memory: 1GiB, bandwidth: 1GB/s}, "cuda:[0-1]": {memory: 300KiB}, cpu: {memory: 300KiB}}}
placement:
  strategy: fastest
  pins: [{match: "model.layers.[1].mlp.experts", device: cpu, compute: cpu}]
  offload: {folder: ./offload}
"""

TINY = {**LLAMA, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 2, "vocab_size": 16, "dtype": "float32", "max_position_embeddings": 64}  # fmt: skip

WEIGHTS = """\
version: 1
model: {source: weights}
hardware: {devices: {cuda:0: {memory: 4KiB}, cpu: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

OF_CONFIG = """\
version: 1
model: {source: config.json}
hardware: {devices: {cuda:0: {memory: 300KiB}, cpu: {memory: 1TiB}}}
placement: {strategy: sequential}
"""

SHARDED = WEIGHTS.replace("weights", "sharded")

VENDORED = """\
version: 1
model: {source: weights}
workload: {context_length: 16}
hardware:
  devices:
    cuda:0: {memory: 16KiB, bandwidth: 1TB/s, flops: 1TFLOP/s}
    cpu: {memory: 1MiB, bandwidth: 80GB/s, flops: 1TFLOP/s}
  links: {host: 25GB/s}
placement: {strategy: sequential}
"""

SPOKEN = """\
version: 1
model: {source: spoken}
workload: {context_length: 64}
hardware: {devices: {DEVICE: {memory: 64MiB}}}
placement: {strategy: sequential}
"""

WORDS = dict(zip(("<s>", "</s>", "a", "b", "t", "th", "the", "\u0120", "\u2581", "<unk>"), range(10), strict=True))

ADDED = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}  # fmt: skip

TOKENIZERS: list[dict[str, Any]] = [
    {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [ADDED],
     "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"},
     {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
     "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\s+|\\w+"},
     "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
     "use_regex": True}]},
     "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
     {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
     {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
     "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
     "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
     "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
     "vocab": {**WORDS, "h": 10, "e": 11}, "merges": [["t", "h"], ["th", "e"]]}},
    {"version": "1.0", "truncation": {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0},
     "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
     "pad_type_id": 0, "pad_token": "<s>"}, "added_tokens": [ADDED],
     "normalizer": {"type": "Prepend", "prepend": "\u2581"},
     "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
     "post_processor": None, "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"},
     "model": {"type": "Unigram", "unk_id": 9, "byte_fallback": False,
     "vocab": [[word, -0.5 * number] for word, number in WORDS.items()]}},
    {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type":
     "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
     "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": {"type": "WordPiece", "prefix": "##",
     "cleanup": True}, "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<unk>"}},
]  # fmt: skip
"""Three kinds of `tokenizer.json`, with most of what such a file may say."""

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}a{% endif %}"
)

TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "bos_token": "<s>", "eos_token": "</s>",
    "unk_token": {**ADDED, "__type": "AddedToken", "content": "<unk>"}, "pad_token": None, "padding_side": "left",
    "added_tokens_decoder": {"0": {key: ADDED[key] for key in ADDED if key != "id"}}, "chat_template": CHAT,
    "additional_special_tokens": ["<s>"], "clean_up_tokenization_spaces": False, "add_bos_token": True,
    "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "extra_special_tokens": {}, "legacy": True,
    "model_input_names": ["input_ids", "attention_mask"], "truncation_side": "right", "split_special_tokens": False,
}  # fmt: skip

DEVICE_MAP = {
    "model.embed_tokens": 0,
    **{f"model.layers.{layer}": 0 if layer < 3 else 1 for layer in range(5)},
    "model.layers.5.self_attn": "cpu",
    "model.layers.5.mlp": "disk",
    "model.layers.5.input_layernorm": "cuda:1",
    "model.layers.5.post_attention_layernorm": "cuda:1",
    "model.norm": 1,
    "model.rotary_emb": 1,
    "lm_head": 1,
}

SHORT = {**LLAMA, "num_hidden_layers": 3}
"""A thousand times as many layers are refused."""

SMALL = {**MIXTURE, "num_hidden_layers": 2, "num_experts": 4, "max_position_embeddings": 64}
"""Of few parts, so that placing takes a twentieth of a second; and of no more positions than `LOCKED` asks for."""

CONFIGS: list[dict[str, Any]] = [
    SHORT,
    {**SMALL, "num_hidden_layers": 3},
    {**MODELS["learned"], "n_layer": 3},
    {**MODELS["quantized"], "num_hidden_layers": 3},
    {**SHORT, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 64},
     "id2label": {"0": "a"}, "auto_map": {"AutoConfig": "configuration_x.C"}, "eos_token_id": [1, 2],
     "pad_token_id": None},
    {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32,
    "num_layers": 3,
     "num_heads": 2, "vocab_size": 32, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0},
    {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 32,
     "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
     "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
    LLAVA,
    WHISPER,
    {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 32, "intermediate_size": 32,
     "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 32, "patch_size": 16, "id2label": {"0": "a",
     "1": "b"}},
]  # fmt: skip
"""Configs to start from: text, images, sound, encoders and decoders, with experts, windows, rotations, quantised."""


def make_workspace(folder: Path) -> None:
    """Fill a folder with what inputs are tried beside; what commands make of it is made by themselves."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_models(folder)
    os.chdir(folder)
    texts = {
        "good.yaml": GOOD,
        "machine.yaml": MACHINE,
        "locked.yaml": LOCKED,
        "vendored.yaml": VENDORED,
        "weights.yaml": WEIGHTS,
        "pictured.yaml": PICTURED,
        "heard.yaml": HEARD,
        "adapted.yaml": ADAPTED,
        "drafted.yaml": DRAFTED,
    }
    texts |= {
        "sharded.yaml": SHARDED,
        "config.yaml": OF_CONFIG,
        "workload.yaml": OF_CONFIG + "workload: {context_length: 64}\n",
        "inputs.yaml": OF_CONFIG + "workload: {context_length: 64, inputs: {images: 1, image_size: 32}}\n",
    }
    texts |= {
        f"{name}.yaml": SPOKEN.replace("DEVICE", device) for name, device in (("card", "cuda:0"), ("spoken", "cpu"))
    }
    texts |= {"config.json": json.dumps(SHORT), "map.json": json.dumps(DEVICE_MAP)}
    for name, text in texts.items():
        Path(name).write_text(text, encoding="utf-8")
    os.mkfifo("pipe")
    Path("endless").symlink_to("/dev/zero")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained("weights")
    shutil.copytree("weights", "spoken")
    stated = {key: value for key, value in TOKENIZER_CONFIG.items() if key != "auto_map"}
    Path("spoken/tokenizer.json").write_text(json.dumps(TOKENIZERS[0]), encoding="utf-8")
    Path("spoken/tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    Path("sharded").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(json.dumps(ADAPTERS[0]), encoding="utf-8")
    for name, config in (("small", SMALL), ("pictured", LLAVA), ("heard", WHISPER)):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copyfile("weights/config.json", "sharded/config.json")
    shutil.copyfile("weights/model.safetensors", "sharded/part.safetensors")
    for name in ("good", "locked", "card", "spoken", "vendored", "pictured", "heard"):
        command = ["compile", f"{name}.yaml", *(["--vendor"] if name == "vendored" else [])]
        done = CliRunner().invoke(devmap, command, standalone_mode=False)
        if done.exception or done.return_value:
            raise RuntimeError(f"{command}: {done.output}") from done.exception


def profiles() -> list[bytes]:
    """Return the profiles to start from: the tests' cases and the shipped ones, each of a tiny model."""
    own = (*[GOOD] * 3, LOCKED, WEIGHTS, PICTURED, PICTURED, HEARD, ADAPTED, ADAPTED, DRAFTED, DRAFTED, AWAY, SQUEEZED)
    return [text.encode() for text in (*own, *_shipped(), *_cases())]


def _shipped() -> Iterator[str]:
    for path in sorted((REPOSITORY / "profiles").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        yield re.sub(r"source: models/\S+", f"source: {'mixture' if 'qwen' in path.name else 'llama'}", text)


def _cases() -> Iterator[str]:
    """Yield the blocks of the tests' cases of one file in which nothing is wrong."""
    for case in cases():
        (blocks,) = case.values
        text, expected = read(blocks[0][1])
        if len(blocks) == 1 and not any(severity == "error" for _, severity, _, _ in expected):
            yield text if "bare" in blocks[0][0] else with_defaults(text)


def parsed(texts: list[bytes]) -> list[Any]:
    """Return the values of YAML texts."""
    return [yaml.safe_load(text) for text in texts]
