"""The stages of a plan for vLLM are cut optimally, counted as vLLM counts them, and checked in the lock."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import LLAMA, write_models
from hypothesis import given, settings
from hypothesis import strategies as st

from devmap_config import compile_profile
from devmap_config.cli.check import check
from devmap_config.cli.explain import explain
from devmap_config.cli.fit import fit
from devmap_config.cli.probe import probe
from devmap_config.cli.stages_view import pipeline_notes, pipeline_story
from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.locked import compile_locked
from devmap_config.pipeline import planning, rules, slots
from devmap_config.pipeline.cache import LayerCache, blocks_per_request, groups_of, page_bytes
from devmap_config.pipeline.cuts import best_cut, between, forward, largest_between
from devmap_config.pipeline.layers import layers_of
from devmap_config.pipeline.problem import FOLLOWER_PROCESS_BYTES, HEAD_PROCESS_BYTES, RANK_PROCESS_BYTES, bounds_of
from devmap_config.pipeline.slots import choices
from devmap_config.pipeline.stages import Pipeline
from devmap_config.plan.lock import lock_of, read_lock
from devmap_config.plan.pipelines import moves_of_a_layer, pipeline_problem
from devmap_config.plan.readiness import hosts_of, of_host

MEBIBYTE = 2**20


@st.composite
def problems(draw):
    """Yield the costs of a few stages by their layers, and the layers that each can have."""
    count, stages = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    numbers = st.integers(0, 30)
    matrix = st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=count, max_size=count)
    costs = [np.array(draw(matrix), dtype=np.int64) for _ in range(stages)]
    masks = [(np.array(draw(matrix)) > 4) & forward(count) for _ in range(stages)]
    return costs, masks, draw(st.integers(1, stages))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_chosen_cut_has_the_shortest_waiting_time(problem):
    costs, masks, batches = problem
    count, stages = costs[0].shape[0], len(costs)
    objectives = []
    for starts in itertools.combinations(range(1, count), stages - 1):
        bounds = list(zip((0, *starts), (*starts, count), strict=True))
        if all(mask[start, end - 1] for mask, (start, end) in zip(masks, bounds, strict=True)):
            taken = [int(cost[start, end - 1]) for cost, (start, end) in zip(costs, bounds, strict=True)]
            objectives.append(max(sum(taken), batches * max(taken)))
    cut = best_cut(costs, masks, batches)
    assert (None if cut is None else cut.objective(batches)) == min(objectives, default=None)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8))
def test_sums_and_maxima_of_consecutive_layers(values):
    sums, largest = between(values), largest_between(values)
    for first, last in itertools.combinations_with_replacement(range(len(values)), 2):
        assert sums[first, last] == sum(values[first : last + 1])
        assert largest[first, last] == max(values[first : last + 1])


LAYER = LayerCache(token_bytes=2 * 2 * 64 * 2)
"""Two heads of 64 for keys and as many for values, in bfloat16."""


@pytest.mark.parametrize(
    ("stages", "layer", "rooms", "tokens"),
    [
        # What vLLM 0.32.0 logged, with blocks of 128 tokens and so much memory for the cache of each rank.
        ([(0, 5)], LAYER, [64], 21_760),
        ([(0, 3), (4, 5)], LAYER, [64, 64], 32_768),
        ([(0, 3), (4, 5)], LayerCache(token_bytes=2 * 64 * 4), [64, 8], 8_192),  # one head of two, in float32
    ],
)
def test_cache_tokens_are_those_that_vllm_logged(stages, layer, rooms, tokens):
    pages = [page_bytes([layer] * 6, first, last, 128) for first, last in stages]
    blocks = min(room * MEBIBYTE // page for room, page in zip(rooms, pages, strict=True))
    each = blocks_per_request([layer] * 6, context_length=256, block_size=128, tokens_in_flight=512)
    assert blocks * 256 // each == tokens


def test_layers_with_a_window_are_groups_of_their_own():
    """Five layers that see 512 tokens back, and one that sees all: 1,024 blocks, 109 of them a request, 76,959 tokens.

    A cut after the fourth leaves each stage with a page as large: it has as many blocks.
    """
    layers = [replace(LAYER, window=512)] * 5 + [LAYER]
    pages = [page_bytes(layers, *bound, 128) for bound in ((0, 5), (0, 3), (4, 5))]
    assert [64 * MEBIBYTE // page for page in pages] == [1024, 1024, 1024]
    each = blocks_per_request(layers, context_length=8192, block_size=128, tokens_in_flight=512)
    assert (each, 1024 * 8192 // each) == (109, 76_959)


def test_groups_have_the_size_of_the_rarer_kind_of_layers():
    window = replace(LAYER, window=128)
    assert [len(group) for group in groups_of([window] * 10 + [LAYER] * 2)] == [2, 2, 2, 2, 2, 2]
    assert [len(group) for group in groups_of([window] * 13 + [LAYER] * 12)] == [13, 12]
    assert groups_of([window, window, LAYER, window, window, LAYER])[0] == (0, 3)  # spread, so that stages share them


MADE_WITH = dict.fromkeys(("torch", "transformers", "accelerate"))

TWO_HOSTS = """version: 1
model: {source: llama}
workload: {context_length: %(context)s, concurrency: %(requests)s}
hardware:
  hosts:
    left: {devices: {cuda:0: {memory: 1GiB, bandwidth: 10GB/s, flops: 10TFLOP/s}}, network: 100GB/s}
    right: {devices: {cuda:0: {memory: %(memory)s, bandwidth: 5GB/s, flops: 5TFLOP/s}}, network: 100GB/s}
placement: {strategy: fastest}
targets: [vllm]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    write_models(folder)
    return folder


@pytest.fixture
def compiled(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def compiled(text):
        Path("profile.yaml").write_text(text, encoding="utf-8")
        found = run_pipeline(Request(path=Path("profile.yaml")))
        assert isinstance(found, Compiled), found.diagnostics
        return found

    return compiled


def test_with_many_requests_the_faster_card_has_more_layers(compiled):
    many = compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"})
    assert many.plan.pipeline.partition == (4, 2)
    times = [stage.decode_nanoseconds for stage in many.plan.pipeline.stages]
    assert many.plan.prediction.decode_nanoseconds_per_token == 2 * max(times) > sum(times)


def test_with_one_request_the_faster_card_has_all(compiled):
    """A slower card gains nothing if stages wait for one another: the second host stays empty."""
    one = compiled(TWO_HOSTS % {"requests": 1, "context": 4096, "memory": "1GiB"})
    assert [stage.host for stage in one.plan.pipeline.stages] == ["left"]
    assert {str(use.id): use.weights_bytes > 0 for use in one.plan.devices} == {
        "left/cuda:0": True,
        "right/cuda:0": False,
    }
    told = "No stages that use right/cuda:0 are better: it stays empty."
    assert told in list(pipeline_story(one, one.plan.pipeline))


def test_fewest_devices_takes_the_fastest_of_as_few_as_have_room(compiled):
    def stages(**sizes):
        many = TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB", **sizes}
        plan = compiled(many.replace("strategy: fastest", "strategy: fewest-devices")).plan
        return [(stage.host, stage.first_layer, stage.last_layer) for stage in plan.pipeline.stages]

    assert stages() == [("left", 0, 5)]
    assert [host for host, *_ in stages(requests=400)] == ["left", "right"]


def test_the_stage_with_the_least_room_decides_the_number_of_blocks(compiled):
    pipeline = compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "120MiB"}).plan.pipeline
    assert pipeline.deciding_stage == 1
    assert pipeline.blocks == pipeline.stages[1].blocks < pipeline.stages[0].blocks
    for host, stage in zip(pipeline.hosts, pipeline.stages, strict=True):
        assert host.cache_bytes == pipeline.blocks * stage.page_bytes  # all that this host's rank is to be given
        held = stage.weights_bytes + stage.activation_bytes + host.cache_bytes
        assert held <= stage.capacity_bytes
    missing = pipeline.stages[1].capacity_bytes - held
    assert 0 <= missing < pipeline.stages[1].page_bytes  # not one block more


def test_moving_a_layer_to_another_stage_is_slower(compiled):
    found = compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "120MiB"})
    moves = list(moves_of_a_layer(found.plan, found))
    assert [(move.layer, move.source, move.target) for move in moves] == [(3, 0, 1), (4, 1, 0)]
    token, tokens = found.plan.prediction.decode_nanoseconds_per_token, found.plan.pipeline.cache_tokens
    assert [move.decode_nanoseconds > token for move in moves] == [True, True]
    assert moves[0].cache_tokens < tokens < moves[1].cache_tokens


def test_a_tensor_parallel_group_splits_the_tensors_that_vllm_splits(compiled):
    groups = 'hardware: {devices: {"cuda:[0-3]": {memory: 1GiB}}}\nplacement: {groups: ["cuda:[0-%d]"]}\n'
    head = "version: 1\nmodel: {source: llama}\nworkload: {context_length: 64}\ntargets: [vllm]\n"
    two, four = (compiled(head + groups % last) for last in (1, 3))
    hidden, middle, vocabulary = 64, 128, 256
    norms = 2 * hidden  # in each layer, and whole on each rank
    for found, ranks in ((two, 2), (four, 4)):
        [stage] = found.plan.pipeline.stages
        keys = 2 * max(1, 2 // ranks) * 16 * hidden  # of two heads each rank has one at least
        layer = (2 * hidden * hidden + 3 * hidden * middle) // ranks + keys + norms
        rotations = LLAMA["max_position_embeddings"] * 16
        elements = 6 * layer + 2 * vocabulary * hidden // ranks + hidden + rotations
        assert stage.weights_bytes == 2 * elements
    assert two.plan.pipeline.stages[0].page_bytes == four.plan.pipeline.stages[0].page_bytes  # one head on each rank


def test_tied_embeddings_are_counted_on_the_first_and_last_stage(compiled):
    text = (TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"}).replace("llama", "tied")
    layers = layers_of(compiled(text).graph, {**LLAMA, "tie_word_embeddings": True})
    assert layers.last_bytes(1, 2) == layers.first_bytes(1) + 64 * 2  # the norm besides
    assert layers.last_bytes(1, 1) == 64 * 2


def test_choices_of_equal_devices_are_counted_once_with_equal_ranks_per_host(compiled):
    text = """version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  hosts:
    left: {devices: {"cuda:[0-2]": {memory: 1GiB}}}
    right: {devices: {"cuda:[0-1]": {memory: 1GiB}}}
targets: [vllm]
"""
    inventory = compiled(text).inventory
    slots = tuple((device,) for device in inventory.devices)
    found = [[str(slot[0].id) for slot in chosen] for chosen in choices(slots, frozenset(), frozenset(), {})]
    left = [f"left/cuda:{index}" for index in range(3)]
    right = [f"right/cuda:{index}" for index in range(2)]
    assert found == [left, left[:2] + right, left[:2], right, left[:1] + right[:1], left[:1], right[:1]]
    needed = frozenset({slots[4][0].id})  # the second of the right
    found = list(choices(slots, needed, needed, {}))
    assert found
    assert all("right/cuda:1" in map(str, (slot[0].id for slot in chosen)) for chosen in found)


def test_the_first_of_equal_hosts_are_chosen(compiled):
    hosts = "".join(
        f"    h{number}: {{devices: {{cuda:0: {{memory: 1GiB}}}}, network: 1GB/s}}\n" for number in range(12)
    )
    text = f"version: 1\nmodel: {{source: llama}}\nworkload: {{context_length: 64}}\nhardware:\n  hosts:\n{hosts}"

    def hosts_of(text):
        found = compiled(f"{text}targets: [vllm]\n").inventory
        slots = tuple((device,) for device in found.devices)
        chosen = choices(slots, frozenset(), frozenset(), found.links)
        return [[int(slot[0].id.host[1:]) for slot in each] for each in chosen]

    assert hosts_of(text) == [list(range(count)) for count in range(12, 0, -1)]
    # One that is reached more slowly is like no other: with it, up to five before it and up to six behind.
    slower = text.replace(
        "h5: {devices: {cuda:0: {memory: 1GiB}}, network: 1GB/s", "h5: {devices: {cuda:0: {memory: 1GiB}}"
    )
    assert len(hosts_of(slower)) == 6 * 7 + 11


def test_choices_of_unequal_hosts_are_limited(compiled):
    hosts = "".join(f"    h{number}: {{devices: {{cuda:0: {{memory: {1024 + number}MiB}}}}}}\n" for number in range(60))
    text = f"version: 1\nmodel: {{source: llama}}\nworkload: {{context_length: 64}}\nhardware:\n  hosts:\n{hosts}"
    Path("profile.yaml").write_text(f"{text}targets: [vllm]\n", encoding="utf-8")
    refused = run_pipeline(Request(path=Path("profile.yaml")))
    assert [finding.code for finding in refused.diagnostics] == ["too-large"]  # of 2**60 subsets

    few = compiled(f"{text.partition('    h10:')[0]}targets: [vllm]\n")
    slots = tuple((device,) for device in few.inventory.devices)
    found = [tuple(slots.index(slot) for slot in each) for each in choices(slots, frozenset(), frozenset(), {}, 3)]
    expected = [each for count in (1, 2, 3) for each in itertools.combinations(range(len(slots)), count)]
    assert sorted(found) == sorted(expected)
    needed = frozenset({slots[4][0].id})
    found = list(choices(slots, needed, needed, {}, 3))
    assert len(found) == sum(4 in each for each in expected)
    assert all(slots[4] in each for each in found)


def test_the_lock_holds_the_stages_and_refuses_others(compiled):
    text = TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"}
    found = compiled(text)
    lock = read_lock(lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json()).to_text())
    assert Pipeline.from_json(lock.plan["pipeline"]) == found.plan.pipeline
    held, drift = compile_locked(Path("profile.yaml"), lock)
    assert (held.plan, drift) == (found.plan, None)

    plan = json.loads(json.dumps(dict(lock.plan)))
    plan["pipeline"]["stages"][0]["last_layer"] = 2
    _, drift = compile_locked(Path("profile.yaml"), replace(lock, plan=plan))
    assert drift.reasons == ("its stages are not 6 layers one after another",)
    plan["pipeline"]["stages"][1]["first_layer"] = 3
    _, drift = compile_locked(Path("profile.yaml"), replace(lock, plan=plan))
    assert any("weights_bytes" in reason for reason in drift.reasons)  # which are not what that cut has


@pytest.mark.parametrize(
    ("match", "device", "order"),
    [
        ("lm_head", "cuda:0", [1, 0]),
        ("model.layers.5", "cuda:0", [1, 0]),
        ("model.embed_tokens", "cuda:1", [1, 0]),
        ("model.layers.0", "cuda:1", [1, 0]),
        ("lm_head", "cuda:1", [0, 1]),
        ("model.embed_tokens", "cuda:0", [0, 1]),
    ],
)
def test_one_pin_decides_which_of_equal_devices_is_first(compiled, match, device, order):
    text = """version: 1
model: {source: llama}
workload: {context_length: 16384, concurrency: 8}
hardware: {devices: {"cuda:[0-1]": {memory: %s}}}
placement: {pins: [{match: %s, device: %s}]}
targets: [vllm]
"""
    found = compiled(text % ("180MiB", match, device))
    assert [stage.devices[0].index for stage in found.plan.pipeline.stages] == order
    lock = lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
    held, drift = compile_locked(Path("profile.yaml"), lock)
    assert (held.plan, drift) == (found.plan, None)


@pytest.fixture
def resealed(compiled):
    """Return the lock of a profile with the stages of a pinned one, all other values derived from these."""

    def resealed(text, pins):
        other = compiled(text.replace("{strategy: fastest}", f"{{strategy: fastest, pins: [{pins}]}}")).plan
        found = compiled(text)
        lock = lock_of(other, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
        return lock, other.pipeline == found.plan.pipeline

    return resealed


@pytest.mark.parametrize("requests", [1, 64])
def test_a_lock_with_stages_of_another_strategy_is_refused(resealed, requests):
    """Over every cut, and each host alone: only the stages that the strategy gives are accepted."""
    text = TWO_HOSTS % {"requests": requests, "context": 4096, "memory": "1GiB"}
    cuts = [
        ", ".join(
            f'{{match: "model.layers.{number}", device: {"left" if number < cut else "right"}/cuda:0}}'
            for number in range(6)
        )
        for cut in range(7)
    ]
    found = []
    for pins in cuts:
        lock, is_best = resealed(text, pins)
        held, drift = compile_locked(Path("profile.yaml"), lock)
        assert (drift is None) == is_best
        assert isinstance(held, Compiled)
        found.append(drift)
    assert found.count(None) == 1
    wrong = next(drift for drift in found if drift is not None)
    assert (wrong.code, wrong.reasons[0].startswith("it has layers ")) == ("unproven-lock", True)
    assert ", and placing anew gives 0-" in wrong.message


def test_check_refuses_a_lock_with_slower_stages(resealed):
    text = TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"}
    lock, _ = resealed(text, '{match: "model.layers.3", device: right/cuda:0}')
    Path("profile.lock.json").write_text(lock.to_text(), encoding="utf-8")
    done = CliRunner().invoke(check, ["profile.yaml"], standalone_mode=False)
    assert (done.return_value, done.stdout) == (3, "1 lock is stale\n")
    reason = "it has layers 0-2 on left/cuda:0, 3-5 on right/cuda:0, and placing anew gives 0-3 on left/cuda:0, 4-5 on"
    assert reason in " ".join(done.stderr.split())


def test_other_stages_with_other_measurements_are_a_warning(resealed):
    """The lock is kept; the warning names the stages that placing again gives."""
    text = TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"}
    lock, _ = resealed(text, '{match: "model.layers.3", device: right/cuda:0}')
    inputs = {**lock.inputs, "measurement": "sha256:0"}
    held, drift = compile_locked(Path("profile.yaml"), replace(lock, inputs=inputs, made_with={"torch": "2.0.0"}))
    assert drift is None
    [warning] = [finding for finding in held.diagnostics if finding.code == "figures-moved"]
    assert "it has layers 0-2 on left/cuda:0, 3-5 on right/cuda:0, and placing anew gives 0-3" in warning.message


def test_a_changed_order_of_hosts_is_named(compiled):
    text = TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"}
    found = compiled(text)
    lock = lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
    lines = text.splitlines(keepends=True)
    lines[5:7] = lines[6], lines[5]
    compiled("".join(lines))
    _, drift = compile_locked(Path("profile.yaml"), lock)
    assert drift.message == "is stale: the hardware: `hosts` in another order: left, right → right, left"


THREE_CARDS = """version: 1
model: {source: llama}
workload: {context_length: 1024, prompt_length: 32, concurrency: 2}
hardware: {devices: {cuda:0: {memory: 6000KiB}, cuda:1: {memory: 5200KiB}, cuda:2: {memory: 5000KiB}}}
placement: {pins: [{match: "model.layers.%d", device: cuda:%d}]}
targets: [vllm]
"""


@pytest.mark.parametrize(("layer", "device"), [(layer, device) for layer in (1, 3) for device in range(3)])
def test_a_device_pinned_to_a_middle_layer_can_be_in_any_place(compiled, layer, device):
    """No order or subset of the cards has a larger cache."""
    found = compiled(THREE_CARDS % (layer, device))
    problem = pipeline_problem(found, Sink()).problem
    best = 0
    for count in (1, 2, 3):
        for order in itertools.permutations(problem.slots, count):
            rooms, masks = problem.rooms(order), problem.allowed(order)
            for starts in itertools.combinations(range(1, 6), count - 1):
                bounds = bounds_of((0, *starts), 6)
                if all(mask[bound] for mask, bound in zip(masks, bounds, strict=True)):
                    blocks = min(int(room[bound]) for room, bound in zip(rooms, bounds, strict=True))
                    best = max(best, blocks * 1024 // problem.blocks_per_request(count))
    assert found.plan.pipeline.cache_tokens == best > 0
    lock = lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
    assert compile_locked(Path("profile.yaml"), lock)[1] is None


def test_untried_orders_of_devices_are_reported(compiled, monkeypatch):
    """Five unequal cards alone are 16 choices; each comes once before other orders of any."""
    for module in (planning, rules, slots):
        monkeypatch.setattr(module, "MOST_CHOICES", 20)
    devices = ", ".join(f"cuda:{index}: {{memory: {6000 + 100 * index}KiB}}" for index in range(5))
    found = compiled(re.sub(r"\{devices: .*\}\}", f"{{devices: {{{devices}}}}}", THREE_CARDS % (3, 1)))
    notes = list(pipeline_notes(found, found.plan.pipeline))
    assert "of the ways to choose and order these devices, 20 were tried: there may be better stages" in notes
    lock = lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
    assert compile_locked(Path("profile.yaml"), lock)[1] is None


@pytest.mark.parametrize(
    ("requests", "memory", "message", "help"),
    [
        (1, "4MiB", "and a table of rotations 4.0 MiB on each", "list more devices or memory"),
        (10**18, "1GiB", "a forward of 1,000,000,000,000,000,000 requests takes more than any device has", "write `c"),
        (10**6, "1GiB", "a forward of 1,000,000 requests takes up to ", "write `concurrency: "),
    ],
)
def test_stages_that_do_not_fit_are_reported(compiled, requests, memory, message, help):
    """And the proposed remedy fits."""
    text = re.sub("[0-9]+KiB", memory, THREE_CARDS % (3, 1)).replace("concurrency: 2", f"concurrency: {requests}")
    Path("profile.yaml").write_text(text, encoding="utf-8")
    [found] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert message in found.message
    assert found.help.startswith(help)
    if requests > 1:
        most = int(re.search(r"[0-9]+", found.help)[0])
        assert (
            compiled(text.replace(f"concurrency: {requests}", f"concurrency: {most}")).plan.pipeline.max_num_seqs
            == most
        )


def test_missing_links_leave_times_unknown(compiled):
    """The link of cuda:0 and cuda:2 is not stated: `fastest` is refused, with both directions named."""
    rates = "bandwidth: 10GB/s, flops: 1TFLOP/s"
    devices = ", ".join(f"cuda:{index}: {{memory: {index + 1}GiB, {rates}}}" for index in range(3))
    links = '{"cuda:0-cuda:1": 10GB/s, "cuda:1-cuda:2": 10GB/s}'
    text = f"""version: 1
model: {{source: llama}}
workload: {{context_length: 64}}
hardware: {{devices: {{{devices}}}, links: {links}}}
targets: [vllm]
"""
    assert compiled(text).plan.prediction.decode_nanoseconds_per_token is not None  # of one stage
    Path("profile.yaml").write_text(f"{text}placement: {{strategy: fastest}}\n", encoding="utf-8")
    refused = run_pipeline(Request(path=Path("profile.yaml")))
    assert [finding.message.partition(", and ")[2] for finding in refused.diagnostics] == [
        "how fast cuda:0 is reached from cuda:2 is not known",
        "how fast cuda:2 is reached from cuda:0 is not known",
    ]


def test_a_plan_for_vllm_is_no_device_map(folder, monkeypatch, compiled):
    compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "1GiB"})
    plan = compile_profile("profile.yaml")
    with pytest.raises(Exception, match="devmap export PROFILE --to vllm"):
        _ = plan.device_map


def test_a_host_is_checked_against_its_part_of_the_lock(compiled):
    text = """version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  hosts:
    left: {devices: {"cpu:[0-1]": {memory: 4GiB}}}
    right: {devices: {"cpu:[0-1]": {memory: 3GiB}}}
placement:
  pins: [{match: "model.layers.[0-4]", device: left/cpu:0}, {match: "model.layers.5", device: right/cpu:1}]
targets: [vllm]
"""
    found = compiled(text)
    assert [str(stage.devices[0]) for stage in found.plan.pipeline.stages] == ["left/cpu:0", "right/cpu:1"]
    lock = lock_of(found.plan, found.inputs, {}, MADE_WITH, found.inventory.accelerators_to_json())
    assert hosts_of(lock) == {"left": None, "right": None}
    [use] = of_host(lock, "right").plan["devices"]
    [planned] = (use for use in found.plan.devices if use.id.host == "right" and use.weights_bytes)
    assert (use["id"], use["weights_bytes"], use["kv_cache_bytes"]) == (
        "cpu",
        planned.weights_bytes,
        planned.kv_cache_bytes,
    )
    # A follower's processes besides those of its one rank; on the first host the server and the engine as well.
    overheads = [stage.overhead_bytes for stage in found.plan.pipeline.stages]
    assert overheads == [RANK_PROCESS_BYTES + HEAD_PROCESS_BYTES, RANK_PROCESS_BYTES + FOLLOWER_PROCESS_BYTES]
    Path("profile.lock.json").write_text(lock.to_text())
    done = CliRunner().invoke(probe, ["--against", "profile.yaml", "--host", "right"], standalone_mode=False)
    assert done.stdout.endswith("carry what `right` has of profile.lock.json\n")


def test_fit_names_the_stage_that_limits_the_cache(compiled, capsys):
    compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "120MiB"})
    small, large = (f"{{devices: {{'cuda:[0-1]': {{memory: {memory}}}}}}}" for memory in ("120MiB", "1GiB"))
    Path("others.yaml").write_text(f"hardware: {{hosts: {{a: {small}, b: {large}}}}}\n", encoding="utf-8")
    assert fit.main(["profile.yaml", "--on", "others.yaml,24GiB,20MiB", "-q"], standalone_mode=False) == 0
    assert fit.main(["profile.yaml", "--on", "others.yaml,60MiB", "--format", "json"], standalone_mode=False) == 0
    several, small = json.loads(capsys.readouterr().out)["machines"]
    # Without rates, the plan is on the fewest devices that have room: the cards of the first host are too small.
    assert [stage["devices"] for stage in several["pipeline"]["stages"]] == [["b/cuda:0"]]
    assert "stage 0 decides, layers 0 to 5 on cuda:0" in small["reason"]


def test_explain_names_the_slowest_stage(compiled, capsys):
    compiled(TWO_HOSTS % {"requests": 64, "context": 4096, "memory": "120MiB"})
    explain.main(["profile.yaml"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "stage 1 on right/cuda:0 decides, which has the least room" in said
    assert "the slowest stage binds: stage 0 on left/cuda:0" in said
    assert "Layer 3 on stage 1 instead of 0:" in said
