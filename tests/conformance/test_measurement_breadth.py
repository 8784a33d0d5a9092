"""Every causal language model of transformers is measured, or stands in `unmeasurable.yaml` with its reason."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml
import zoo

from devmap_config.graph.costs import Workload
from devmap_config.graph.measurement import UnmeasurableModelError, measure

UNMEASURABLE = yaml.safe_load((Path(__file__).parent / "unmeasurable.yaml").read_text())

WORKLOAD = Workload(batch_size=1, context_length=32, prompt_length=32)


FLOAT32_ONLY = ("xlnet",)
"""Its attention mask is made in float32, whatever the model's dtype."""


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", zoo.causal_model_types())
def test_a_causal_language_model_is_measured(model_type):
    logging.disable(logging.WARNING)
    try:
        model = zoo.build(model_type, "float32" if model_type in FLOAT32_ONLY else "bfloat16")
    except Exception as error:
        pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
    try:
        measurement = measure(model, WORKLOAD)
    except UnmeasurableModelError as error:
        assert model_type in UNMEASURABLE, str(error)
        assert UNMEASURABLE[model_type] in str(error)
    else:
        assert model_type not in UNMEASURABLE
        assert sum(cost.prefill_operations for cost in measurement.modules) > 0
