"""Every language model of transformers can be measured, or is in `unmeasurable.yaml` with the reason.

Blocks that are alike and not run are predicted to do what they do if all are run.

Language models are: causal language models, encoder-decoders, and image-text models with a prompt of text alone.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml
import zoo

import devmap_config.graph.measurement
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import graph_of
from devmap_config.graph.measurement import UnmeasurableModelError, measure
from devmap_config.graph.repetition import kinds_of

UNMEASURABLE = yaml.safe_load((Path(__file__).parent / "unmeasurable.yaml").read_text())

WORKLOAD = WorkloadShape(batch_size=1, context_length=32, prompt_length=32)

MODEL_TYPES = sorted({*zoo.causal_model_types(), *zoo.sequence_model_types(), *zoo.image_text_model_types()})

FLOAT32_ONLY = ("xlnet",)
"""Its attention mask is made in float32, whatever the model's dtype."""


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_language_model_is_measured_or_listed(model_type, monkeypatch):
    logging.disable(logging.WARNING)
    dtype = "float32" if model_type in FLOAT32_ONLY else "bfloat16"
    try:
        model = zoo.build(model_type, dtype)
    except Exception as error:
        pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
    graph = graph_of(model, getattr(torch, dtype))
    spares_blocks = bool(kinds_of(model, graph.blocks))
    try:
        measurement = measure(model, graph, WORKLOAD)
    except UnmeasurableModelError as error:
        assert error.failure.cause == "model", str(error)
        assert model_type in UNMEASURABLE, str(error)
        assert UNMEASURABLE[model_type] in str(error)
    else:
        assert model_type not in UNMEASURABLE
        assert sum(cost.prefill_operations for cost in measurement.modules) > 0
        assert all(cost.doubled_cache_bytes >= cost.cache_bytes for cost in measurement.modules)
        if spares_blocks:
            monkeypatch.setattr(devmap_config.graph.measurement, "kinds_of", lambda *_: ())
            assert measure(zoo.build(model_type, dtype), graph, WORKLOAD) == measurement


def test_at_most_a_twentieth_of_the_text_models_is_unmeasurable():
    """Types that the list says need more than text are not counted."""
    wanting_more = [name for name, reason in UNMEASURABLE.items() if reason in WANTED]
    assert len(UNMEASURABLE) - len(wanting_more) <= (len(MODEL_TYPES) - len(wanting_more)) / 20


WANTED = (
    "it takes `pixel_values` besides text",
    "pixel_values",
    "it takes `state` besides text",
    "shared_kv_states",
    "flattened_patches",
    "Bbox",
    "input_features",
)
"""What a type says that it wants besides text."""
