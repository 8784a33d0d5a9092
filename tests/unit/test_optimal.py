"""Our own strategies choose the fastest, longest or smallest plan, and propose remedies if nothing fits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import LLAMA

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.devices import CPU, Device
from devmap_config.execution.overlap import total_nanoseconds
from devmap_config.execution.segments import MachineRates, Segment
from devmap_config.placement import optimal
from devmap_config.plan.explanation import savings
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import amounts

PROFILE = """\
version: 1
model: {{source: llama}}
workload: {{context_length: 64{workload}}}
hardware:
  devices: {{{devices}}}
  links: {{host: {host}, peer: 10GB/s}}
placement:
  strategy: {strategy}
{pins}"""

CARD = "{memory: 440KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"


def compiled(devices, strategy="fastest", pins="", workload="", host="25GB/s"):
    pins = "  pins:\n" + "".join(f"    - {pin}\n" for pin in pins) if pins else ""
    text = PROFILE.format(devices=devices, strategy=strategy, pins=pins, workload=workload, host=host)
    if "disk:" in devices:
        text = text.replace("placement:\n", "placement:\n  offload: {folder: ./offload}\n")
    Path("profile.yaml").write_text(text)
    return run_pipeline(Request(path=Path("profile.yaml")))


def plan_of(*arguments, **options):
    compilation = compiled(*arguments, **options)
    assert isinstance(compilation, Compiled), [each.message for each in compilation.diagnostics]
    return compilation.plan


def compiles_with(before, after):
    """Tell whether the profile compiles with one text replaced, and no other change."""
    text = Path("profile.yaml").read_text()
    assert before in text
    Path("other.yaml").write_text(text.replace(before, after))
    return isinstance(run_pipeline(Request(path=Path("other.yaml"))), Compiled)


WAYS_OUT = "each of these was tried, and fits: "


def refusal_of(*arguments, **options):
    (finding,) = (each for each in compiled(*arguments, **options).diagnostics if each.severity == "error")
    return finding


@pytest.mark.parametrize("optimize", ["decode", "prefill", "request"])
def test_a_model_that_fits_on_one_card_stays_there(workspace, optimize):
    card = "{memory: 100MiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"
    plan = plan_of(f'"cuda:[0-3]": {card}', workload=f", optimize: {optimize}")
    assert {str(each.location.stored_on) for each in plan.assignments} == {"cuda:0"}
    assert plan.prediction.hops == 0


def test_the_faster_card_is_used_in_any_order(workspace):
    slow, fast = "{memory: 100MiB, bandwidth: 10MB/s}", "{memory: 100MiB, bandwidth: 3TB/s}"
    plan = plan_of(f"cuda:0: {slow}, cuda:1: {fast}")
    assert {str(each.location.stored_on) for each in plan.assignments} == {"cuda:1"}
    assert str(plan.main_device) == "cuda:1"


def test_the_bound_is_at_most_the_plans_time(workspace):
    plan = plan_of(f'"cuda:[0-1]": {CARD}')
    prediction = plan.prediction
    assert prediction.bound_decode_nanoseconds_per_token <= prediction.decode_nanoseconds_per_token
    assert prediction.decode_nanoseconds_per_token <= 1.01 * prediction.bound_decode_nanoseconds_per_token
    assert {str(each.location.stored_on) for each in plan.assignments} == {"cuda:0", "cuda:1"}


def test_the_bound_holds_if_not_every_kind_of_card_is_tried_first(workspace, monkeypatch):
    slow, fast = "{memory: 100MiB, bandwidth: 10GB/s}", "{memory: 100MiB, bandwidth: 40GB/s}"
    every = plan_of(f"cuda:0: {slow}, cuda:1: {fast}").prediction
    monkeypatch.setattr(optimal, "MOST_FIRST_CARDS", 1)
    first = plan_of(f"cuda:0: {slow}, cuda:1: {fast}").prediction
    bound = first.bound_decode_nanoseconds_per_token
    assert bound < every.decode_nanoseconds_per_token <= first.decode_nanoseconds_per_token
    linear_bytes = 2 * (6 * (3 * 64 * 64 + 3 * 64 * 128) + 64 * 256)  # what a token reads of weights
    assert linear_bytes / 40 < bound < 4 * linear_bytes / 40


def test_wishes_may_cost_one_percent_over_the_bound(workspace, monkeypatch):
    asked = []
    monkeypatch.setattr(optimal, "preferred", lambda chain, most, contexts: asked.append(most))
    prediction = plan_of(f'"cuda:[0-1]": {CARD}').prediction
    fastest, bound = prediction.decode_nanoseconds_per_token, prediction.bound_decode_nanoseconds_per_token
    assert bound < fastest < bound + bound // 100 == asked[-1]
    monkeypatch.setattr(optimal, "NEARLY_AS_FAST", 10**9)
    plan_of(f'"cuda:[0-1]": {CARD}')
    assert asked[-1] == fastest


def test_pins_groups_and_prohibitions_hold(workspace):
    pins = [
        "{match: lm_head, device: cuda:1}",
        '{match: "model.layers.[0,5]", keep_together: true}',
        '{match: "model.layers.2", not_on: cuda:0}',
    ]
    plan = plan_of(f'"cuda:[0-1]": {CARD.replace("440KiB", "600KiB")}', pins=pins)
    home = {each.unit: str(each.location.stored_on) for each in plan.assignments}
    assert home["lm_head"] == "cuda:1"
    assert home["model.layers.0"] == home["model.layers.5"]
    assert home["model.layers.2"] == "cuda:1"


def test_not_on_holds_for_modules_without_weights(workspace):
    pins = ["{match: model.rotary_emb, not_on: cuda:0}"]
    plan = plan_of(f'"cuda:[0-1]": {CARD}', pins=pins)
    assert {str(each.location.stored_on) for each in plan.assignments if each.unit == "model.rotary_emb"} == {"cuda:1"}


def test_weights_are_streamed_if_the_cpus_rates_are_unknown(workspace):
    plan = plan_of(f"cuda:0: {CARD}, cpu: {{memory: 1GiB}}")
    assert plan.prediction.streamed_bytes_per_token > 0
    assert plan.compute == {}


def test_a_cpu_faster_than_the_link_computes(workspace):
    plan = plan_of(f"cuda:0: {CARD}, cpu: {{memory: 1GiB, bandwidth: 900GB/s}}", host="100MB/s")
    assert set(plan.compute.values()) == {CPU}


def test_weights_are_streamed_if_that_is_faster_than_the_cpu(workspace):
    plan = plan_of(f"cuda:0: {CARD}, cpu: {{memory: 1GiB, bandwidth: 10MB/s}}", host="25GB/s")
    assert plan.executor.name == "devmap"
    assert "ahead of their use; plain transformers waits for each" in plan.streaming  # the time is not of its hooks
    assert {*plan.compute} <= {"model.embed_tokens"}  # which looks up, and copies nothing


@pytest.mark.parametrize(("is_tied", "copies"), [(True, 1), (False, 2)])
def test_tied_weights_are_copied_once_per_token(workspace, is_tied, copies):
    """The embedding of a token finds the weights that were copied for the head of the token before."""
    Path("llama/config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": is_tied}))
    plan = plan_of(
        "cuda:0: {memory: 2MiB, bandwidth: 1TB/s, flops: 100TFLOP/s, slack: 0, overhead: 0}, cpu: {memory: 1GiB}",
        pins=('{match: "{model.embed_tokens,lm_head}", device: cpu}',),
        host="1MB/s",
    )
    embedding_bytes = LLAMA["vocab_size"] * LLAMA["hidden_size"] * 2
    assert plan.prediction.decode_nanoseconds_per_token // (1000 * embedding_bytes) == copies
    assert plan.prediction.streamed_bytes_per_token == copies * embedding_bytes


@pytest.mark.parametrize(("disk", "host"), [("1MB/s", "25GB/s"), ("9GB/s", "1MB/s"), ("1MB/s", "1MB/s")])
def test_weights_on_disk_take_the_longer_of_reading_and_copying(workspace, disk, host):
    plan = plan_of(
        "cuda:0: {memory: 2MiB, bandwidth: 1TB/s, flops: 100TFLOP/s, slack: 0, overhead: 0}, cpu: {memory: 1GiB},"
        f" disk: {{memory: 1GiB, bandwidth: {disk}}}",
        pins=("{match: model.layers.1, device: disk}",),
        host=host,
    )
    assert plan.executor.name == "devmap"
    streamed_bytes = plan.prediction.streamed_bytes_per_token
    assert streamed_bytes
    assert plan.prediction.decode_nanoseconds_per_token // (1000 * streamed_bytes) == 1
    (ram,) = (use for use in plan.devices if use.id == CPU)
    assert (ram.weights_bytes, ram.overhead_bytes) == (0, 2 * LLAMA["hidden_size"] * LLAMA["intermediate_size"] * 2)


def test_weights_are_copied_to_the_card_with_the_faster_link(workspace):
    """If no link is faster, they go to the first card, as in a plain device_map."""
    card = "{memory: 300KiB, bandwidth: 1TB/s, flops: 100TFLOP/s, slack: 0, overhead: 0}"
    slow, fast = '"cpu-cuda:0": 10MB/s', '"cpu-cuda:1": 100MB/s'
    for links, streams_to in ((f"{slow}, {fast}", {"cuda:1"}), (slow, {"cuda:0"})):
        plan = plan_of(f'"cuda:[0-1]": {card}, cpu: {{memory: 1GiB}}', host=f"10MB/s, {links}")
        streamed = [each for each in plan.assignments if plan.executor.streams(each.location)]
        assert {str(each.location.runs_on) for each in streamed} == streams_to
        assert set(plan.compute) == {each.unit for each in streamed if each.location.runs_on != plan.main_device}


SMALL_CARD = "{memory: 300KiB, bandwidth: 1TB/s, flops: 100TFLOP/s, slack: 0, overhead: 0}"


def over_links(cards, together, host="10MB/s", **options):
    devices = f'"cuda:[0-{cards - 1}]": {SMALL_CARD}, cpu: {{memory: 1GiB}}'
    return plan_of(devices, host=f"{host}, together: {together}" if together else host, **options)


def streamed_to(plan):
    streamed = (each for each in plan.assignments if plan.executor.streams(each.location))
    return [(each.unit, str(each.location.runs_on)) for each in streamed]


def test_weights_are_copied_over_the_links_of_all_cards_at_once(workspace):
    """Cards alternate, so that one's next weights are copied while the other computes: half the time."""
    layers = {f"model.layers.{index}": None for index in range(12)}
    Path("llama/config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": len(layers)}))
    one, plan = over_links(2, None), over_links(2, "20MB/s")
    targets = [target for unit, target in streamed_to(plan) if unit in layers]
    assert {*targets[::2]}.isdisjoint(targets[1::2])
    own, bound = plan.prediction.decode_nanoseconds_per_token, plan.prediction.bound_decode_nanoseconds_per_token
    assert 0.5 <= own / one.prediction.decode_nanoseconds_per_token <= 0.56
    assert bound <= own <= 1.03 * bound
    assert "are copied to cuda:0 and cuda:1 at every forward, over the link of each, ahead" in plan.streaming
    assert set(plan.compute.values()) == {Device("cuda", 1)}
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    done = amounts(plan, compilation.graph, compilation.inventory, "decode")
    rates = MachineRates(compilation.inventory, "decode")
    timed = (rates.time(Segment.from_json(each)).times(each["count"]) for each in done)
    assert total_nanoseconds(timed) == own  # by a receipt, rates are fitted to the same time
    found = savings(plan, compilation.graph, compilation.inventory, "decode")
    assert {each.what: each.nanoseconds for each in found}["the links"] <= 0.6 * own


def test_cards_that_share_a_link_copy_no_faster_than_one(workspace):
    one, shared = over_links(2, None), over_links(2, "10MB/s")
    assert shared == one
    assert {target for _, target in streamed_to(one)} == {"cuda:0"}


def test_links_together_are_limited_by_the_cpus_memory(workspace):
    """Three cards' links bring 1.5 times as much as one, so using more than one is worth this much."""
    Path("llama/config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 12}))
    one, most = over_links(3, None).prediction, over_links(3, "15MB/s").prediction
    copied = one.streamed_bytes_per_token / most.streamed_bytes_per_token
    ratio = one.decode_nanoseconds_per_token / most.decode_nanoseconds_per_token
    assert 1.3 * copied <= ratio <= 1.5 * copied


def test_a_cpu_without_stated_flops_does_not_compute_prefills(workspace):
    devices = f"cuda:0: {CARD}, cpu: {{memory: 1GiB, bandwidth: 900GB/s}}"
    prefill = {"workload": ", optimize: prefill", "host": "100MB/s"}
    assert {*plan_of(devices, **prefill).compute} <= {"model.embed_tokens"}  # which looks up, and computes nothing
    computed = plan_of(devices.replace("900GB/s", "900GB/s, flops: 900TFLOP/s"), **prefill).compute
    assert any(unit.startswith("model.layers") for unit in computed)


def test_a_slow_cpu_does_not_compute(workspace):
    plan = plan_of(f"cuda:0: {CARD}, cpu: {{memory: 1GiB, bandwidth: 1MB/s}}")
    assert plan.compute == {}
    assert plan.prediction.streamed_bytes_per_token > 0


def test_without_an_accelerator_all_runs_on_the_cpu(workspace):
    plan = plan_of("cpu: {memory: 1GiB, bandwidth: 50GB/s}")
    assert {(str(each.location.stored_on), str(each.location.runs_on)) for each in plan.assignments} == {("cpu", "cpu")}


def test_fewest_devices_leaves_the_others_empty(workspace):
    plan = plan_of(f'"cuda:[0-3]": {CARD}', strategy="fewest-devices")
    assert len({str(each.location.stored_on) for each in plan.assignments}) == 2


def test_fewest_devices_compares_unlike_cards_without_rates(workspace):
    plan = plan_of(
        "cuda:0: {memory: 300KiB}, cuda:1: {memory: 440KiB}, cuda:2: {memory: 10MiB}", strategy="fewest-devices"
    )
    assert {str(each.location.stored_on) for each in plan.assignments} == {"cuda:2"}
    assert plan.prediction.decode_nanoseconds_per_token is None


@pytest.mark.parametrize("fast", [0, 1])
def test_fewest_devices_uses_the_faster_of_equally_few(workspace, fast):
    rates = {fast: "30MB/s", 1 - fast: "10MB/s"}
    devices = ", ".join(f"cuda:{index}: {{memory: 100MiB, bandwidth: {rates[index]}}}" for index in range(2))
    plan = plan_of(devices, strategy="fewest-devices")
    assert {str(each.location.stored_on) for each in plan.assignments} == {f"cuda:{fast}"}


def test_beyond_the_longest_context_nothing_fits(workspace):
    devices = f'"cuda:[0-1]": {CARD}'
    longest = plan_of(devices, "longest-context").prediction.longest_context
    text = Path("profile.yaml").read_text()
    for length, fits in ((longest, True), (longest + 1, False)):
        other = text.replace("context_length: 64", f"context_length: {length}").replace("longest-context", "fastest")
        Path("profile.yaml").write_text(other)
        assert isinstance(run_pipeline(Request(path=Path("profile.yaml"))), Compiled) == fits


def test_longest_context_exceeds_that_of_the_fastest_plan(workspace):
    devices = f"cuda:0: {CARD.replace('440KiB', '900KiB')}, cuda:1: {CARD.replace('440KiB', '900KiB')}"
    fastest = plan_of(devices).prediction.longest_context
    longest = plan_of(devices, strategy="longest-context").prediction.longest_context
    assert longest > fastest >= 64


def test_every_proposed_remedy_compiles(workspace):
    finding = refusal_of("cuda:0: {memory: 500KiB, bandwidth: 1TB/s}")
    assert finding.code == "over-capacity"
    assert "find no place on cuda:0" in finding.message
    quantised = "quantization: {method: bitsandbytes, load_in_8bit: true}"
    assert finding.help == f"{WAYS_OUT}quantise: `{quantised}` under `model`; or give cuda:0 1 GiB more"
    assert compiles_with("source: llama", f"source: llama, {quantised}")
    assert compiles_with("500KiB", str(500 * 2**10 + 2**30))


def test_a_shorter_context_is_proposed_as_a_remedy(workspace):
    devices = f"cuda:0: {CARD.replace('440KiB', '2MiB')}"
    Path("profile.yaml").write_text(
        PROFILE.format(host="25GB/s", devices=devices, strategy="fastest", pins="", workload="").replace(
            "length: 64", "length: 4096"
        )
    )
    (finding,) = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    context_length = int(finding.help.split("`context_length` to ")[1].split(";")[0])
    assert compiles_with("length: 4096", f"length: {context_length}")


def test_pins_that_do_not_fit_are_named_and_dropping_one_is_proposed(workspace):
    pins = ['{match: "model.layers.[0-4]", device: cuda:0}', "{match: lm_head, device: cuda:1}"]
    finding = refusal_of(f'"cuda:[0-1]": {CARD}', pins=pins)
    assert "would fit, but not with this pin" in finding.message
    assert finding.span.line == 10
    assert "drop the pin of `model.layers.[0-4]` (line 10)" in finding.help
    assert isinstance(compiled(f'"cuda:[0-1]": {CARD}', pins=pins[1:]), Compiled)


def test_another_card_and_a_cpu_are_proposed_as_remedies(workspace):
    text = PROFILE.format(
        host="25GB/s", devices="cuda:0: {accelerator: t4, memory: 1370000000}", strategy="fastest", pins="", workload=""
    )
    Path("profile.yaml").write_text(text.replace("source: llama", "source: llama, dtype: float16"))
    (finding,) = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert finding.help == f"{WAYS_OUT}add `cuda:1: t4`; or list `cpu: {{memory: 1GiB}}` for what is to be offloaded"
    assert compiles_with("1370000000}", "1370000000}, cuda:1: t4")
    assert compiles_with("1370000000}", "1370000000}, cpu: {memory: 1GiB}")


def test_a_compute_pin_on_a_cpu_without_bandwidth_is_reported(workspace):
    devices = f"cuda:0: {CARD}, cpu: {{memory: 1GiB}}"
    pins = ['{match: "model.layers.1.mlp", device: cpu, compute: cpu}']
    finding = refusal_of(devices, pins=pins)
    assert (finding.code, "the bandwidth of cpu" in finding.message) == ("missing-figure", True)
    assert "write `cpu: {memory: 1GiB, bandwidth: 50GB/s}`" in finding.help
    assert plan_of(devices.replace("1GiB", "1GiB, bandwidth: 50GB/s"), pins=pins).compute


def test_every_remedy_for_a_quantizer_that_refuses_the_cpu_compiles(workspace):
    text = PROFILE.format(
        host="25GB/s",
        devices=f"cuda:0: {CARD.replace('440KiB', '270KiB')}, cpu: {{memory: 1GiB}}",
        strategy="fastest",
        pins="",
        workload="",
    )
    quantization = "{method: bitsandbytes, load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}"
    text = text.replace("source: llama", f"source: llama, quantization: {quantization}")
    Path("profile.yaml").write_text(text)
    (finding,) = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert "bitsandbytes loads nothing onto cpu" in finding.message
    told = "llm_int8_enable_fp32_cpu_offload: true"
    assert finding.help == f"{WAYS_OUT}write `{told}`; or lower `context_length` to 29; or give cuda:0 1 GiB more"
    assert compiles_with("load_in_4bit: true", f"load_in_4bit: true, {told}")
    assert compiles_with("context_length: 64", "context_length: 29")
    assert compiles_with("270KiB", str(270 * 2**10 + 2**30))


def test_an_encoder_is_optimised_for_prefill_and_has_no_time_per_token(workspace):
    encoder = {**LLAMA, "architectures": ["BertModel"], "model_type": "bert"}
    Path("llama/config.json").write_text(json.dumps(encoder))
    card = "{memory: 100MiB, bandwidth: 1TB/s, flops: 1GFLOP/s}"
    devices = f"cuda:0: {card}, cuda:1: {card.replace('1GFLOP', '100TFLOP')}"
    plan = plan_of(devices)
    assert {str(each.location.stored_on) for each in plan.assignments} == {"cuda:1"}
    assert plan.prediction.decode_nanoseconds_per_token is None
    assert plan.prediction.bound_decode_nanoseconds_per_token is None
    assert plan.prediction.prefill_nanoseconds > 0


def test_the_stated_bottleneck_of_a_phase_is_what_would_shorten_it(workspace):
    def waits(devices, phase="decode", **options):
        compilation = compiled(devices, **options)
        found = savings(compilation.plan, compilation.graph, compilation.inventory, phase)
        now = getattr(compilation.plan.prediction, OWN[phase])
        assert all(now // 2 - 1 <= each.nanoseconds < now for each in found)
        return [each.what for each in found]

    room = CARD.replace("440KiB", "100MiB")
    assert waits(f"cuda:0: {room}") == ["the host"]
    assert waits(f"cuda:0: {room.replace('1TB/s', '10MB/s')}") == ["the devices' memory"]
    assert waits(f"cuda:0: {room.replace('100TFLOP', '1GFLOP')}", phase="prefill") == ["the devices' computing"]
    streamed = f"cuda:0: {CARD}, cpu: {{memory: 1GiB}}"
    assert waits(streamed, host="1MB/s") == ["the links"]
    assert waits("cpu: {memory: 1GiB, bandwidth: 10MB/s}") == ["the devices' memory", "the host"]


def test_without_times_few_hops_and_a_long_context_decide(workspace):
    cards = "cuda:0: {memory: 520KiB, overhead: 0, slack: 0}, cuda:1: {memory: 420KiB, overhead: 0, slack: 0}"
    text = PROFILE.format(host="25GB/s", devices=cards, strategy="fewest-devices", pins="", workload="")
    Path("profile.yaml").write_text(text)
    plan = run_pipeline(Request(path=Path("profile.yaml"))).plan
    assert (plan.prediction.decode_nanoseconds_per_token, plan.prediction.hops) == (None, 1)
    assert [plan.device_map[name] for name in ("model.embed_tokens", "model.layers.0", "lm_head")] == [0, 0, 1]


def mixture(strategy, memory, workload="", flops="1GFLOP/s", pins=""):
    """Return the plan of a mixture of experts beside a CPU that reads fast and computes slowly."""
    Path("mixture.yaml").write_text(
        f"""version: 1
model: {{source: mixture}}
workload: {{context_length: 64{workload}}}
hardware:
  devices:
    cuda:0: {{memory: {memory}, bandwidth: 1TB/s, flops: 1TFLOP/s}}
    cpu: {{memory: 1GiB, bandwidth: 100GB/s, flops: {flops}}}
  links: {{host: 300MB/s}}
placement: {{strategy: {strategy}{pins}}}
"""
    )
    compilation = run_pipeline(Request(path=Path("mixture.yaml")))
    assert isinstance(compilation, Compiled), [each.message for each in compilation.diagnostics]
    return compilation.plan


EXPERTS_ON_THE_CPU = ', pins: [{match: "model.layers.*.mlp.experts", device: cpu, compute: cpu}]'


def test_experts_on_the_cpu_are_copied_for_long_prompts_if_there_is_room(workspace):
    with_room, without = (mixture("sequential", memory, pins=EXPERTS_ON_THE_CPU) for memory in ("500KiB", "400KiB"))
    experts_bytes, computed = 3 * 8 * 64 * 32 * 2, 3 * 2 * 2 * 64 * 32 / 1e9  # bytes in all, and seconds a token
    assert set(with_room.prefilled.values()) == {math.ceil((experts_bytes / 300e6 + 10e-6) / computed)}
    assert with_room.devices[0].overhead_bytes == 2 * experts_bytes
    assert without.prefilled == {}
    assert with_room.placement == without.placement
    (one, other) = (plan.prediction for plan in (with_room, without))
    assert one.decode_nanoseconds_per_token == other.decode_nanoseconds_per_token
    assert 2 * one.prefill_nanoseconds < other.prefill_nanoseconds
    assert "run on cuda:0 for 14 tokens or more" in with_room.prefilling[0]


def test_room_for_long_prompts_is_made_only_if_they_are_optimised(workspace):
    assert mixture("sequential", "300KiB", pins=EXPERTS_ON_THE_CPU).prefilled == {}
    assert mixture("fastest", "500KiB").prefilled == {}
    asked = mixture("fastest", "500KiB", workload=", optimize: request, new_tokens: 8")
    assert asked.prefilled.keys() == {unit for unit in asked.compute if unit.endswith("experts")} != set()


def test_a_cpu_faster_than_copying_computes_prefills(workspace):
    assert mixture("sequential", "500KiB", flops="1TFLOP/s", pins=EXPERTS_ON_THE_CPU).prefilled == {}
