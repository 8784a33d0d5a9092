"""Measurements without data match real runs: the cache to the byte, activations as torch's profiler records them."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import json

import pytest
import torch
import transformers
from broken_maps import SHARED_CACHE, SHARING_CODE
from kinds import GROUPED, MODELS, config_of, config_of_shared_caches, deep_config_of
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel, LlamaRMSNorm

from devmap_config.graph import measurement
from devmap_config.graph.costs import Measurement, WorkloadShape
from devmap_config.graph.forwards import CACHE_NAMES, cache_tensors
from devmap_config.graph.introspection import build_graph, build_meta_model, graph_of
from devmap_config.graph.measurement import measure
from devmap_config.graph.repetition import kinds_of
from devmap_config.libraries.torch import tensors_without_data

LENGTH = 200

CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(LlamaModel.forward).parameters)
"""What this version of transformers calls the cache that a model is given."""

BLOCK_FORWARD = LlamaDecoderLayer.forward
NORM_FORWARD = LlamaRMSNorm.forward


def length_of(name):
    """Return the length of a model's prompt; a state space runs token by token."""
    return 20 if name == "state space" else LENGTH


def measured(name, *, config=None, **workload):
    model_class = getattr(transformers, MODELS[name][0])
    model = build_meta_model(model_class, config or config_of(name), torch.float32)
    workload = {"batch_size": 2, "context_length": length_of(name), "prompt_length": length_of(name), **workload}
    return measure(model, graph_of(model, torch.float32), WorkloadShape(**workload))


@functools.cache
def usual_measurement(name):
    """Of the workload that most tests take, measured once."""
    return measured(name)


def really_run(name):
    """Return a real model and its inputs; its weights are random, since sizes do not depend on them."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name][0])(config_of(name)).eval()
    inputs = {"input_ids": torch.ones((2, length_of(name)), dtype=torch.long), "use_cache": True}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    return model, inputs


def cache_in(output):
    return next(found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None)


def cache_of(output):
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache_in(output)))


@pytest.mark.parametrize("name", list(MODELS))
def test_measured_cache_has_the_bytes_of_a_real_one(name):
    model, inputs = really_run(name)
    with torch.no_grad():
        output = model(**inputs)
    measurement = usual_measurement(name)
    assert measurement.cache_bytes == cache_of(output)
    assert sum(cost.cache_bytes for cost in measurement.modules) > 0


@pytest.mark.parametrize("name", ["dense", "grouped queries", "sliding window", "experts", "learned positions", "tied"])
def test_a_token_adds_the_cache_bytes_that_a_real_one_adds(name):
    model, inputs = really_run(name)
    with torch.no_grad():
        output = model(**inputs)
        before = cache_of(output)
        output = model(input_ids=inputs["input_ids"][:, :1], **{CACHE: cache_in(output)}, use_cache=True)
    per_token = sum(cost.cache_bytes_per_token for cost in usual_measurement(name).modules)
    assert per_token == cache_of(output) - before


def profiled_peak(model, inputs):
    """Return the peak of bytes above those held before, as torch's own profiler counts allocations."""
    with torch.no_grad():
        model(**inputs)  # what is made once and kept is not of this run
        gc.collect()  # neither is what earlier runs left, if it is freed meanwhile
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = model(**inputs)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, cache_of(output)


@pytest.mark.parametrize("name", list(MODELS))
def test_measured_activation_peak_is_that_of_the_profiler(name):
    model, inputs = really_run(name)
    peak, cache_bytes = profiled_peak(model, inputs)
    measurement = usual_measurement(name)
    predicted = max(cost.prefill_peak_bytes for cost in measurement.modules)
    # Blocks are alike, so that activations peak in the last one as well, when the whole cache is there, with all that
    # windows into it keep alive.
    retained = sum(cost.retained_bytes for cost in measurement.modules)
    assert predicted + cache_bytes + retained == pytest.approx(peak, rel=0.1)


def test_no_kernel_forms_the_matrix_of_scores():
    # The CPU has no kernel for heads whose keys and values differ in size; accelerators do.
    def scores_bytes(length):
        return 2 * 4 * length * length * 4

    measurement = measured("latent attention", context_length=2048, prompt_length=2048)
    assert 0 < measurement.by_path["model.layers.1.self_attn"].prefill_peak_bytes < scores_bytes(2048) / 2


def test_a_batch_costs_a_multiple_of_one_sequence():
    one, four = measured("dense", batch_size=1), measured("dense", batch_size=4)
    assert four.cache_bytes == 4 * one.cache_bytes
    assert sum(cost.prefill_operations for cost in four.modules) == 4 * sum(
        cost.prefill_operations for cost in one.modules
    )


def test_prefilling_in_parts_needs_less_while_the_cache_is_the_same():
    whole, parts = usual_measurement("dense"), measured("dense", prompt_length=20)
    assert parts.cache_bytes == whole.cache_bytes
    assert parts.by_path[""].prefill_peak_bytes < whole.by_path[""].prefill_peak_bytes


def test_all_logits_cost_a_row_per_token():
    last, every = usual_measurement("dense"), measured("dense", all_logits=True)
    rows = 2 * (LENGTH - 1) * 512 * 4
    assert every.by_path["lm_head"].prefill_peak_bytes - last.by_path["lm_head"].prefill_peak_bytes == rows


def test_a_static_cache_is_full_from_the_beginning():
    measurement = measured("dense", cache="static")
    # One position more than the context, for the token that follows.
    full_bytes = 4 * 2 * 2 * 128 * 4 * (LENGTH + 1)
    assert full_bytes <= measurement.cache_bytes <= full_bytes + 4 * 8  # and how far each layer has come


def test_operations_of_matrix_products_are_those_of_the_formula():
    measurement = measured("dense", batch_size=1)
    by_path = measurement.by_path
    assert by_path["model.layers.0.mlp.up_proj"].prefill_operations == 2 * LENGTH * 128 * 256
    assert by_path["model.layers.0.mlp.up_proj"].decode_operations == 2 * 128 * 256
    assert 512 * 128 * 4 <= by_path["lm_head"].decode_touched_bytes < 1.05 * 512 * 128 * 4


def test_attention_in_half_precision_is_counted_separately():
    """CPUs take long for it, especially for a single query."""

    def decoded(dtype):
        model = build_meta_model(transformers.LlamaForCausalLM, config_of("dense"), dtype)
        workload = WorkloadShape(batch_size=1, context_length=LENGTH, prompt_length=LENGTH)
        cost = measure(model, graph_of(model, dtype), workload).by_path["model.layers.0.self_attn"]
        return cost.decode_attention_operations, cost.decode_operations

    assert decoded(torch.bfloat16) == (4 * 128 * (LENGTH + 1),) * 2
    assert decoded(torch.float32) == (0, 4 * 128 * (LENGTH + 1))


def test_one_token_reads_only_its_experts():
    by_path = measured("many experts", batch_size=1).by_path
    experts = next(cost for path, cost in by_path.items() if path.endswith("mlp.experts"))
    weights_bytes = 8 * 3 * 128 * 64 * 4
    assert weights_bytes * 2 / 8 <= experts.decode_touched_bytes < weights_bytes * 2 / 8 * 1.3
    assert experts.prefill_touched_bytes > weights_bytes


def slow_ones_in_the_zoo(names):
    """Models that run many small operations take several seconds each."""
    return [pytest.param(name, marks=pytest.mark.zoo) if name in ("state space", "looped") else name for name in names]


def measured_deep(name, **workload):
    length = length_of(name)
    return measured(
        name, config=deep_config_of(name), **{"context_length": length, "prompt_length": length, **workload}
    )


@pytest.mark.parametrize("name", slow_ones_in_the_zoo(MODELS))
def test_measuring_two_blocks_of_a_kind_equals_measuring_all(name, monkeypatch):
    spared = measured_deep(name)
    monkeypatch.setattr(measurement, "kinds_of", lambda *_: ())
    assert measured_deep(name) == spared


WORKLOADS = [{"cache": "static"}, {"prompt_length": 20}, {"all_logits": True}]


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        pytest.param(name, workload, marks=[pytest.mark.zoo] if place != own else [])
        for place, name in enumerate(["dense", "sliding and full", "encoder-decoder"])
        for own, workload in enumerate(WORKLOADS)
    ],
)
def test_measuring_two_blocks_of_a_kind_equals_measuring_all_under_every_workload(name, workload, monkeypatch):
    spared = measured_deep(name, **workload)
    monkeypatch.setattr(measurement, "kinds_of", lambda *_: ())
    assert measured_deep(name, **workload) == spared


def test_two_of_the_blocks_that_are_alike_are_run(monkeypatch):
    run = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, states: run.append(id(self)) or forward(self, states))
    measured_deep("dense")
    assert len(set(run)) == 3  # and the one whose position, 1, is taken for how many queries share a key


def forward_that_keeps(forward, kept):
    """Keep something until all blocks have run, as skipped blocks would have done too."""

    def keeping(self, states):
        output = forward(self, states)
        kept.append(output * 2)
        return output

    return keeping


def forward_of_which_one_does_more(forward, seen):
    """Make the second block of the kind, which the others would repeat, do more than they do."""

    def doing_more(self, states):
        seen.append(self)
        third = list(dict.fromkeys(map(id, seen)))[2:3]  # the block between is of another kind
        return forward(self, torch.cat([states, states]) if id(self) in third else states)[: len(states)]

    return doing_more


def forward_that_lets_go(forward, kept):
    """Release, each time, what the block before kept."""

    def letting_go(self, states):
        output = forward(self, states)
        kept[:] = [output * 2]
        return output

    return letting_go


@pytest.mark.parametrize("misbehave", [forward_that_keeps, forward_of_which_one_does_more, forward_that_lets_go])
def test_blocks_that_behave_differently_are_all_run(misbehave, monkeypatch):
    forward, model_forward = LlamaMLP.forward, LlamaModel.forward

    def measured_once():
        kept = []

        def run(self, *arguments, **options):
            output = model_forward(self, *arguments, **options)
            if misbehave is not forward_of_which_one_does_more:
                kept.clear()
            return output

        monkeypatch.setattr(LlamaMLP, "forward", misbehave(forward, kept))
        monkeypatch.setattr(LlamaModel, "forward", run)
        return measured_deep("dense")

    spared = measured_once()
    monkeypatch.setattr(measurement, "kinds_of", lambda *_: ())
    assert measured_once() == spared


def returned_alongside(monkeypatch, what):
    """Make Llama's blocks return something more, which is passed to the next block."""

    def forward(self, hidden_states, *arguments, **options):
        states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return BLOCK_FORWARD(self, states, *arguments, **options), what(self, options)

    def norm(self, states):
        return NORM_FORWARD(self, states[0] if isinstance(states, tuple) else states)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


def own_weight(block, _options):
    return block.mlp.down_proj.weight


def own_cache(block, options):
    return options[CACHE].layers[block.self_attn.layer_idx].keys


def something_of_the_cache_before(block, options):
    return options[CACHE].layers[max(block.self_attn.layer_idx - 1, 0)].keys.sum()


def nothing_but_its_cache_put_aside_for_the_next(block, options):
    options["shared"]["last"] = own_cache(block, options)


@pytest.mark.parametrize(
    "what", [own_weight, own_cache, something_of_the_cache_before, nothing_but_its_cache_put_aside_for_the_next]
)
def test_additional_outputs_of_skipped_blocks_are_measured(what, monkeypatch):
    returned_alongside(monkeypatch, what)
    model_forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda self, *arguments, **options: model_forward(
            self, *arguments, shared={"last": self.embed_tokens.weight}, **options
        ),
    )

    def measured_once():
        model = build_meta_model(transformers.LlamaForCausalLM, config_of("dense", num_hidden_layers=8), torch.float32)
        model.model.layers[0].marker = "is given one tensor, where the others are given two"
        workload = WorkloadShape(batch_size=2, context_length=40, prompt_length=40)
        return measure(model, graph_of(model, torch.float32), workload)

    spared = measured_once()
    monkeypatch.setattr(measurement, "kinds_of", lambda *_: ())
    assert measured_once() == spared


def test_a_shared_cache_that_grows_between_blocks_is_measured(monkeypatch):
    """Blocks after its growth are given more than equal blocks before it."""
    config = config_of_shared_caches()
    workload = WorkloadShape(batch_size=2, context_length=40, prompt_length=40)

    def measured_once():
        model = build_meta_model(transformers.Gemma3nForCausalLM, config, torch.float32)
        return measure(model, graph_of(model, torch.float32), workload)

    spared = measured_once()
    monkeypatch.setattr(measurement, "kinds_of", lambda *_: ())
    assert measured_once() == spared


def test_blocks_are_alike_only_with_equal_config_values_and_no_shared_modules():
    model = build_meta_model(transformers.LlamaForCausalLM, config_of("dense", num_hidden_layers=9), torch.float32)
    blocks, layers = graph_of(model, torch.float32).blocks, model.model.layers
    before = (tuple(f"model.layers.{index}" for index in (0, 2, 3, 4, 5, 6, 7, 8)),)
    assert kinds_of(model, blocks) == before
    model.config.scale_of_each = [1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert kinds_of(model, blocks) == (before[0][:4], before[0][4:])
    layers[8].mlp = layers[7].mlp
    assert kinds_of(model, blocks) == (before[0][:4], before[0][4:7])


def test_blocks_of_code_that_comes_with_a_model_are_all_run():
    model = build_meta_model(transformers.LlamaForCausalLM, config_of("dense"), torch.float32)
    blocks = graph_of(model, torch.float32).blocks
    assert kinds_of(model, blocks) == (("model.layers.0", "model.layers.2", "model.layers.3"),)
    model.__class__ = type(
        "OfAStranger", (transformers.LlamaForCausalLM,), {"__module__": "transformers_modules.theirs"}
    )
    assert kinds_of(model, blocks) == ()


def test_a_second_measurement_in_one_process_is_equal():
    """Tensors that a model releases itself, here its positions, must not be mistaken for later ones."""
    config = transformers.CTRLConfig(vocab_size=99, n_positions=256, n_embd=1280, dff=64, n_layer=2, n_head=4)
    workload = WorkloadShape(batch_size=1, context_length=32, prompt_length=32)

    def measured_once():
        model = build_meta_model(transformers.CTRLLMHeadModel, config, torch.bfloat16)
        return measure(model, graph_of(model, torch.bfloat16), workload)

    assert measured_once() == measured_once()


def test_a_measurement_round_trips_through_json():
    measurement = usual_measurement("sliding and full")
    assert Measurement.from_json(measurement.to_json()) == measurement


def test_deep_copies_of_tensors_without_data_are_new_tensors():
    with tensors_without_data():
        keys = torch.ones(3, 4)
        copied = copy.deepcopy({"keys": keys, "again": keys})
        assert copied["keys"] is not keys
        assert copied["again"] is copied["keys"]
        assert (copied["keys"].shape, copied["keys"].dtype) == (keys.shape, keys.dtype)
        assert copied["keys"].untyped_storage()._cdata != keys.untyped_storage()._cdata


def test_a_measurement_leaves_torch_unchanged():
    own = set(vars(FakeTensor))
    measured("dense")
    assert set(vars(FakeTensor)) == own
    assert torch.empty(1).device.type == "cpu"
    model, inputs = really_run("dense")
    with torch.no_grad():
        assert model(**inputs).logits.shape == (2, 1, 512)
    graph_of(build_meta_model(transformers.LlamaForCausalLM, config_of("dense"), torch.float32), torch.float32)


@pytest.mark.parametrize("name", ["dense", "sliding and full", "encoder-decoder", "latent attention", "experts"])
def test_one_measurement_predicts_a_longer_context(name):
    """Predicted and measured values agree at four times the length, since a parabola fits both."""
    length = 4 * LENGTH
    foretold = usual_measurement(name).at(length)
    seen = measured(name, context_length=length, prompt_length=length)
    assert foretold.cache_bytes == seen.cache_bytes
    peaks = [max(cost.prefill_peak_bytes for cost in measurement.modules) for measurement in (foretold, seen)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


# The hybrid pads what it scans to a whole chunk of 256: at 100 tokens it takes as much as at 200.
@pytest.mark.parametrize("name", slow_ones_in_the_zoo(name for name in MODELS if name != "hybrid"))
def test_a_shorter_context_takes_at_most_the_prediction(name):
    shorter = length_of(name) // 2
    foretold = usual_measurement(name).at(shorter)
    seen = measured(name, context_length=shorter, prompt_length=shorter).by_path
    assert {cost.path for cost in foretold.modules} == set(seen)
    for cost in foretold.modules:
        assert cost.cache_bytes >= seen[cost.path].cache_bytes
        assert cost.prefill_peak_bytes >= 0.98 * seen[cost.path].prefill_peak_bytes


def test_transfers_are_hidden_states_and_inputs_of_every_layer():
    crossings = {(each.reader, each.maker): each for each in usual_measurement("dense").crossings}
    hidden_bytes = 2 * LENGTH * 128 * 4
    assert crossings["model.layers.1", "model.layers.0"].prefill_bytes == hidden_bytes
    assert crossings["model.layers.1", "model.layers.0"].decode_bytes == hidden_bytes // LENGTH
    assert crossings["model.layers.2", "model.rotary_emb"].prefill_tensors == 2  # cosines and sines
    assert ("model.layers.2", "model.layers.0") not in crossings


def test_outputs_that_the_model_adds_itself_must_be_on_one_device():
    assert usual_measurement("learned positions").bonds == (("transformer.wpe", "transformer.wte"),)
    assert usual_measurement("dense").bonds == ()


def test_layers_that_read_anothers_cache_must_be_on_its_device(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHARED_CACHE))
    (tmp_path / "modeling_sharing.py").write_text(SHARING_CODE)
    workload = WorkloadShape(batch_size=1, context_length=16, prompt_length=16)
    graph = build_graph(
        tmp_path,
        class_name="AutoModelForCausalLM",
        dtype="float32",
        attention=None,
        workload=workload,
        trust_remote_code=True,
    )
    assert [bond for bond in graph.measurement.bonds if all("layers" in path for path in bond)] == [
        (f"model.layers.{index}", f"model.layers.{index + 3}") for index in range(3)
    ]


def test_layers_that_are_passed_a_shared_cache_can_be_on_other_devices():
    sizes = {**GROUPED, "head_dim": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 64}
    config = transformers.Gemma3nTextConfig(
        **{**sizes, "intermediate_size": 256, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
        vocab_size_per_layer_input=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = build_meta_model(transformers.Gemma3nForCausalLM, config, torch.float32)
    graph = graph_of(model, torch.float32)
    workload = WorkloadShape(batch_size=1, context_length=LENGTH, prompt_length=LENGTH)
    measurement = measure(model, graph, workload)
    # Until transformers 5.21 it is no argument that accelerate copies, and the model copies it itself.
    is_brought_along = "shared_kv_states" not in graph.skip_keys
    assert (("model.layers.0", "model.layers.2") not in measurement.bonds) == is_brought_along
    crossings = {(each.reader, each.maker) for each in measurement.crossings}
    assert (("model.layers.2", "model.layers.0") in crossings) == is_brought_along
