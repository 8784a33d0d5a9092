"""Caches of transformers' own classes compute with real numbers on several devices; collected in a
process of its own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import simulated_accelerator
import torch
import transformers
from click.testing import CliRunner
from conftest import LLAMA, REPOSITORY
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import CacheLayerMixin

from devmap_config import compatibility, load_model
from devmap_config.cli import devmap
from devmap_config.compiler import Request, run_pipeline
from devmap_config.devices import CPU, Device
from devmap_config.graph.forwards import CACHE_NAMES, cache_tensors
from devmap_config.libraries.torch import streams_without_a_card
from devmap_config.simulate.memory import simulation_of

simulated_accelerator.install()

PROMPT = 24
NEW_TOKENS = 8
TOKENS = torch.randint(1, 200, (1, PROMPT), generator=torch.Generator().manual_seed(0))
CARDS = (Device("npu", 0), Device("npu", 1))

PROFILE = """\
version: 1
model: {{source: random, dtype: float32}}
workload: {{context_length: 32, prompt_length: 24, cache: {cache}}}
hardware: {{devices: {{npu:0: {{memory: 1GiB}}, npu:1: {{memory: 1GiB}}, cpu: {{memory: 1GiB}}}}}}
placement: {placement}
"""

SIZES_OF_TWIN = {
    "models/llama-3.1-70b/config.json": "small",
    "context_length: 65536": f"context_length: {PROMPT + NEW_TOKENS}",
    "prompt_length: 4096": f"prompt_length: {PROMPT}",
    "cuda:[0-1]: rtx-4090": "npu:[0-1]: {memory: 330KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}",
    "cpu: {memory: 64GiB}": "cpu: {memory: 1GiB}\n  links: {host: 25GB/s, peer: 25GB/s}",
}

PARTLY_OFFLOADED = """\
version: 1
model: {{source: random, dtype: float32}}
workload: {{context_length: {context}, prompt_length: {prompt}, cache: partly_offloaded}}
hardware:
  devices:
    npu:[0-1]: {{memory: 1700KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}}
    cpu: {{memory: 1GiB}}
  links: {{host: 25GB/s, peer: 25GB/s}}
placement: {{strategy: fastest}}
"""

PLACEMENTS = {
    "on one card": {"strategy": "single"},
    "over two cards": {"pins": [{"match": "model.layers.[3-5]", "device": "npu:1"}]},
    "beside streamed layers": {"pins": [{"match": "model.layers.[2-4]", "device": "cpu"}]},
}

WINDOWS = {
    **LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """A folder, and cards of a kind that transformers is taken to offload from, whose streams are done at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compatibility, "OFFLOADING_KIND", "npu")
    with streams_without_a_card():
        yield


def saved(config):
    values = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values)).eval()
    model.save_pretrained("random")
    return model


def run(*arguments):
    done = CliRunner().invoke(devmap, arguments)
    assert done.exit_code == 0, done.output
    return done


def loaded(placement, cache):
    Path("profile.yaml").write_text(PROFILE.format(cache=json.dumps(cache), placement=json.dumps(placement)))
    run("compile", "profile.yaml", "-q")
    return load_model("profile.yaml")


@torch.no_grad()
def generated(model, device="npu:0", tokens=TOKENS, **arguments):
    return model.generate(
        tokens.to(device),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )


def by_device(cache):
    """The bytes of the cache's tensors on each device, but for numbers that a layer keeps of itself."""
    found = {}
    for tensor in cache_tensors(cache):
        if tensor.dim():
            found[tensor.device.type] = found.get(tensor.device.type, 0) + tensor.nbytes
    return found


@pytest.mark.parametrize(
    "config",
    [pytest.param(LLAMA, id="all of the context"), pytest.param(WINDOWS, id="windows", marks=pytest.mark.zoo)],
)
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_an_offloaded_cache_gives_equal_logits_and_is_where_planned(placement, cache, config):
    there = {"offloaded": {}, "offloaded_static": {"cache_implementation": "static", "disable_compile": True}}
    plain = generated(saved(config), "cpu", **there[cache])
    model = loaded(placement, cache)
    found = generated(model)
    assert torch.equal(found.sequences.cpu(), plain.sequences)
    for own, other in zip(found.logits, plain.logits, strict=True):
        assert torch.equal(own.cpu(), other)
    held = by_device(found[next(name for name in CACHE_NAMES if name in found)])
    uses = {use.id: use for use in run_pipeline(Request.for_profile(Path("profile.yaml"))).plan.devices}
    # The first layer that is offloaded has been brought back, for the next token.
    assert 0 < held["cpu"] < uses[CPU].kv_cache_bytes
    kept, on_its_way = (
        sum(getattr(uses[card], name) for card in CARDS) for name in ("kv_cache_bytes", "activation_bytes")
    )
    assert held["npu"] <= kept + on_its_way
    if cache == "offloaded" or config is LLAMA:
        assert kept <= 8 * config["num_hidden_layers"]  # the length that a layer keeps of itself


LONG_PROMPT = torch.randint(1, 200, (1, 200), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def offloads(monkeypatch):
    """Record the bytes of layers that go to the CPU."""
    sent, offload = [], CacheLayerMixin.offload

    def noting(layer):
        sent.append(layer.keys.nbytes + layer.values.nbytes)
        offload(layer)

    monkeypatch.setattr(CacheLayerMixin, "offload", noting)
    return sent


def test_a_partly_offloaded_cache_gives_equal_logits_and_is_where_planned(offloads):
    config = {**LLAMA, "num_hidden_layers": 12}
    context = LONG_PROMPT.shape[1] + NEW_TOKENS - 1  # the last token is written, and not read
    plain = generated(saved(config), "cpu", LONG_PROMPT)
    Path("profile.yaml").write_text(PARTLY_OFFLOADED.format(context=context, prompt=LONG_PROMPT.shape[1]))
    run("compile", "profile.yaml", "-q")
    model = load_model("profile.yaml")
    for _ in range(2):  # each request has a cache of its own
        offloads.clear()
        found = generated(model, "npu:0", LONG_PROMPT)
        for own, other in zip(found.logits, plain.logits, strict=True):
            assert torch.equal(own.cpu(), other)
    compiled = run_pipeline(Request.for_profile(Path("profile.yaml")))
    plan, measurement = compiled.plan, compiled.graph.measurement
    layers = [int(re.search(r"\d+", path)[0]) for path in plan.offloaded_caches]
    assert 3 < len(layers) < config["num_hidden_layers"]
    assert plan.prediction.streamed_bytes_per_token == 0
    layer = measurement.cache_bytes // config["num_hidden_layers"]
    cache = found[next(name for name in CACHE_NAMES if name in found)]
    kept = sum(use.kv_cache_bytes for use in plan.devices if use.id.is_accelerator)
    assert kept == (config["num_hidden_layers"] - len(layers)) * layer
    # The first of those that are offloaded has been brought back, for the next token.
    assert by_device(cache) == {"npu": kept + layer, "cpu": (len(layers) - 1) * layer}
    assert [n for n, each in enumerate(cache.layers) if each.keys.device.type == "cpu"] == layers[1:]
    sent = offloads[len(layers) :]
    assert len(sent) == len(layers) * (NEW_TOKENS - 1)
    counted = sum(
        measurement.by_path[path].exchanged_bytes("decode", measurement.workload) for path in plan.offloaded_caches
    )
    assert abs(sum(sent) / (NEW_TOKENS - 1) - counted) <= len(layers) * layer / context
    simulation = simulation_of(plan, compiled.model)
    assert simulation.outcome == "runs", simulation.reason
    assert sum(each.cache_bytes for each in simulation.devices if each.id.is_accelerator) > 0
    for device in simulation.devices:
        use = next(use for use in plan.devices if use.id == device.id)
        assert device.peak_bytes <= use.capacity_bytes - use.free_bytes
    crossing = sum(use.size_bytes for use in simulation.links if use.phase == "decode" and use.target == CPU)
    assert crossing == len(layers) * (layer + layer // context)


def test_a_receipt_is_measured_with_the_planned_cache(offloads):
    saved({**LLAMA, "num_hidden_layers": 12})
    context = LONG_PROMPT.shape[1] + NEW_TOKENS
    Path("profile.yaml").write_text(PARTLY_OFFLOADED.format(context=context, prompt=LONG_PROMPT.shape[1]))
    run("compile", "profile.yaml", "-q")
    layers = len(run_pipeline(Request.for_profile(Path("profile.yaml"))).plan.offloaded_caches)
    new_tokens = ("--max-new-tokens", "4")
    run("run", "profile.yaml", "--no-probe", "--random-weights", *new_tokens, "--receipt", "receipt.json")
    rounds = len(json.loads(Path("receipt.json").read_text())["cases"][0]["generation"]["prefill_seconds_each"])
    assert len(offloads) >= (1 + rounds) * 4 * layers


def test_cache_bytes_exchanged_for_a_token_are_those_of_the_plan(monkeypatch):
    saved(LLAMA)
    model = loaded(PLACEMENTS["over two cards"], "offloaded")
    seen = []

    def noting(method, source):
        def run(layer):
            before = layer.keys
            method(layer)
            if layer.keys is not before:
                seen.append((source, layer.keys.nbytes + layer.values.nbytes))

        return run

    monkeypatch.setattr(CacheLayerMixin, "offload", noting(CacheLayerMixin.offload, "card"))
    monkeypatch.setattr(CacheLayerMixin, "prefetch", noting(CacheLayerMixin.prefetch, "cpu"))
    generated(model)
    compiled = run_pipeline(Request.for_profile(Path("profile.yaml")))
    measurement = compiled.graph.measurement
    whole = measurement.at(PROMPT).cache_bytes
    layers = LLAMA["num_hidden_layers"]
    assert sum(size for source, size in seen[: layers + 1] if source == "card") == whole
    sent = sum(cost.exchanged_bytes("decode", measurement.workload) for cost in measurement.modules)
    steps = NEW_TOKENS - 1
    per_token = {
        source: sum(size for each, size in seen[layers + 1 :] if each == source) / steps for source in ("card", "cpu")
    }
    assert abs(per_token["card"] - sent) <= whole / PROMPT  # on the mean, but for half a token
    assert abs(per_token["cpu"] - sent) <= whole / PROMPT


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_the_dry_run_exchanges_the_cache_within_planned_memory(placement):
    saved(LLAMA)
    loaded(placement, "offloaded")
    compiled = run_pipeline(Request.for_profile(Path("profile.yaml")))
    simulation = simulation_of(compiled.plan, compiled.model)
    assert simulation.outcome == "runs", simulation.reason
    uses = {use.id: use for use in compiled.plan.devices}
    for device in simulation.devices:
        assert device.peak_bytes <= uses[device.id].capacity_bytes - uses[device.id].free_bytes
    whole = compiled.graph.measurement.cache_bytes
    token = whole // 32
    sent = sum(use.size_bytes for use in simulation.links if use.phase == "decode" and use.target == CPU)
    assert sent == whole + token
    come = sum(
        use.size_bytes - use.weights_bytes
        for use in simulation.links
        if use.phase == "decode" and use.source == CPU and use.target.is_accelerator
    )
    assert whole <= come <= whole + 2 * token + 1024  # the last layer's update brings back the first, a token longer


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
)
@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_cache_in_fp8_gives_nearly_equal_logits(placement):
    plain = generated(saved(LLAMA), "cpu")
    found = generated(loaded(placement, {"implementation": "quantized", "backend": "fp8"}))
    first, second = found.logits[0].cpu(), found.logits[1].cpu()
    assert torch.equal(first, plain.logits[0])  # of the prompt, nothing is read that was quantised
    assert not torch.equal(second, plain.logits[1])
    spread = plain.logits[1].std()
    assert (second - plain.logits[1]).abs().max() < 0.1 * spread
    held = by_device(found[next(name for name in CACHE_NAMES if name in found)])
    uses = run_pipeline(Request.for_profile(Path("profile.yaml"))).plan.devices
    planned = sum(use.kv_cache_bytes for use in uses if use.id.is_accelerator)
    assert planned * 30 // 32 < held["npu"] <= planned


def test_a_small_twin_of_the_shipped_profile_runs():
    """Unchanged but for sizes: a small config replaces Llama-3.1-70B's, and the cards are simulated."""
    shipped = (REPOSITORY / "profiles" / "llama-3.1-70b-offloaded-cache.yaml").read_text()
    twin = re.sub(r"  quantization: .*\n", "", shipped)  # which only real cards do
    for there, here in SIZES_OF_TWIN.items():
        assert there in twin
        twin = twin.replace(there, here)
    Path("small").mkdir()
    Path("small/config.json").write_text(json.dumps(LLAMA))
    Path("twin.yaml").write_text(twin)
    run("compile", "twin.yaml", "-q")
    uses = run_pipeline(Request.for_profile(Path("twin.yaml"))).plan.devices
    assert [use.kv_cache_bytes > 0 for use in uses] == [False, False, True]
    assert all(use.weights_bytes for use in uses if use.id.is_accelerator)
    done = run("run", "twin.yaml", "--random-weights", "--no-probe", "--format", "json")
    told = json.loads(done.stdout)
    assert told["prompt_tokens"] + told["tokens"] == PROMPT + NEW_TOKENS, told
