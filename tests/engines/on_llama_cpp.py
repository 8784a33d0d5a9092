"""A script for a Python with xllamacpp and gguf: names of GGUF tensors, and tokens of a small GGUF model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file


def names(asked):
    """Return, for each architecture, gguf's own table of modules, and the tensors that llama.cpp reads."""
    answers = {}
    for name, modules in asked.items():
        architecture = next(each for each, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
        own = gguf.get_tensor_name_map(architecture, 1)
        known = [gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[architecture]]
        answers[name] = {"own": {module: own.get_name(module) for module in modules}, "known": known}
    return answers


def write(folder, path):
    """Write the checkpoint of a small mixture as a GGUF."""
    config = json.loads(Path(folder, "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"w{number}" for number in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["w 1"])
    writer.add_eos_token_id(config["vocab_size"] - 1)
    own = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    held = load_file(Path(folder, "model.safetensors"))
    for name in [name for name in held if ".experts." not in name]:
        writer.add_tensor(own.get_name(name, try_suffixes=(".weight",)), held[name].float().numpy())
    for layer in range(config["num_hidden_layers"]):
        for kind in ("gate", "up", "down"):
            experts = (f"model.layers.{layer}.mlp.experts.{number}" for number in range(config["num_local_experts"]))
            parts = [held[f"{expert}.{kind}_proj.weight"].float().numpy() for expert in experts]
            writer.add_tensor(f"blk.{layer}.ffn_{kind}_exps.weight", np.stack(parts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokens(path, prompts, overrides):
    """Return the 24 likeliest tokens after each prompt."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.fit_params = False
    parameters.warmup = False
    parameters.verbosity = 5
    parameters.cpuparams.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if overrides:
        parameters.tensor_buft_overrides = ",".join(overrides)
    server = xllamacpp.Server(parameters)
    written = []
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(asked)
        text = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["text"]
        written.append([int(number) for number in re.findall(r"w(\d+)", text)])
    return written


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    if "names" in asked:
        print("\n" + json.dumps(names(asked["names"])))
    else:
        write(asked["folder"], asked["path"])
        print("\n" + json.dumps(tokens(asked["path"], asked["prompts"], asked["overrides"])))
