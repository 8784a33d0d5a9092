"""Weights that are copied ahead to an accelerator: there when a module computes, and never overwritten while one does.

The accelerator is simulated (`late_copies.py`): neither of its streams can do without waiting for the other.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import OffloadedWeightsLoader
from conftest import LLAMA, MIXTURE
from late_copies import POISON, LateCopies
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from devmap_config.dispatch.streamed_weights import Slot, Streamer, attach, loads_of, streamed_modules

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])


def config_of(values, **changed):
    return {key: value for key, value in values.items() if key not in ("architectures", "dtype")} | changed


MODELS = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(**config_of(LLAMA))),
    "tied head": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=512)),
    "fused experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**config_of(MIXTURE))),
    "encoder and decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "own tokens around its modules": lambda: ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=4,
        )
    ),
}


def outputs(model):
    given = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        if isinstance(model, ViTModel):
            return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).last_hidden_state
        return model(input_ids=TOKENS, **given).logits


def offloaded(model, is_streamed=lambda _path: True):
    """Attach accelerate's hooks, as it does for a map: children of the model, or of its inner model, are streamed."""
    inner = dict(model.named_children())
    units = [
        f"{path}.{name}" if name else path
        for path, child in inner.items()
        for name in (dict(child.named_children()) if len(inner) < 3 and list(child.children()) else [""])
    ]
    loader = OffloadedWeightsLoader(state_dict=dict(model.state_dict()))
    attach_align_device_hook_on_blocks(
        model,
        execution_device=dict.fromkeys(["", *units], torch.device("cpu")),
        offload={path: is_streamed(path) for path in units},
        weights_map=loader,
    )
    return loader


def streaming(model, run_order=()):
    streams, streamed = LateCopies(), streamed_modules(model, run_order)
    loads = loads_of(streamed)
    for module in streamed:
        module.register_forward_hook(streams.compute_with)
    slot_bytes = max(load.memory.nbytes for load in loads)
    slots = tuple(Slot(torch.full((slot_bytes,), POISON, dtype=torch.uint8)) for _ in range(2))
    attach(streamed, loads, Streamer(loads, streams, slots))
    return streams, loads


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_model_that_is_all_there(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    expected = outputs(model)
    offloaded(model)
    streams, loads = streaming(model)
    assert len(loads) > 2
    for _ in range(3):
        assert torch.equal(outputs(model), expected)
    assert streams.computed
    assert len(streams.copies) > 2 * len(loads)
    assert all(parameter.is_meta for load in loads for module in load.places for parameter in module.parameters())


def run_order(model):
    order = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
    ]
    outputs(model)
    for hook in hooks:
        hook.remove()
    return order


@pytest.fixture
def dense():
    """A model whose modules are streamed in the order in which they run, with its streams and loads."""
    model = MODELS["dense"]().eval()
    order = run_order(model)
    offloaded(model)
    return (model, *streaming(model, order))


def test_each_load_is_copied_once_a_forward_and_before_it_is_asked_for(dense):
    model, streams, loads = dense
    outputs(model)
    asked, copied = [], len(streams.copies)
    for load in loads:
        first = next(iter(load.places))
        first.register_forward_pre_hook(
            lambda *_, load=load: asked.append([*map(id, sources(streams))][-1] == id(load.memory))
        )
    outputs(model)
    assert asked == [True] * len(loads)
    assert [*map(id, sources(streams))][copied:] == [id(load.memory) for load in (*loads[1:], loads[0])]


def sources(streams):
    return [copy.source for copy in streams.copies]


def test_the_order_is_learnt_where_it_is_not_known():
    model = MODELS["dense"]().eval()
    offloaded(model)
    paths = [path for path, _ in model.named_modules()]
    streams, _loads = streaming(model, sorted(paths, key=lambda path: "layers.1" not in path))
    copies = []
    for _ in range(3):
        before = len(streams.copies)
        outputs(model)
        copies.append(len(streams.copies) - before)
    assert copies[0] > copies[2]
    assert copies[2] == copies[1]


def test_no_load_is_larger_than_the_largest_module_and_all_are_in_one(dense):
    model, _streams, loads = dense
    largest = max(sum(each.nbytes for each in module.parameters()) for load in loads for module in load.places)
    assert max(load.memory.nbytes for load in loads) == largest
    held = [module for load in loads for module in load.places]
    assert len(held) == len(set(held)) == sum(1 for each in model.modules() if list(each.parameters(recurse=False)))


def test_a_forward_that_fails_leaves_slots_free_and_weights_away(dense):
    model, _streams, loads = dense
    expected = outputs(model)
    broken = model.model.layers[1].mlp.down_proj

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = broken.register_forward_pre_hook(fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            outputs(model)
    hook.remove()
    assert all(each.is_meta for load in loads for module in load.places for each in module.parameters())
    assert torch.equal(outputs(model), expected)


def test_a_model_that_is_streamed_is_saved_as_it_was(dense, tmp_path):
    model, _streams, _loads = dense
    expected = outputs(model)
    model.hf_device_map = {"": "cpu"}
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(outputs(model), expected)


def test_what_accelerate_still_streams_is_right():
    """A module around others that are streamed, and two that share a weight, are left to accelerate."""
    model = MODELS["own tokens around its modules"]().eval()
    expected = outputs(model)
    offloaded(model)
    _streams, loads = streaming(model)
    assert model.embeddings not in [module for load in loads for module in load.places]
    assert model.embeddings.cls_token.is_meta
    assert torch.equal(outputs(model), expected)


def test_what_is_streamed_is_held_once_and_goes_with_the_model():
    model = MODELS["dense"]().eval()
    loader = offloaded(model)
    names, held = list(loader.state_dict), [weakref.ref(each) for each in loader.state_dict.values()]
    streams, loads = streaming(model)
    spans = [(load.memory.data_ptr(), load.memory.data_ptr() + load.memory.nbytes) for load in loads]
    parameters = [name for name in names if name in dict(model.named_parameters())]
    for name in parameters:
        at = loader.state_dict[name].data_ptr()
        assert any(start <= at < end for start, end in spans), name
    gc.collect()
    assert not any(reference() is not None for reference, name in zip(held, names, strict=True) if name in parameters)
    gone = weakref.ref(loads[0].memory)
    del model, loader, loads, streams
    gc.collect()
    assert gone() is None
