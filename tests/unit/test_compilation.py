"""Compiled decoding is offered where it gives the same tokens faster, and refused elsewhere with the reason."""

from pathlib import Path

import pytest
import torch
from conftest import LLAMA
from torch._inductor import cpp_builder
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTModel,
)

from devmap_config import load_model
from devmap_config.cli.compile import compile_command
from devmap_config.runner.compilation import compile_decoding, require_compilable
from devmap_config.runner.loading import RunnerError
from devmap_config.runner.runner import prepare

CARD = "{memory: 1GiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"


@pytest.fixture
def model(workspace):
    values = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    model.save_pretrained("random")
    return model


def compiled(devices, cache="static", strategy="single", model="source: random"):
    Path("p.yaml").write_text(
        f"version: 1\nmodel: {{{model}}}\nworkload: {{context_length: 64, cache: {cache}}}\n"
        f"hardware: {{devices: {{{devices}}}}}\nplacement: {{strategy: {strategy}, offload: {{folder: offload}}}}\n"
    )
    assert compile_command.main(["p.yaml", "-q"], standalone_mode=False) == 0
    deployment = prepare(Path("p.yaml"), variables={})
    return deployment.plan, deployment.compiled.model, deployment.compiled.loaded.profile.workload


def test_a_model_whole_on_one_card_is_compiled(model):
    require_compilable(*compiled(f"cuda:0: {CARD}"))


@pytest.mark.parametrize(
    ("devices", "cache", "strategy", "reason"),
    [
        (
            "cpu: {memory: 560KiB}, disk: {memory: 1GiB}",
            "static",
            "sequential",
            "the plan has .* on cpu and .* KiB on disk, and compiled code was seen .* CUDA card",
        ),
        (f"xpu:0: {CARD}", "static", "single", "the plan has .* KiB on xpu:0, and compiled code was seen "),
        (
            "cuda:0: {memory: 560KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}, cpu: {memory: 1GiB}}, links: {host: 25GB/s",
            "static",
            "fastest",
            "the plan has .* KiB on cpu, .* one CUDA card",
        ),
        ('"cuda:[0-1]": {memory: 900KiB}', "static", "balanced", "the plan spreads it over cuda:0 and cuda:1, and"),
        (f"cuda:0: {CARD}", "dynamic", "single", "the plan has no room for a static cache"),
    ],
)
def test_plans_that_cannot_be_compiled_are_refused_before_loading(model, devices, cache, strategy, reason):
    deployment = compiled(devices, cache, strategy)
    with pytest.raises(RunnerError, match=reason) as raised:
        require_compilable(*deployment)
    assert raised.value.code == "not-compiled"
    assert ("`strategy: single` has it there" in raised.value.help) == ("cuda" in devices and cache == "static")
    with pytest.raises(RunnerError, match=reason):
        load_model("p.yaml", compile=True, probe=False)


def test_dtypes_that_round_differently_on_a_cpu_are_not_compiled(model):
    deployment = compiled("cpu: {memory: 1GiB}", model="source: random, dtype: bfloat16")
    with pytest.raises(RunnerError, match=r"the plan has it in bfloat16 on the CPU, .* or in float32 on the CPU"):
        require_compilable(*deployment)


def test_float32_on_the_cpu_is_compiled_if_there_is_a_compiler(model, monkeypatch):
    deployment = compiled("cpu: {memory: 1GiB}")
    with monkeypatch.context() as patched:
        patched.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
        patched.setattr("sysconfig.get_path", lambda _: "include")
        with pytest.raises(RunnerError, match="Python's header files, which are not installed"):
            require_compilable(*deployment)
        Path("include").mkdir()
        Path("include/Python.h").touch()
        require_compilable(*deployment)
    monkeypatch.setenv("PATH", "nowhere")
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(RunnerError, match=r"a C\+\+ compiler, and finds none") as raised:
        load_model("p.yaml", compile=True, probe=False)
    assert "apt install g++" in raised.value.help


def test_tokens_of_compiled_code_are_those_of_the_plain_model(model):
    tokens = torch.tensor([[1, 5, 9, 200, 31, 77]])
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False)
    compile_decoding(model)
    model.generation_config.compile_config.backend = "eager"  # torch's tracing alone, which needs no compiler
    assert torch.equal(model.generate(tokens, max_new_tokens=12, do_sample=False), expected)
    assert model.get_compiled_call(None)._torchdynamo_orig_callable is not None


SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256}
TOLERANCE = 1e-5
"""Of the logits' norm: the most that logits of compiled code may differ in float32 on a CPU, by the documentation."""

KINDS = {
    "dense": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=128, num_key_value_heads=2)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=256, bos_token_id=1, eos_token_id=2)
    ),
    "sliding window": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE, intermediate_size=128, num_key_value_heads=2, head_dim=16, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16)
    ),
}  # fmt: skip


@pytest.mark.zoo  # torch compiles for half a minute
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_code_compiled_for_a_cpu_are_those_of_the_plain_model(kind, workspace):
    torch.manual_seed(0)
    KINDS[kind]().eval().save_pretrained("random")
    compiled("cpu: {memory: 1GiB}", model="source: random, dtype: float32")
    plain, other = load_model("p.yaml", probe=False), load_model("p.yaml", compile=True, probe=False)
    torch._dynamo.utils.counters.clear()

    def generate(model, tokens):
        return model.generate(
            torch.tensor([tokens]), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    for tokens in ([1, 5, 9, 200, 31, 77], [7, 3, 100]):
        expected, output = generate(plain, tokens), generate(other, tokens)
        assert torch.equal(output.sequences, expected.sequences)
        for one, two in zip(expected.logits, output.logits, strict=True):
            assert (one - two).norm() <= TOLERANCE * one.norm()
    # For all tokens, whatever the prompt; of a window, also once it is seen that it fills, and once that it is full.
    graphs = 3 if kind == "sliding window" else 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_models_that_transformers_does_not_compile_are_refused():
    with pytest.raises(RunnerError, match="transformers compiles no model of its kind"):
        compile_decoding(ViTModel(ViTConfig(num_hidden_layers=1)))


def test_models_that_transformers_calls_uncompiled_are_refused():
    sizes = {**LLAMA, "model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 32}
    sizes = {name: value for name, value in sizes.items() if name not in ("architectures", "dtype")}
    with pytest.raises(RunnerError, match="transformers compiles no model of its kind"):
        compile_decoding(Llama4ForCausalLM(Llama4TextConfig(**sizes)))
