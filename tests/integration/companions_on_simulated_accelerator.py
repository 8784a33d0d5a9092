"""Models with an adapter or a draft model compute with real numbers on several devices; collected in a process of its
own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_accelerator
import torch
from conftest import LLAMA
from late_copies import LateCopies
from small_adapters import KINDS, save_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from devmap_config import compile_profile, load_model
from devmap_config.cli.compile import compile_command
from devmap_config.dispatch import streamed_weights
from devmap_config.placement import executors

simulated_accelerator.install()

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])
CARD = torch.device("npu:0")
DEVICES = ("npu:0", "npu:1", "cpu", "disk")


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copies(monkeypatch):
    """Use the simulated card as one to which weights are copied ahead, with late copies."""
    streams = LateCopies()
    monkeypatch.setattr(executors, "PINNING_KIND", "npu")
    monkeypatch.setattr(streamed_weights, "CudaStreams", lambda _device: streams)
    monkeypatch.setattr(streamed_weights, "_pin", lambda *_: True)
    monkeypatch.setattr(streamed_weights, "_unpin", lambda _memories: None)


def adapted(**arguments):
    """Return PEFT's model around a plain one on the CPU; both are saved."""
    own = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", attention_bias=True, mlp_bias=True, **own))
    model.to(torch.bfloat16).save_pretrained("random")
    return save_adapter(AutoModelForCausalLM.from_pretrained("random"), **arguments)


def load(*pins, companion="adapter: adapter"):
    lines = "".join(f"    - {{{pin}}}\n" for pin in pins)
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: random, {companion}}}\nworkload: {{context_length: 64}}\n"
        f"hardware: {{devices: {{{', '.join(f'{device}: {{memory: 1GiB}}' for device in DEVICES)}}}}}\n"
        f"placement:\n  strategy: sequential\n  offload: {{folder: offload}}\n  pins:\n{lines}"
    )
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0
    return load_model("profile.yaml")


@torch.no_grad()
def assert_same(model, plain):
    assert torch.equal(model(input_ids=TOKENS.to(CARD)).logits.cpu(), plain(input_ids=TOKENS).logits)
    written = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(input_ids=TOKENS.to(CARD), **written)
    assert torch.equal(tokens.cpu(), plain.generate(input_ids=TOKENS, **written))


PLACED = {
    "on two cards": ['match: "{model.layers.[3-5],model.norm}", device: 1'],
    "copied from the CPU": ['match: "{model.embed_tokens,model.layers.[0-4],lm_head}", device: cpu'],
    "read from the disk": ['match: "{model.layers.[2-3],lm_head}", device: disk'],
    "computed on the CPU": ['match: "{model.layers.*.mlp,model.layers.1,lm_head}", device: cpu, compute: cpu'],
    "leaves by themselves": [
        'match: "model.layers.1.self_attn.q_proj", device: cpu, compute: cpu',
        'match: "{model.layers.2.mlp.up_proj,model.embed_tokens}", device: 1',
        'match: "{model.layers.3.mlp.up_proj,lm_head}", device: cpu',
    ],
}
LINEAR = {"target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize("placed", PLACED)
def test_an_adapter_on_several_devices_gives_pefts_logits(placed):
    plain = adapted(**LINEAR)
    assert_same(load(*PLACED[placed]), plain)


@pytest.mark.parametrize("placed", ["copied from the CPU", "read from the disk"])
def test_an_adapter_with_weights_copied_ahead_gives_pefts_logits(placed, copies):
    plain = adapted(**LINEAR)
    model = load(*PLACED[placed])
    assert compile_profile("profile.yaml").executor.name == "devmap"
    assert_same(model, plain)


@pytest.mark.parametrize("kind", ["DoRA", "a module whole", "with biases"])
def test_adapters_that_read_or_replace_weights_give_pefts_logits_on_two_cards(kind):
    plain = adapted(**KINDS[kind])
    assert_same(load('match: "{model.layers.[3-5],model.norm,lm_head}", device: 1'), plain)


def test_adapter_tensors_are_where_their_module_runs():
    adapted(**LINEAR)
    model = load(*PLACED["copied from the CPU"], 'match: "model.layers.5", device: 1')
    homes = {name: parameter.device for name, parameter in model.named_parameters() if "lora_" in name}
    assert {str(device) for device in homes.values()} == {"npu:0", "npu:1"}
    assert {name for name, device in homes.items() if str(device) == "npu:1"} == {
        name for name in homes if "layers.5." in name
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("placed", "device"),
    [
        pytest.param(placed, device, marks=pytest.mark.zoo if place != own else [])
        for place, placed in enumerate(["on two cards", "copied from the CPU", "read from the disk"])
        for own, device in enumerate(["npu:1", "npu:0", "cpu"])
    ],
)
def test_generation_with_a_draft_on_any_device_equals_plain_generation(placed, device):
    own = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **own)).float()
    model.save_pretrained("random")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**own, "num_hidden_layers": 2})).save_pretrained(
        "draft"
    )
    written = {"max_new_tokens": 12, "do_sample": False}
    expected = model.eval().generate(input_ids=TOKENS, **written)
    pins = [pin.replace("model.embed_tokens,", "") for pin in PLACED[placed]]
    loaded = load(*pins, companion=f"assistant: {{source: draft, device: '{device}'}}")
    assert loaded.generate.keywords["assistant_model"].device == torch.device(device)
    assert torch.equal(loaded.generate(input_ids=TOKENS.to(CARD), **written).cpu(), expected)
