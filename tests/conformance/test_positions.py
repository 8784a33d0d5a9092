"""The measured limit of positions is the length at which models with real weights fail."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny
import torch
import zoo
from transformers import XLNetConfig

from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import build_meta_model, graph_of
from devmap_config.graph.measurement import UnmeasurableModelError, measure
from devmap_config.graph.positions import trained_length

SAMPLE = "bart bert deberta-v2 gptj llama mpt opt roberta t5 whisper".split()
"""Tables that are read at an offset, by a mask's sum, as slices, relative to each other; and models that have none."""

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "max_source_positions")
SHORT = 70
"""Models are made for so many tokens, where that is possible: their real forwards take no time then."""

LONGEST_RUN = 4096
"""Models whose positions do not end are run on no more tokens than this."""

PAST_NONE = 40
"""Models of which nothing says how far they go are run on so many tokens."""


def short_model(model_type):
    """Return a tiny model of few positions."""
    model = tiny.tiny_model(model_type)
    config = copy.deepcopy(model.config)
    try:
        for each in {id(each): each for each in (config, config.get_text_config(decoder=True))}.values():
            for name in LENGTHS:
                if isinstance(getattr(each, name, None), int):
                    setattr(each, name, SHORT)
        short = type(model)(config).eval()
        return short if runs_on(short, PAST_NONE) else model
    except Exception:  # a config that is refused, or a model of other inputs
        return model


def measured_positions(model):
    workload = WorkloadShape(batch_size=1, context_length=16, prompt_length=16)
    meta = build_meta_model(type(model), copy.deepcopy(model.config), torch.float32)
    try:
        return measure(meta, graph_of(meta, torch.float32), workload).positions
    except UnmeasurableModelError as error:
        if error.positions.end is None:
            pytest.skip(f"text alone does not run it, so that no end is stated: {error}"[:200])
        return error.positions


def runs_on(model, length):
    """Tell whether a model with weights takes this number of tokens; its vocabulary is large, no token is special."""
    inputs = tiny.inputs_for(model)
    words = (torch.arange(length) * 7 % 90 + 5).unsqueeze(0)
    inputs = {name: words if name.endswith("input_ids") else value for name, value in inputs.items()}
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def takes_text_alone(model):
    """Tell whether text is an input of a model, and the only one that it needs."""
    if not any(name.endswith("input_ids") for name in tiny.inputs_for(model)):
        return False
    try:
        return runs_on(model, PAST_NONE)
    except (TypeError, AttributeError):  # `None` stands for an image or a sound
        return False


def check_end(model_type):
    logging.disable(logging.WARNING)
    model = short_model(model_type)
    if not takes_text_alone(model):
        pytest.skip("it takes other inputs than text")
    positions = measured_positions(model)
    if positions.end is not None:
        assert runs_on(model, positions.end)
        assert not runs_on(model, positions.end + 1)
    else:
        assert runs_on(model, min(positions.trained or PAST_NONE, LONGEST_RUN) + 1)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_positions_end_where_a_model_with_weights_fails(model_type):
    check_end(model_type)


def test_a_model_without_a_limit_of_positions_takes_any_length():
    check_end("xlnet")
    assert trained_length(XLNetConfig()) is None


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", [name for name in zoo.model_types() if name not in SAMPLE])
def test_positions_of_the_zoo_end_where_a_model_with_weights_fails(model_type):
    try:
        check_end(model_type)
    except LookupError as error:
        pytest.skip(f"no tiny model: {error}"[:200])
