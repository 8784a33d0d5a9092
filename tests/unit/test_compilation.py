"""Decoding by compiled code: offered where it was seen to be right and faster, refused elsewhere with the reason."""

from pathlib import Path

import pytest
import torch
from conftest import LLAMA
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

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


def compiled(devices, cache="static", strategy="single"):
    Path("p.yaml").write_text(
        f"version: 1\nmodel: {{source: random}}\nworkload: {{context_length: 64, cache: {cache}}}\n"
        f"hardware: {{devices: {{{devices}}}}}\nplacement: {{strategy: {strategy}}}\n"
    )
    assert compile_command.main(["p.yaml", "-q"], standalone_mode=False) == 0
    deployment = prepare(Path("p.yaml"), variables={})
    return deployment.plan, deployment.compiled.loaded.profile.workload


def test_what_is_whole_on_one_card_is_compiled(model):
    require_compilable(*compiled(f"cuda:0: {CARD}"))


@pytest.mark.parametrize(
    ("devices", "cache", "strategy", "reason"),
    [
        (
            "cpu: {memory: 1GiB}",
            "static",
            "single",
            "the plan has .* KiB on cpu, and compiled code was seen .* CUDA card",
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
def test_what_is_not_is_refused_before_it_is_loaded(model, devices, cache, strategy, reason):
    deployment = compiled(devices, cache, strategy)
    with pytest.raises(RunnerError, match=reason) as raised:
        require_compilable(*deployment)
    assert raised.value.code == "not-compiled"
    assert ("`strategy: single` has it there" in raised.value.help) == ("cuda" in devices and cache == "static")
    with pytest.raises(RunnerError, match=reason):
        load_model("p.yaml", compile=True, probe=False)


def test_tokens_of_compiled_code_are_those_of_the_plain_model(model):
    tokens = torch.tensor([[1, 5, 9, 200, 31, 77]])
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False)
    model.generation_config.compile_config = CompileConfig(backend="eager")
    model.generation_config.compile_config._compile_all_devices = True
    compile_decoding(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=12, do_sample=False), expected)
    assert model.get_compiled_call(None)._torchdynamo_orig_callable is not None


@pytest.mark.parametrize("other", [lambda model: model, lambda _: ViTModel(ViTConfig(num_hidden_layers=1))])
def test_what_transformers_does_not_compile_is_refused(model, other):
    with pytest.raises(RunnerError, match="transformers compiles no model of its kind"):
        compile_decoding(other(model))
