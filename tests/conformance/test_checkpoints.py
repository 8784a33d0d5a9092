"""For every architecture, the names and shapes that `save_pretrained` writes are accepted, and damaged ones are
refused.

Only headers are compared, so models are on the meta device and no weights are written.
"""

from __future__ import annotations

import copy
import re
from math import prod

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from zoo import build_shallow, model_types

from devmap_config.graph.checkpoint import Checkpoint, StoredTensor
from devmap_config.graph.checkpoint_match import judge
from devmap_config.graph.meta_loading import match_names


def saved(model):
    """Return the names and shapes that `save_pretrained` writes; of tied tensors, only the one that others refer to."""
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def checkpoint_of(shapes):
    return Checkpoint(
        {"model.safetensors": 0},
        {name: StoredTensor("F32", shape, "model.safetensors", 0, 4 * prod(shape)) for name, shape in shapes.items()},
    )


def judged(model, shapes):
    match = match_names(type(model), copy.deepcopy(model.config), checkpoint_of(shapes), torch.float32, {})
    return judge(match, {}, frozenset())


PADDED = ("model.llm.unembed.weight",)
"""Inkling's head, stored with rows to spare, which are cut off while it is loaded (`Inkling2UnpadVocab`)."""


def damaged(model, shapes, other):
    """Yield damaged checkpoints, each with what was done to it."""
    dispensable = re.compile("|".join(model._keys_to_ignore_on_load_missing or ["^$"]))  # transformers fills these
    names = [name for name, shape in shapes.items() if prod(shape) > 1 and not dispensable.search(name)]
    chosen = dict.fromkeys(names[place] for place in (len(names) // 3, -1))
    for name in chosen:
        rest = {each: shape for each, shape in shapes.items() if each != name}
        yield f"without {name}", rest
        yield f"with {name} renamed", {**rest, f"{name}_old": shapes[name]}
        if name not in PADDED:
            yield f"with {name} reshaped", {**rest, name: (shapes[name][0] + 1, *shapes[name][1:])}
    yield "of another model", other


OTHER = {f"some.other.{number}.weight": (3, 5) for number in range(20)}


def faults(model):
    shapes = saved(model)
    found = judged(model, shapes)
    said = [] if found.error is None else [f"its own: {found.error}"]
    return said + [how for how, wrong in damaged(model, shapes, OTHER) if judged(model, wrong).error is None]


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "t5", "bert", "qwen3_moe", "whisper", "gemma3", "mamba", "llava"]
)
def test_a_checkpoint_matches_only_the_model_that_saved_it(model_type):
    assert faults(build_shallow(model_type)) == []


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}

FP8 = LlamaConfig(
    **SMALL,
    hidden_size=256,
    intermediate_size=512,
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
)
MXFP4 = GptOssConfig(
    **SMALL,
    hidden_size=64,
    intermediate_size=64,
    num_local_experts=4,
    head_dim=16,
    quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
)


def quantized_shapes(model_class, config):
    """Return dtypes and shapes of a checkpoint in fp8 (a scale per block) or mxfp4 (packed by 32), and
    of a dense one.
    """
    dense = copy.deepcopy(config)
    del dense.quantization_config
    with torch.device("meta"):
        state = model_class(dense).state_dict()
    stored = {}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if config is FP8 and name.endswith("_proj.weight"):
            stored |= {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", tuple(-(-size // 128) for size in shape))}
        elif config is MXFP4 and name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = shape
            stored[f"{name}_blocks"] = ("U8", (count, rows, columns // 32, 16))
            stored[f"{name}_scales"] = ("U8", (count, rows, columns // 32))
        else:
            stored[name] = ("BF16", shape)
    return stored, {name: tuple(tensor.shape) for name, tensor in state.items()}


UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("model_class", "config", "name", "stored", "said"),
    [
        (LlamaForCausalLM, FP8, None, None, None),
        (LlamaForCausalLM, FP8, UP, None, f"1 of 21 tensors is missing (`{UP}`)"),
        (LlamaForCausalLM, FP8, f"{UP}_scale_inv", None, f"`{UP}` is of F8_E4M3, and its scale is missing"),
        (LlamaForCausalLM, FP8, UP, ("F8_E4M3", (256, 256)), f"`{UP}` is 256 × 256, and 512 × 256 in the model"),
        (GptOssForCausalLM, MXFP4, None, None, None),
        (GptOssForCausalLM, MXFP4, f"{DOWN}_blocks", None, f"`{DOWN}` cannot be put together"),
        (GptOssForCausalLM, MXFP4, f"{DOWN}_scales", None, f"`{DOWN}` cannot be put together"),
        (GptOssForCausalLM, MXFP4, "model.norm.weight", None, "(`model.norm.weight`)"),
    ],
)
def test_quantised_checkpoints_match_their_models_by_name(model_class, config, name, stored, said):
    held, dense = quantized_shapes(model_class, config)
    if name is not None:
        del held[name]
    if stored is not None:
        held[name] = stored
    tensors = {each: StoredTensor(*entry, "model.safetensors", 0, 0) for each, entry in held.items()}
    checkpoint = Checkpoint({"model.safetensors": 0}, tensors)
    match = match_names(model_class, copy.deepcopy(config), checkpoint, torch.bfloat16, dense)
    error = judge(match, {}, frozenset()).error
    assert error is None if said is None else said in error


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", model_types())
def test_every_checkpoint_matches_only_the_model_that_saved_it(model_type):
    try:
        model = build_shallow(model_type)
    except Exception as error:
        pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
    assert faults(model) == []
