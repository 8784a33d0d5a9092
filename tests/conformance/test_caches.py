"""Predicted bytes of offloaded and quantised caches are those of transformers' own cache objects.

Tests marked `zoo` quantise with quanto, which is in the extra `quantizers`; a missing package is a failure.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import REPOSITORY
from kinds import MODELS, config_of
from transformers import DynamicCache, QuantizedCache, StaticCache

from devmap_config.graph.costs import Measurement, ModuleCost, WorkloadShape
from devmap_config.graph.failures import UnfitCacheError
from devmap_config.graph.forwards import CACHE_NAMES, cache_tensors
from devmap_config.graph.introspection import build_meta_model, graph_of
from devmap_config.graph.key_values import dequantized, made_cache, quantized, require_fit
from devmap_config.graph.measurement import measure

LENGTH = 200
DECODERS = [name for name in MODELS if name not in ("encoder-decoder", "state space", "hybrid")]
WITHOUT_WINDOWS = ["dense", "grouped queries", "tied", "learned positions", "experts", "many experts"]


def workload(cache, **options):
    return WorkloadShape(
        **{"batch_size": 2, "context_length": LENGTH, "prompt_length": LENGTH, "cache": cache, **options}
    )


def measured(name, wanted):
    model = build_meta_model(getattr(transformers, MODELS[name][0]), config_of(name), torch.float32)
    return measure(model, graph_of(model, torch.float32), wanted)


def filled(name, cache, wanted, *, tokens=0):
    """Return a real model's own cache after a prompt and this number of tokens."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name][0])(config_of(name)).eval()
    held = {} if cache is None else {CACHE_NAMES[0]: cache}
    with torch.no_grad():
        output = model(torch.ones((2, wanted.prompt_length), dtype=torch.long), use_cache=True, **held)
        for _ in range(tokens):
            output = model(torch.ones((2, 1), dtype=torch.long), use_cache=True, **held)
    return output[CACHE_NAMES[0]]


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


class Offloading(DynamicCache):
    """A cache that records what transformers' offloaded cache sends to the CPU, without a card to send it from."""

    def note(self):
        """Return the bytes of every layer that an offloaded cache would send away, by its own `offload`."""
        sent = []
        for index, layer in enumerate(self.layers):
            layer.offload = lambda layer=layer: sent.append(size_of((layer.keys, layer.values)))
            if not (self.is_linear[index] or self.is_dummy[index]):
                self.offload(index, only_non_sliding=self.keeps_windows)
        return sent

    keeps_windows = False


class OffloadingStatic(StaticCache):
    note = Offloading.note
    keeps_windows = True


@pytest.mark.parametrize("name", DECODERS)
def test_all_keys_and_values_of_a_growing_cache_are_offloaded(name):
    wanted = workload("offloaded")
    sent = filled(name, Offloading(config=config_of(name)), wanted).note()
    found = measured(name, wanted)
    assert sum(cost.offloaded_bytes for cost in found.modules) == sum(sent) > 0
    assert 0 <= found.cache_bytes - sum(sent) <= 8 * len(sent)  # a window's length is a number of the layer's own


@pytest.mark.parametrize("name", [*WITHOUT_WINDOWS, "sliding and full"])
def test_windows_of_an_offloaded_static_cache_stay_on_the_card(name):
    wanted = workload("offloaded_static")
    cache = OffloadingStatic(config=config_of(name), max_cache_len=LENGTH + 1)
    sent = filled(name, cache, wanted).note()
    found = measured(name, wanted)
    offloaded = sum(cost.offloaded_bytes for cost in found.modules)
    assert offloaded == sum(sent) > 0
    assert (found.cache_bytes - offloaded > 64) == (name == "sliding and full")  # a layer counts its tokens besides


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
@pytest.mark.parametrize("prompt_length", [LENGTH, pytest.param(50, marks=pytest.mark.zoo)])
def test_a_cache_in_fp8_has_the_bytes_of_its_tensors(name, prompt_length):
    wanted = workload("quantized", cache_backend="fp8", prompt_length=prompt_length)
    cache = filled(name, QuantizedCache("fp8", config_of(name)), replace(wanted, prompt_length=LENGTH))
    plain = measured(name, replace(wanted, cache="dynamic", cache_backend=None))
    found = measured(name, wanted)
    assert found.cache_bytes == size_of(cache_tensors(cache))
    assert 3.9 < plain.cache_bytes / found.cache_bytes < 4.1  # of float32


@pytest.mark.parametrize("bits", [2, 4])
def test_the_stub_for_quanto_packs_and_restores_numbers_approximately(bits):
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 32, 32)
    packed, scale, shift = quantized(keys, bits)
    assert packed.nbytes * 8 == keys.numel() * bits
    back = dequantized(packed, scale, shift, bits, keys.shape)
    assert (back - keys).abs().max() <= scale.max() / 2 + 1e-6


@pytest.mark.zoo
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stub_for_quanto_gives_the_numbers_of_quanto(bits, dtype):
    layer = transformers.QuantoQuantizedLayer(nbits=bits)
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 33, 32).to(dtype)
    made = layer._quantize(keys, axis=0)
    packed, scale, shift = quantized(keys, bits)
    assert size_of(cache_tensors([made])) == size_of([packed, scale, shift])
    assert torch.equal(layer._dequantize(made), dequantized(packed, scale, shift, bits, keys.shape))


@pytest.mark.zoo
@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_cache_by_quanto_has_the_bytes_of_its_tensors(name, bits):
    wanted = workload("quantized", cache_backend="quanto", cache_bits=bits)
    cache = filled(name, QuantizedCache("quanto", config_of(name), nbits=bits), wanted)
    assert measured(name, wanted).cache_bytes == size_of(cache_tensors(cache))


TOLERANCES = {("fp8", None): 0.01, ("quanto", 4): 0.06, ("quanto", 2): 0.2}
"""By what quantises, the root mean square by which logits may move, in parts of their spread: docs/long-context.md."""


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
@pytest.mark.parametrize(
    ("backend", "bits"),
    [pytest.param(*how, marks=() if how[0] == "fp8" else pytest.mark.zoo) for how in TOLERANCES],
)
def test_quantised_caches_change_logits_by_no_more_than_the_page_says(name, backend, bits):
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[name][0])(config_of(name)).eval()
    prompt, tokens = torch.randint(1, 100, (2, LENGTH)), torch.randint(1, 100, (8, 2, 1))

    @torch.no_grad()
    def logits(cache):
        outputs = [model(prompt, use_cache=True, **({} if cache is None else {CACHE_NAMES[0]: cache}))]
        for token in tokens:
            outputs.append(model(token, use_cache=True, **{CACHE_NAMES[0]: outputs[0][CACHE_NAMES[0]]}))
        return torch.stack([output.logits[:, -1] for output in outputs])

    plain = logits(None)
    moved = logits(QuantizedCache(backend, config_of(name), **({} if bits is None else {"nbits": bits}))) - plain
    assert not moved[0].any()  # the prompt reads nothing that was quantised
    root_mean_square = moved[1:].square().mean().sqrt() / plain.std()
    assert 0 < root_mean_square < TOLERANCES[backend, bits]


def test_the_page_states_how_far_quantised_caches_change_logits():
    page = " ".join((REPOSITORY / "docs" / "long-context.md").read_text(encoding="utf-8").split())
    fp8, four, two = (f"{100 * part:g} %" for part in TOLERANCES.values())
    assert f"by at most {fp8} of their spread with `fp8`, {four} with 4 bits of `quanto`, and {two} with 2" in page


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
def test_the_bytes_of_a_cache_by_quanto_are_predicted_without_quanto(name):
    wanted = workload("quantized", cache_bits=4)
    plain, found = measured(name, replace(wanted, cache="dynamic", cache_bits=None)), measured(name, wanted)
    groups = plain.cache_bytes // 4 // 64
    assert found.cache_bytes == plain.cache_bytes // 8 + 2 * 4 * groups  # scale and shift are as wide as a number was


@pytest.mark.parametrize(
    ("name", "wanted", "reason"),
    [
        ("sliding and full", workload("quantized", cache_backend="fp8"), "attend to the whole context"),
        ("encoder-decoder", workload("offloaded"), "encoder"),
        ("hybrid", workload("offloaded"), "states"),
        ("dense", workload("quantized"), None),
    ],
)
def test_a_cache_that_does_not_suit_the_model_is_reported(name, wanted, reason):
    found = measured(name, wanted)
    assert found.has_unfit_cache == (reason is not None)
    if reason is not None:
        assert reason in found.reason


def test_nothing_of_a_state_spaces_cache_is_offloaded():
    found = measured("state space", workload("offloaded", context_length=20, prompt_length=20))
    assert not any(cost.offloaded_bytes for cost in found.modules)


def test_heads_that_quantisation_groups_do_not_divide_are_refused():
    model = build_meta_model(
        transformers.LlamaForCausalLM, config_of("dense", hidden_size=96, num_attention_heads=4), torch.float32
    )
    with pytest.raises(UnfitCacheError, match="96 numbers"):
        require_fit(model, workload("quantized"))
    assert made_cache(model, workload("quantized", cache_backend="fp8"), 1, offloading=False) is not None


def test_a_measurement_with_offloaded_bytes_round_trips_through_json():
    found = measured("grouped queries", workload("offloaded"))
    assert Measurement.from_json(found.to_json()) == found
    assert "offloaded_bytes" not in measured("grouped queries", workload("dynamic")).to_json()["columns"]


MIB = 2**20
ATTENTION = ModuleCost(
    path="attention",
    cache_bytes=6 * MIB,
    doubled_cache_bytes=12 * MIB,
    offloaded_bytes=6 * MIB,
    offloaded_largest_bytes=3 * MIB,
)


def test_pinned_bytes_are_powers_of_two_and_include_outgrown_ones():
    assert ATTENTION.pinned_bytes(workload("offloaded")) == 2 * 4 * MIB
    half = workload("offloaded", prompt_length=LENGTH // 2)
    assert ATTENTION.pinned_bytes(half) == 2 * (4 + 2) * MIB  # 1.5 MiB of the prompt took 2, beyond which it grew
    assert ATTENTION.pinned_bytes(replace(half, cache="offloaded_static")) == 2 * 4 * MIB


def test_exchanged_bytes_of_a_token_are_those_of_the_average_cache():
    half = workload("offloaded", prompt_length=LENGTH // 2)
    assert ATTENTION.exchanged_bytes("prefill", half) == 3 * MIB
    assert ATTENTION.exchanged_bytes("decode", half) == (3 + 6) * MIB // 2
    assert ATTENTION.exchanged_bytes("decode", replace(half, cache="offloaded_static")) == 6 * MIB
