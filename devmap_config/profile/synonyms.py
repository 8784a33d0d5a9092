"""The names that other tools use for a profile's keys, so that a diagnostic can say which line to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.profile.device_names import is_device_name

if TYPE_CHECKING:
    from collections.abc import Collection

WORDS = {
    "Model.source": "path name name_or_path model_name_or_path pretrained_model_name_or_path model_path model_name"
    " model_id id repo repo_id hub_id checkpoint",
    "Model.class": "architecture architectures model_class auto_class",
    "Model.dtype": "torch_dtype precision data_type",
    "Model.attention": "attn attn_implementation attention_implementation",
    "Model.adapter": "lora peft adapters adapter_path adapter_model adapter_name_or_path lora_path lora_adapter",
    "Model.assistant": "draft draft_model assistant_model speculative_model speculative_decoding model_draft drafter",
    "Adapter.source": "path name folder repo repo_id id adapter_name_or_path",
    "Assistant.source": "path name model repo repo_id id model_name_or_path",
    "Workload.context_length": "context ctx ctx_size n_ctx num_ctx context_size context_window max_context_length"
    " max_seq_len max_seq_length max_sequence_length max_model_len max_length max_position_embeddings seq_len"
    " sequence_length",
    "Workload.batch_size": "batch bs max_batch_size max_num_seqs num_seqs",
    "Workload.prompt_length": "prompt prefill prefill_length input_length",
    "Workload.concurrency": "concurrent_requests requests parallel users in_flight",
    "Workload.new_tokens": "max_new_tokens max_tokens n_predict output_length",
    "Workload.cache": "kv_cache cache_implementation",
    "Hardware.devices": "gpu gpus cards accelerators",
    "Hardware.hosts": "nodes machines servers",
    "Network.address": "ip host hostname",
    "Network.interface": "ifname nic device",
    "PlacementSection.groups": "tensor_parallel tensor_parallel_groups tp",
    "Profile.targets": "target engine engines",
    "DeviceSection.accelerator": "gpu card name model type",
    "DeviceSection.memory": "vram ram mem size capacity total_memory",
    "DeviceSection.bandwidth": "bw speed memory_bandwidth mem_bandwidth",
    "DeviceSection.flops": "compute tflops",
    "DeviceSection.reserve": "reserved used free_for_others",
    "PlacementSection.strategy": "policy mode method",
    "PlacementSection.pins": "rules overrides pin override_tensor",
    "PlacementSection.offload": "offload_dir offload_folder",
    "Offload.folder": "dir directory path offload_folder",
    "Offload.buffers": "offload_buffers",
    "Pin.match": "pattern module modules layer layers name path tensor",
    "Pin.device": "on to target",
    "Profile.extends": "extend inherits include includes base",
    "Profile.variables": "vars params parameters",
}
"""The names of other tools, by section and key of a profile."""

NO_TRAINING = (
    "a plan is for inference, not for training: it has no room for gradients and optimizer states, and weights that are"
    " copied in at every forward get no gradients; train on devices that hold the whole model, and name the resulting"
    " adapter as `model.adapter`"
)

TRAINING = (
    "train training trainable finetune finetuning fine_tune fine_tuning optimizer learning_rate lr epochs gradients"
    " gradient_checkpointing gradient_accumulation_steps"
)
"""Keys that ask for training, which this tool does not do."""

LINES = dict.fromkeys(TRAINING.split(), NO_TRAINING) | {
    "device_map": "write `placement: {strategy: auto}`, or `placement: {strategy: manual, device_map: …}` for a map"
    " of your own",
    "load_in_4bit": "write `quantization: {method: bitsandbytes, load_in_4bit: true}` under `model`",
    "load_in_8bit": "write `quantization: {method: bitsandbytes, load_in_8bit: true}` under `model`",
    "trust_remote_code": "pass `--trust-remote-code` on the command line: a profile cannot allow it",
    "n_gpu_layers": 'pin what is to be on the CPU: `pins: [{match: "model.layers.[24-]", device: cpu}]`',
    "tensor_split": "give each device its memory under `hardware.devices`, or a cap under `placement.max_memory`",
}
"""The advice for each key that has no counterpart of the same shape."""

SECTION_KEYS = {"Model": "model", "Workload": "workload", "Hardware": "hardware", "PlacementSection": "placement"}

SHORT = {
    "model": "model: {{source: {0}}}",
    "workload": "workload: {{context_length: {0}}}",
    "hardware": "hardware: {{devices: {{cuda:0: {0}}}}}",
    "placement": "placement: {{strategy: {0}}}",
    "offload": "offload: {{folder: {0}}}",
}
"""By the key of a section, the mapping to write instead of a scalar."""

DTYPES = {
    "float16": "fp16 f16 half",
    "bfloat16": "bf16",
    "float32": "fp32 f32 float full single",
    "float64": "fp64 f64 double",
}

FOUR_BIT, EIGHT_BIT = (f"quantization: {{method: bitsandbytes, load_in_{bits}bit: true}}" for bits in (4, 8))

QUANTIZED = {
    FOUR_BIT: "int4 i4 4bit 4-bit q4 nf4 fp4 uint4 bnb-4bit bnb_4bit bitsandbytes-4bit load_in_4bit 4 q4_k_m q4_0",
    EIGHT_BIT: "int8 i8 8bit 8-bit q8 uint8 bnb bnb-8bit bnb_8bit bitsandbytes-8bit load_in_8bit 8 q8_0",
    "quantization: {method: fp8}": "fp8 float8 float8_e4m3fn e4m3",
}


def key_meant(key: str, section: str, fields: Collection[str]) -> str | None:
    """Return the key of a section that a word stands for, if there is one."""
    routes = (route.split(".") for route, words in WORDS.items() if key.lower() in words.split())
    return next((name for owner, name in routes if owner == section and name in fields), None)


def line_for_key(key: str, section: str) -> str | None:
    """Return advice on a key that belongs elsewhere in the profile."""
    if section == "Hardware" and is_device_name(key):
        return "devices stand one level deeper, under `devices:`"
    if key.lower() in LINES:
        return LINES[key.lower()]
    routes = [route.split(".") for route, words in WORDS.items() if key.lower() in words.split()]
    routes_meant = {(owner, name) for owner, name in routes if owner in SECTION_KEYS and owner != section}
    if len(routes_meant) != 1:
        return None  # `path` is a word for several keys
    ((owner, name),) = routes_meant
    return f"write `{name}` under `{SECTION_KEYS[owner]}`"


def line_for_scalar(key: str, text: str) -> str | None:
    """Return the mapping to write instead of a scalar under the key of a section."""
    if key == "device_map":
        return f"write `strategy: {text}` in its stead"
    if key == "quantization":
        return f"write `{quantization_meant(text) or f'quantization: {{method: {text}}}'}`"
    return f"write `{SHORT[key].format(text)}`" if key in SHORT else None


def dtype_meant(text: str) -> str | None:
    """Return advice on a dtype by another name, or on a quantization that was written as a dtype."""
    name = next((name for name, words in DTYPES.items() if text.lower() in words.split()), None)
    if name is not None:
        return f"write `dtype: {name}`"
    line = quantization_meant(text)
    return None if line is None else f"write `{line}` in its stead"


def strategy_meant(text: str) -> str | None:
    """Return advice on the names that other tools use for distributing a model over several devices."""
    word = (
        text.lower().replace("-", "_").removesuffix("_parallel").removesuffix("_parallelism").removesuffix("parallel")
    )
    if word in ("tensor", "tp", "row"):
        return "no module is split over devices here: write `strategy: fastest`, which gives each its run of layers"
    if word in ("pipeline", "pp", "layer"):
        return "write `strategy: fastest`, or `balanced` for devices that are alike"
    return None


def attention_meant(text: str) -> str | None:
    """Return advice on an implementation of attention by another name."""
    letters = text.lower().replace("-", "").replace("_", "")
    return (
        "write `attention: flash_attention_2`" if letters in ("flash", "flashattn", "flashattention", "fa2") else None
    )


def cache_backend_meant(text: str) -> str | None:
    """Return why one of transformers' backends for quantised caches is not supported."""
    if text.lower() != "hqq":
        return None
    return (
        "how much a cache takes by HQQ was never measured here: write `quanto`, which takes 2 or 4 bits of each number,"
        " or `fp8`"
    )


def quantization_meant(text: str) -> str | None:
    """Return the quantization that a text stands for."""
    return next((line for line, words in QUANTIZED.items() if text.lower() in words.split()), None)
