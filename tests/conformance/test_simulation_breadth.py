"""Plans of every measurable causal language model over two and three cards pass the dry run, or are repaired.

`auto_maps_that_do_not_run.yaml` lists the types whose map by `auto`, which is transformers' own, does not run.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
import zoo

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import graph_of
from devmap_config.graph.measurement import UnmeasurableModelError, measure

HERE = Path(__file__).parent
UNMEASURABLE = yaml.safe_load((HERE / "unmeasurable.yaml").read_text())
DO_NOT_RUN = yaml.safe_load((HERE / "auto_maps_that_do_not_run.yaml").read_text())

WORKLOAD = WorkloadShape(batch_size=1, context_length=32, prompt_length=32)

FLOAT32_ONLY = ("xlnet",)
"""Its attention mask is made in float32, whatever the model's dtype."""


def write_model(model_type):
    """Write a shallow model's config into `model`, and return its graph and measurement."""
    dtype = "float32" if model_type in FLOAT32_ONLY else "bfloat16"
    for build in (zoo.build_shallow, zoo.build):  # few layers may leave out a kind that the model needs
        try:
            model = build(model_type, dtype)
        except Exception as error:
            pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
        config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__], "dtype": dtype}
        graph = graph_of(model, getattr(torch, dtype))
        try:
            measurement = measure(model, graph, WORKLOAD)
        except UnmeasurableModelError:
            continue
        Path("model").mkdir()
        Path("model/config.json").write_text(json.dumps(config, default=str))
        return graph, measurement
    assert model_type in UNMEASURABLE
    pytest.skip("it is not measured, see unmeasurable.yaml")


def card_bytes(graph, measurement):
    """Return the memory of a card: room for some two thirds of the model, but at least for its largest block.

    Experts that are merged while loading need twice their bytes meanwhile.
    """
    largest = max(
        graph.weights_bytes(tuple(tensor.name for tensor in graph.modules[path].tensors())) for path in graph.blocks
    )
    running = measurement.cache_bytes + 2 * max(cost.peak_bytes for cost in measurement.modules)
    experts = [tensor for tensor in graph.tensors.values() if len(tensor.shape) == 3 and "experts" in tensor.name]
    loading = max((tensor.size_bytes for tensor in experts), default=0)
    return max(int(0.6 * graph.size_bytes), int(1.2 * largest)) + running + loading


def compiled(strategy, cards, memory_bytes):
    profile = {
        "version": 1,
        "model": {"source": "model"},
        "hardware": {
            "devices": {
                f"cuda:[0-{cards - 1}]": {
                    "memory": memory_bytes,
                    "bandwidth": "1TB/s",
                    "flops": "100TFLOP/s",  # what does not decode is placed by its prefill
                },
                "cpu": {"memory": 8 * memory_bytes},
            },
            "links": {"host": "25GB/s", "peer": "25GB/s"},
        },
        "placement": {"strategy": strategy},
    }
    if strategy == "fastest":  # transformers' planner counts weights only
        profile["workload"] = {"context_length": WORKLOAD.context_length}
    Path("profile.yaml").write_text(yaml.safe_dump(profile))
    return run_pipeline(Request(path=Path("profile.yaml"), simulates=True))


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", zoo.causal_model_types())
def test_plans_over_several_cards_run_or_are_repaired(model_type, tmp_path, monkeypatch):
    logging.disable(logging.WARNING)
    monkeypatch.chdir(tmp_path)
    memory_bytes = card_bytes(*write_model(model_type))
    refused = False
    for strategy in ("auto", "fastest"):
        for cards in (2, 3):
            compilation = compiled(strategy, cards, memory_bytes)
            messages = [each.message for each in compilation.diagnostics]
            assert isinstance(compilation, Compiled), (strategy, cards, messages)
            verdicts = list(compilation.verdicts.values())
            assert verdicts[-1].outcome == "runs", (strategy, cards, messages)
            mismatch = verdicts[0].mismatch  # those of towers, which text does not call, are not in the list
            refused |= strategy == "auto" and mismatch is not None and mismatch.phase != "towers"
    assert refused == (model_type in DO_NOT_RUN)


def test_the_list_names_only_causal_language_models():
    assert set(DO_NOT_RUN) <= set(zoo.causal_model_types())
