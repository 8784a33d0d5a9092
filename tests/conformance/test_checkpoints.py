"""Every architecture: a checkpoint as it saves itself holds it, and one that lacks a tensor, or is another's, does not.

Only headers are compared, so that the models stand on the meta device and no weights are written.
"""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion
from zoo import build_shallow, model_types

from devmap_config.graph.checkpoint import Checkpoint, StoredTensor
from devmap_config.graph.checkpoint_match import judge
from devmap_config.graph.meta_loading import match_names


def built(model_type):
    try:
        return build_shallow(model_type)
    except Exception:  # a package that is missing, or a default config that builds nothing: counted elsewhere
        return None


def saved(model):
    """The names and shapes that `save_pretrained` writes: of what is tied, only where it is tied to."""
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def checkpoint_of(shapes):
    return Checkpoint(
        {"model.safetensors": 0},
        {name: StoredTensor("F32", shape, "model.safetensors", 0, 4 * prod(shape)) for name, shape in shapes.items()},
    )


def judged(model, shapes):
    match = match_names(type(model), copy.deepcopy(model.config), checkpoint_of(shapes), torch.float32)
    return judge(match, {}, frozenset())


def damaged(shapes, other):
    """Checkpoints that are not the model's, by what was done to them."""
    names = [name for name, shape in shapes.items() if prod(shape) > 1]
    chosen = dict.fromkeys(names[place] for place in (0, len(names) // 3, 2 * len(names) // 3, -1))
    for name in chosen:
        rest = {each: shape for each, shape in shapes.items() if each != name}
        yield f"without {name}", rest
        yield f"with {name} renamed", {**rest, f"{name}_old": shapes[name]}
        yield f"with {name} reshaped", {**rest, name: (shapes[name][0] + 1, *shapes[name][1:])}
    yield "of another model", other


OTHER = {f"some.other.{number}.weight": (3, 5) for number in range(20)}


def faults(model_type):
    model = built(model_type)
    if model is None:
        return []
    shapes = saved(model)
    found = judged(model, shapes)
    said = [] if found.error is None else [f"its own: {found.error}"]
    return said + [how for how, wrong in damaged(shapes, OTHER) if judged(model, wrong).error is None]


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "t5", "bert", "qwen3_moe", "whisper", "gemma3", "mamba", "llava"]
)
def test_a_checkpoint_holds_the_model_that_saved_it_and_no_other(model_type):
    assert faults(model_type) == []


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", model_types())
def test_every_checkpoint_holds_the_model_that_saved_it_and_no_other(model_type):
    assert faults(model_type) == []
