"""The tensors and computations that an adapter's config is predicted to add are those that PEFT adds."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
from conftest import LLAMA, MODELS
from small_adapters import KINDS, adapted, peft
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from devmap_config.graph.adapted import adapt
from devmap_config.graph.adapter import AdapterError, name_in_file, parse_config
from devmap_config.graph.introspection import graph_of
from devmap_config.runner.adapter import _place_of

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])


def small(config=LLAMA, kind=AutoModelForCausalLM, **values):
    own = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    return kind.from_config(AutoConfig.for_model(config["model_type"], **own, **values)).eval()


def biased():
    return small(attention_bias=True, mlp_bias=True)


def saved_config(model):
    """Return a PEFT model's config as `adapter_config.json` has it."""
    value = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=list))
    return parse_config({key: each.value if hasattr(each, "value") else each for key, each in value.items()})


def stored(model):
    """Return the shapes by name that PEFT saves of an adapter."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def twin(model, config):
    """Return a copy of a model to which our code adds what the adapter adds."""
    result = copy.deepcopy(model)
    adapt(result, config)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_adapter_tensors_are_those_that_peft_saves(kind):
    model = biased()
    config = saved_config(real := adapted(copy.deepcopy(model), **KINDS[kind]))
    graph = graph_of(twin(model, config), torch.float32)
    counted = {name_in_file(name): graph.tensors[name].shape for name in graph.adapter_tensors}
    biases = {name for name in stored(real) if config.bias != "none" and name.endswith(".bias")}
    assert counted == {name: shape for name, shape in stored(real).items() if name not in biases}
    before = graph_of(model, torch.float32)
    added = sum(each.numel() * 4 for each in real.parameters()) - sum(each.numel() * 4 for each in model.parameters())
    assert graph.size_bytes - before.size_bytes == added


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def run(model):
    with torch.no_grad(), Operations() as operations:
        return model(input_ids=TOKENS).logits, operations.counts


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_adapter_kernels_are_those_that_peft_runs(kind):
    model = biased()
    real = adapted(copy.deepcopy(model), **KINDS[kind])
    ours = twin(model, saved_config(real))
    for name in graph_of(ours, torch.float32).adapter_tensors:
        module, own = _place_of(real.get_base_model(), name)
        ours.get_buffer(name).copy_(getattr(module, own).detach())
    (expected, their_operations), (logits, our_operations) = run(real), run(ours)
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, run(model)[0])
    assert our_operations == their_operations


def test_adapters_of_gpt2s_transposed_linear_modules():
    model = small(MODELS["learned"])
    real = adapted(copy.deepcopy(model), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    graph = graph_of(twin(model, saved_config(real)), torch.float32)
    assert {name_in_file(name): graph.tensors[name].shape for name in graph.adapter_tensors} == stored(real)


def test_an_adapter_of_a_classifier_includes_the_whole_head():
    model = small(kind=AutoModelForSequenceClassification)
    real = adapted(copy.deepcopy(model), target_modules="all-linear", task_type="SEQ_CLS")
    config = saved_config(real)
    for each in (config, parse_config({"peft_type": "LORA", "target_modules": "all-linear", "task_type": "SEQ_CLS"})):
        graph = graph_of(twin(model, each), torch.float32)
        assert {name_in_file(name) for name in graph.adapter_tensors} == set(stored(real))


LORA = {"peft_type": "LORA", "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "LOHA"}, "the adapter is `LOHA`, and only LoRA is supported"),
        ({"peft_type": ["LORA"]}, "the adapter is of no kind that it names"),
        ({"target_modules": None}, "`target_modules` in `adapter_config.json` names no modules"),
        ({"target_modules": ["q_proj", {"a": 1}]}, r"`target_modules\[1\]` .* is not the name of a module"),
        ({"target_modules": 5}, "`target_modules` .* is neither text nor a list"),
        ({"r": True}, "`r` .* is not a number from 1 to 65,536"),
        ({"r": 0}, "`r` .* is not a number"),
        ({"r": 2**40}, "`r` .* is not a number"),
        ({"lora_alpha": "8"}, "`lora_alpha` .* is not a number"),
        ({"lora_alpha": float("nan")}, "`lora_alpha` .* is not a number"),
        ({"rank_pattern": {"q_proj": "8"}}, "`rank_pattern.q_proj` .* is not a number"),
        ({"rank_pattern": ["q_proj"]}, "`rank_pattern` .* is not a mapping"),
        ({"layers_to_transform": [1, None]}, r"`layers_to_transform\[1\]` .* is not a number of a layer"),
        ({"layers_to_transform": 1.5}, "`layers_to_transform` .* is not a number of a layer"),
        ({"use_dora": "yes"}, "`use_dora` .* is neither true nor false"),
        ({"bias": ["none"]}, "`bias` .* is none of"),
        ({"modules_to_save": [[]]}, r"`modules_to_save\[0\]` .* is not the name of a module"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` .* changes the model's own weights"),
        ({"init_lora_weights": {}}, "`init_lora_weights` .* changes the model's own weights"),
        ({"use_qalora": True}, "`use_qalora` .* is not supported"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters` .* is not supported"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "`layers_to_transform` .* has no effect"),
    ],
)
def test_an_invalid_adapter_config_is_an_error_with_its_key(change, told):
    with pytest.raises(AdapterError, match=told) as caught:
        parse_config({**LORA, **change})
    assert caught.value.help


@pytest.mark.parametrize("value", [None, [], "LORA", 5])
def test_an_adapter_config_that_is_no_object_is_an_error(value):
    with pytest.raises(AdapterError, match="holds no JSON object"):
        parse_config(value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target_modules": ["no_such_proj"]}, "no module of this model is adapted"),
        ({"target_modules": ["mlp"]}, "is a LlamaMLP: linear modules and embeddings are known"),
        ({"target_modules": "(?=q_proj)q_proj"}, "`target_modules` .* cannot be read"),
        ({"target_modules": "((a{100}){100}){100}"}, "`target_modules` .* cannot be read"),
        ({"rank_pattern": {"(": 4}}, "`rank_pattern.*` .* cannot be read"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "is an embedding, for which `use_dora` is not known"),
        (
            {"rank_pattern": {f"a{n}": 4 for n in range(90_000)}, "target_modules": "all-linear"},
            "more expressions than",
        ),
    ],
)
def test_an_adapter_config_that_does_not_fit_the_model_is_an_error(change, told):
    with pytest.raises(AdapterError, match=told):
        adapt(small(), parse_config({**LORA, **change}))


def test_a_catastrophic_regular_expression_is_matched_quickly():
    names = parse_config({**LORA, "target_modules": r"(([a-z_]+|\d+)*\.?)*q_proj"})
    model = small()
    adapt(model, names)
    assert len(graph_of(model, torch.float32).adapter_tensors) == 2 * LLAMA["num_hidden_layers"]
