"""A dry run that runs only some of the blocks that are alike finds the same as one that runs all of them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import transformers
import zoo
from kinds import MODELS, config_of, config_of_shared_caches, deep_config_of
from placements import plans_that_do_not, plans_that_run
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.introspection import build_meta_model, graph_of
from devmap_config.graph.measurement import UnmeasurableModelError, measure
from devmap_config.simulate import dry_run

FLOAT32_ONLY = ("xlnet",)
"""Its attention mask is made in float32, whatever the model's dtype."""

CONFIGS = {name: lambda name=name: deep_config_of(name) for name in MODELS} | {"shared caches": config_of_shared_caches}
CLASSES = {name: class_name for name, (class_name, *_) in MODELS.items()} | {"shared caches": "Gemma3nForCausalLM"}

IN_PARTS = WorkloadShape(batch_size=2, context_length=20, prompt_length=8)
"""A prompt that is a part of the context: prefilled, filled, decoded."""


def build(name):
    return build_meta_model(getattr(transformers, CLASSES[name]), CONFIGS[name](), torch.float32)


def measured_graph(name, workload=IN_PARTS):
    graph = graph_of(build(name), torch.float32)
    return replace(graph, measurement=measure(build(name), graph, workload))


def both(built, graph, plan, monkeypatch, **options):
    """Return the dry run, and the dry run of all blocks."""
    spared = dry_run.dry_run(built(), graph, plan, **options)
    with monkeypatch.context() as context:
        context.setattr(dry_run, "kinds_of", lambda *_: ())
        return spared, dry_run.dry_run(built(), graph, plan, **options)


@pytest.mark.parametrize("name", ["dense", "sliding and full", pytest.param("shared caches", marks=pytest.mark.zoo)])
def test_dry_run_with_repeated_blocks_finds_the_same_on_cards_and_from_disk(name, monkeypatch):
    graph = measured_graph(name)
    plans = dict(plans_that_run(graph))
    for shown in ("three cards", "streamed from two stores"):
        spared, whole = both(lambda: build(name), graph, plans[shown], monkeypatch)
        assert (shown, spared) == (shown, whole)
    assert spared.outcome == "runs"
    *_, (shown, plan) = (each for each in plans_that_do_not(graph) if "third card" in each[0])
    spared, whole = both(lambda: build(name), graph, plan, monkeypatch)
    assert (shown, spared) == (shown, whole)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        pytest.param("dense", {"model.layers.4", "model.layers.5", "model.layers.6"}, marks=pytest.mark.zoo),
        # A norm behind the part brings back what it gives, but in the first block on a card.
        pytest.param("sliding and full", {"model.layers.4"}, marks=pytest.mark.zoo),
    ],
)
def test_dry_run_with_repeated_blocks_finds_the_same_in_every_plan(name, broken, monkeypatch):
    graph = measured_graph(name)
    outcomes = {}
    for shown, plan in (*plans_that_run(graph), *plans_that_do_not(graph)):
        spared, whole = both(lambda: build(name), graph, plan, monkeypatch)
        assert (shown, spared) == (shown, whole)
        outcomes[shown] = spared.mismatch.running if spared.mismatch else spared.outcome
    assert list(outcomes.values()).count("runs") >= 9
    assert set(outcomes.values()) == {"runs", *broken}


@pytest.mark.zoo
@pytest.mark.parametrize("name", CONFIGS)
def test_dry_run_with_repeated_blocks_finds_the_same_for_every_kind_of_model(name, monkeypatch):
    graph = measured_graph(name)
    for shown, plan in (*plans_that_run(graph), *plans_that_do_not(graph)):
        spared, whole = both(lambda: build(name), graph, plan, monkeypatch)
        assert (shown, spared) == (shown, whole)


@pytest.mark.parametrize("changes", [{"cache": "static"}, {"all_logits": True}, {"prompt_length": 20}])
def test_dry_run_with_repeated_blocks_finds_the_same_under_every_workload(changes, monkeypatch):
    graph = measured_graph("sliding and full", replace(IN_PARTS, **changes))
    plan = dict(plans_that_run(graph))["three cards"]
    spared, whole = both(lambda: build("sliding and full"), graph, plan, monkeypatch, decoded_tokens=2)
    assert spared == whole


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", zoo.causal_model_types())
def test_dry_run_with_repeated_blocks_finds_the_same_for_every_language_model(model_type, monkeypatch):
    logging.disable(logging.WARNING)
    dtype = "float32" if model_type in FLOAT32_ONLY else "bfloat16"

    def built():
        return zoo.build(model_type, dtype)

    try:
        graph = graph_of(built(), getattr(torch, dtype))
        graph = replace(graph, measurement=measure(built(), graph, replace(IN_PARTS, prompt_length=20)))
    except UnmeasurableModelError:
        pytest.skip("it is not measured, see unmeasurable.yaml")
    except Exception as error:
        pytest.skip(f"transformers does not build it from a default config: {type(error).__name__}")
    plans = dict(plans_that_run(graph))
    for shown in ("there and back", "streamed from two stores"):
        spared, whole = both(built, graph, plans[shown], monkeypatch)
        assert (shown, spared) == (shown, whole)


def test_dry_run_runs_two_of_the_blocks_that_are_alike_on_a_device(monkeypatch):
    run = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, states: run.append(id(self)) or forward(self, states))
    config = config_of("dense", num_hidden_layers=16)

    def built():
        return build_meta_model(transformers.LlamaForCausalLM, config, torch.float32)

    graph = graph_of(built(), torch.float32)
    assert dry_run.dry_run(built(), graph, dict(plans_that_run(graph))["three cards"]).outcome == "runs"
    # On each of the others the first as well, which is given what another card made; and layer 1, whose place is also
    # how many queries share a key.
    assert len(set(run)) == 2 + 3 + 3 + 1


def test_skipped_blocks_are_run_if_a_block_does_more_than_the_one_before(monkeypatch):
    forward, model_forward, seen = LlamaMLP.forward, LlamaModel.forward, []

    def doing_more(self, states):
        seen.append(self)
        number = list(dict.fromkeys(map(id, seen))).index(id(self))
        return forward(self, torch.cat([states, states]) if number == 2 else states)[: len(states)]

    def anew(self, *arguments, **options):
        seen.clear()
        return model_forward(self, *arguments, **options)

    monkeypatch.setattr(LlamaMLP, "forward", doing_more)
    monkeypatch.setattr(LlamaModel, "forward", anew)
    graph = measured_graph("dense")
    spared, whole = both(lambda: build("dense"), graph, dict(plans_that_run(graph))["one card"], monkeypatch)
    assert spared == whole
    assert spared.outcome == "runs"
