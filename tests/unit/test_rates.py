"""Rates that a profile states for a device change the predicted times."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MIXTURE

from devmap_config.compiler import Request, run_pipeline
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.hardware.constants import CPU_DECODE_ATTENTION, CPU_PREFILL_ATTENTION
from devmap_config.profile.loading import load_profile
from devmap_config.profile.writing import device_text

SECOND = 10**9
BANDWIDTH, FLOPS = 10**9, 280 * 10**9
RATES = "bandwidth: 1GB/s, flops: 280GFLOP/s"


@pytest.fixture
def compiled(workspace):
    """Return the compilation of a small mixture of experts on a CPU with this description."""

    def make(rates, dtype="bfloat16"):
        Path("profile.yaml").write_text(
            f"version: 1\nmodel: {{source: mixture, dtype: {dtype}}}\nworkload: {{context_length: 64}}\n"
            f"hardware: {{devices: {{cpu: {{memory: 1GiB, {rates}}}}}}}\nplacement: {{strategy: fastest}}\n"
        )
        return run_pipeline(Request(path=Path("profile.yaml")))

    return make


def times(compilation):
    prediction = compilation.plan.prediction
    return prediction.decode_nanoseconds_per_token, prediction.prefill_nanoseconds


def total(compilation, figure, paths=("",)):
    costs = compilation.model.graph.measurement.modules
    return sum(getattr(cost, figure) for cost in costs if cost.path.endswith(tuple(paths)))


def test_attention_in_half_precision_uses_its_stated_rate(compiled):
    usual = compiled(RATES)
    as_usual = compiled(f"{RATES}, attention: {{decode: 2GFLOP/s, prefill: 56GFLOP/s}}")
    assert (FLOPS // CPU_DECODE_ATTENTION, FLOPS // CPU_PREFILL_ATTENTION) == (2 * SECOND, 56 * SECOND)
    assert times(as_usual) == pytest.approx(times(usual), abs=100)  # it is rounded for each module
    slower = compiled(f"{RATES}, attention: {{decode: 1GFLOP/s, prefill: 28GFLOP/s}}")
    decode, prefill = (after - before for before, after in zip(times(usual), times(slower), strict=True))
    assert decode == pytest.approx(total(usual, "decode_attention_operations") // 2, abs=100)
    assert prefill == pytest.approx(total(usual, "prefill_attention_operations") / 56, abs=100)
    in_float32 = times(compiled(RATES, "float32"))
    assert times(compiled(f"{RATES}, attention: {{decode: 1GFLOP/s}}", "float32")) == in_float32


def test_experts_of_a_token_use_their_stated_rate(compiled):
    usual, slower = compiled(RATES), compiled(f"{RATES}, experts: 500MB/s")
    decode, prefill = (after - before for before, after in zip(times(usual), times(slower), strict=True))
    assert decode == pytest.approx(total(usual, "decode_touched_bytes", [".experts"]), abs=100)
    assert prefill == 0


def test_starting_each_product_takes_its_stated_time(compiled):
    usual = compiled(RATES)
    slower = compiled(f"{RATES}, products: {{decode: 1000/s, prefill: 500/s}}")
    decode, prefill = (after - before for before, after in zip(times(usual), times(slower), strict=True))
    multiplying = [
        cost
        for cost in usual.model.graph.measurement.modules
        if cost.prefill_operations and not cost.path.endswith(".experts")
    ]
    layers, chosen = MIXTURE["num_hidden_layers"], MIXTURE["num_experts_per_tok"]
    assert prefill == len(multiplying) * SECOND // 500
    assert decode == (len(multiplying) + 2 * layers * chosen) * SECOND // 1000
    in_float32 = (
        f"{RATES}, products: {{decode: 1000/s, prefill: 500/s}}, dtypes: {{float32: {{products: {{decode: 1/s}}}}}}"
    )
    assert times(compiled(in_float32)) == times(slower)
    assert times(compiled(in_float32, "float32"))[0] > len(multiplying) * SECOND


def test_a_device_can_have_rates_by_dtype(compiled):
    described = f"{RATES}, experts: 500MB/s, dtypes: {{float32: {{bandwidth: 2GB/s, flops: 70GFLOP/s}}}}"
    in_float32 = compiled(described, "float32")
    assert times(in_float32) == times(compiled("bandwidth: 2GB/s, flops: 70GFLOP/s", "float32"))
    assert times(compiled(f"{RATES}, dtypes: {{float32: {{flops: 70GFLOP/s}}}}", "float32")) == times(
        compiled("bandwidth: 1GB/s, flops: 70GFLOP/s", "float32")
    )
    usual, in_bfloat16 = compiled(f"{RATES}, experts: 500MB/s"), compiled(described)
    assert times(in_bfloat16) == times(usual)
    assert in_bfloat16.inputs.hardware == usual.inputs.hardware  # no other dtype's rates make its lock stale


def test_locks_omit_rates_that_the_profile_does_not_state(compiled):
    unsaid, said = (
        compiled(RATES + more).inputs.values["hardware"] for more in ("", ", attention: {decode: 1GFLOP/s}")
    )
    assert set(said) - set(unsaid) == {"cpu.decode_attention_per_second"}


def test_written_rates_parse_to_the_same_value(tmp_path):
    device = (
        "{memory: 1GiB, attention: {decode: 2GFLOP/s}, experts: 12GB/s, products: {decode: 17000/s measured},"
        " dtypes: {float16: {flops: 30GFLOP/s}, float32: {bandwidth: 25GB/s, products: {prefill: 9000/s}}}}"
    )
    (tmp_path / "profile.yaml").write_text(
        f"version: 1\nmodel: {{source: x}}\nhardware: {{devices: {{cpu: {device}}}}}\n"
    )
    [section] = load_profile(tmp_path / "profile.yaml", Sink()).profile.hardware.devices.value.values()
    assert device_text(section) == device
