"""A chain's statement about a choice equals that of the choice's plan: its time, and the bytes of each device."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LLAMA, MIXTURE

from devmap_config.compiler import Request, run_pipeline
from devmap_config.execution.assignment import Assignment
from devmap_config.execution.timing import Timing, forward_nanoseconds
from devmap_config.execution.units import fold
from devmap_config.placement import optimal
from devmap_config.placement.statement import Statement
from devmap_config.plan.plan import device_uses

SEEDS = 16
"""Random choices of each chain."""

PROFILE = """\
version: 1
model: {{source: small}}
workload: {{context_length: 64, optimize: {optimize}}}
hardware:
  devices:
    cuda:0: {{memory: 1MiB, bandwidth: 1TB/s, flops: 100TFLOP/s}}
    cuda:1: {{memory: 2MiB, bandwidth: 2TB/s, flops: 300TFLOP/s}}
    cpu: {{memory: 1GiB, bandwidth: 50GB/s, flops: {flops}}}
    disk: {{memory: 1GiB, bandwidth: 3GB/s}}
  links: {{{links}}}
placement:
  strategy: fastest
  offload: {{folder: ./offload}}
{pins}"""

TIED_T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 256,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 3,
}
"""In each block there are parameters around modules."""

BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
"""A module shares its bias with one within, and that its weight with the embedding."""


def problem_of(monkeypatch, config, optimize="decode", pins=(), flops="1TFLOP/s", links="host: 25GB/s, peer: 10GB/s"):
    """Return the problem and the objective that a profile gives to `place_fastest`."""
    asked = []
    monkeypatch.setattr(optimal, "place_fastest", lambda *arguments: asked.append(arguments))
    Path("small").mkdir(exist_ok=True)
    Path("small/config.json").write_text(json.dumps(config))
    lines = "  pins:\n" + "".join(f"    - {pin}\n" for pin in pins) if pins else ""
    Path("profile.yaml").write_text(PROFILE.format(optimize=optimize, pins=lines, flops=flops, links=links))
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert asked, compilation.diagnostics
    return asked[0][:2]


def random_choice(chain, seed):
    """Return a choice in which blocks of one group share a place."""
    rng = random.Random(seed)
    places, choice = {}, []
    for block in chain.blocks:
        index = rng.randrange(len(block.options))
        if block.group is not None:
            shared = places.setdefault(block.group, block.options[index].place)
            index = [option.place for option in block.options].index(shared)
        choice.append(index)
    return tuple(choice)


PINS = ("{match: model.norm, device: cuda:1}", '{match: "model.layers.1.mlp", device: cpu, compute: cpu}')

SETTINGS = {
    "llama": (LLAMA, "decode", ()),
    "llama prefill": (LLAMA, "prefill", ()),
    "llama request, tied": ({**LLAMA, "tie_word_embeddings": True}, "request", ()),
    "llama pinned": (LLAMA, "decode", PINS),
    "llama in part pinned": (LLAMA, "decode", ('{match: "model.layers.[2-3].self_attn", device: cuda:1}',)),
    "mixture": (MIXTURE, "decode", ()),
    "mixture prefill, copied for prompts": (MIXTURE, "prefill", (), "1GFLOP/s"),
    "t5": (TIED_T5, "decode", ()),
    "t5 prefill": (TIED_T5, "prefill", ()),
    "llama beside a faster link": (LLAMA, "decode", (), "1TFLOP/s", '"cpu-cuda:1": 50GB/s, host: 25GB/s, peer: 10GB/s'),
    "llama over two links": (LLAMA, "request", PINS, "1TFLOP/s", "host: 20MB/s, together: 30MB/s, peer: 10GB/s"),
    "bert over two links": (BERT, "prefill", (), "1TFLOP/s", "host: 20MB/s, together: 90MB/s, peer: 10GB/s"),
    "mixture prefill over two links": (
        MIXTURE,
        "prefill",
        (),
        "1GFLOP/s",
        "host: 20MB/s, together: 30MB/s, peer: 1GB/s",
    ),
    "t5 beside a faster link": (TIED_T5, "decode", (), "1TFLOP/s", '"cpu-cuda:1": 50GB/s, host: 25GB/s, peer: 10GB/s'),
    "mamba": (MAMBA, "decode", ()),
    "bert": (BERT, "prefill", ()),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_chain_and_plan_have_the_same_times_and_bytes(workspace, monkeypatch, setting):
    problem, aim = problem_of(monkeypatch, *SETTINGS[setting])
    modes, overlapping = set(), set()
    for main_device in problem.accelerators:
        stated = Statement(problem, aim, main_device)
        for seed in range(SEEDS):
            choice = random_choice(stated.chain, seed)
            options = [block.options[index] for block, index in zip(stated.chain.blocks, choice, strict=True)]
            locations = stated.locations(choice)
            times = [
                times
                * forward_nanoseconds(
                    Timing(problem.graph, aim.inventory, phase, problem.executor, main_device), locations
                )
                for phase, times in aim.phases
            ]
            assert stated.chain.nanoseconds(choice) == sum(times)
            assert 0 < stated.least_nanoseconds <= sum(times)
            assignments = [
                Assignment(unit.name, unit.tensors, location) for unit, location in fold(problem.graph, locations)
            ]
            if problem.executor.main_device(each.stored_on for each in locations.values()) != main_device:
                continue  # what is streamed then runs elsewhere, and this choice is another statement's
            modes |= {option.mode[0] for option in options}
            overlapping |= {(each.phase, each.card) for option in options for each in option.ahead}
            used = stated.chain.used_bytes(choice)
            for use in device_uses(problem.graph, assignments, problem.capacities, problem.executor):
                assert used.get(use.id, 0) == use.capacity_bytes - use.free_bytes, (use.id, seed)
    assert modes >= {"resident", "streamed", "computed"}
    over_links = {(phase, card) for phase, _ in aim.phases for card in problem.accelerators}
    assert overlapping == (over_links if "over two links" in setting else set())
    assert bool(problem.executor.prefilled_from) == ("prompts" in setting or setting.startswith("mixture prefill"))
    assert "part" in modes or "llama" not in setting


BART = {
    "model_type": "bart",
    "architectures": ["BartForConditionalGeneration"],
    "vocab_size": 256,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
"""It has a buffer outside of all blocks."""

RULES = {
    "none": (),
    "not on the CPU": ('{match: "model.layers.[1-2]", not_on: cpu}',),
    "not on the disk nor the first card": ('{match: "model.layers.[1-2]", not_on: [disk, 0]}',),
    "not on the second card": ('{match: "model.layers.[1-2]", not_on: 1}', "{match: model.rotary_emb, not_on: 0}"),
    "in part pinned": ('{match: "model.layers.[1-2].mlp", device: cuda:1}',),
    "kept together": ('{match: "model.layers.[1-2]", keep_together: true}',),
}


@pytest.mark.parametrize("rules", RULES)
def test_blocks_have_every_option_that_the_rules_allow(workspace, monkeypatch, rules):
    """No other places are offered, and pins hold in all of them."""
    problem, aim = problem_of(monkeypatch, LLAMA, pins=RULES[rules])
    cuda, other, cpu, disk = problem.capacities
    for main_device, cards in ((cuda, [cuda, other]), (other, [other])):
        stated = Statement(problem, aim, main_device)
        for block in stated.chain.blocks[1:]:
            module = problem.graph.modules[block.name]
            tensors = [tensor.name for tensor in module.tensors()]
            forbidden = {device for name in tensors for device in problem.forbidden.get(name, ())}
            places = {option.place for option in block.options}
            assert len(places) == len(block.options)
            if block.name == "model.rotary_emb":
                assert places == {(next(card for card in cards if card not in forbidden), ("resident",))}
                continue
            whole = {(card, ("resident",)) for card in cards} | {(cpu, ("computed",))}
            whole |= {(main_device, ("streamed", store)) for store in (cpu, disk)}
            stores = {place: place[1][1] if place[1][0] == "streamed" else place[0] for place in whole}
            parts = {place for place in places if place[1][0] == "part"}
            around_parts = {place for place in places if place[1][0] == "streamed around"}
            assert places - parts - around_parts == {place for place in whole if stores[place] not in forbidden}, (
                block.name
            )
            is_cut = module.children and block.group is None and cpu not in forbidden
            allowed = {card for card in cards if card not in forbidden}
            assert {card for card, _ in parts} == (allowed if is_cut else set()), block.name
            assert {card for card, _ in around_parts} == ({main_device} if is_cut else set()), block.name
            for place in places:
                for name, location in stated._builder.locations(module, place).items():
                    around = (stores.get(place, cpu if place in around_parts else place[0]), place[0])
                    if name in problem.pinned:
                        around = (problem.pinned[name],) * 2
                    elif place in parts | around_parts and name.startswith(f"{block.name}.{place[1][1]}."):
                        around = (cpu, cpu)
                    assert (location.stored_on, location.runs_on) == around


def test_the_heaviest_separable_parts_of_a_block_are_options(workspace, monkeypatch):
    """The mixture of experts has half of a layer's weights, and the experts have nearly all of those."""
    problem, aim = problem_of(monkeypatch, MIXTURE, pins=('{match: "model.layers.1.mlp", device: 0}',))
    chain = Statement(problem, aim, problem.accelerators[0]).chain
    parts = {
        block.name: list(dict.fromkeys(option.mode[1] for option in block.options if option.mode[0] == "part"))
        for block in chain.blocks
        if ".layers." in block.name
    }
    sizes = {
        path: sum(tensor.size_bytes for tensor in module.tensors()) for path, module in problem.graph.modules.items()
    }
    assert parts["model.layers.0"][0] == "mlp.experts"
    chain = Statement(*problem_of(monkeypatch, LLAMA), problem.accelerators[0]).chain
    [layer] = [block for block in chain.blocks if block.name == "model.layers.0"]
    llama = list(dict.fromkeys(option.mode[1] for option in layer.options if option.mode[0] == "part"))
    assert llama == ["mlp", "self_attn", "mlp.gate_proj", "mlp.up_proj"]
    for block, paths in parts.items():
        assert len(paths) <= 4
        assert paths == sorted(paths, key=lambda path: -sizes[f"{block}.{path}"])
        assert all(8 * sizes[f"{block}.{path}"] >= sizes[block] for path in paths)
    assert "self_attn" in parts["model.layers.1"]
    assert not any(path.startswith("mlp") for path in parts["model.layers.1"])


def places_of(problem, aim, main_device, block="model.layers.1"):
    chain = Statement(problem, aim, main_device).chain
    [options] = [each.options for each in chain.blocks if each.name == block]
    return [option.place for option in options]


def test_the_cpu_is_an_option_only_if_listed_and_the_model_is_measured(workspace, monkeypatch):
    problem, aim = problem_of(monkeypatch, LLAMA)
    cuda, other, cpu, disk = problem.capacities

    def on(*devices, **more):
        return replace(problem, capacities={device: problem.capacities[device] for device in devices}, **more)

    modes = {"resident", "streamed", "computed", "part", "streamed around"}
    assert {mode[0] for _, mode in places_of(problem, aim, cuda)} == modes
    assert places_of(on(cpu, disk), aim, cpu) == [(cpu, ("resident",)), (cpu, ("streamed", disk))]
    assert places_of(on(cuda, other), aim, cuda) == [(cuda, ("resident",)), (other, ("resident",))]
    unmeasured = on(cuda, cpu, graph=replace(problem.graph, measurement=None))
    assert places_of(unmeasured, aim, cuda) == [(cuda, ("resident",)), (cuda, ("streamed", cpu))]


def test_a_fully_pinned_block_has_one_option(workspace, monkeypatch):
    problem, aim = problem_of(monkeypatch, LLAMA, pins=('{match: "model.layers.1", device: cuda:1}',))
    assert places_of(problem, aim, problem.accelerators[0]) == [(problem.accelerators[1], ("resident",))]


def test_a_tensor_outside_blocks_is_on_the_main_device_unless_pinned(workspace, monkeypatch):
    problem, aim = problem_of(monkeypatch, BART)
    layer = problem.graph.modules["model.encoder.layers.0"]
    problem = replace(problem, groups=(("final_logits_bias", next(layer.tensors()).name),))
    cards = problem.accelerators
    assert [home for home, _ in places_of(problem, aim, cards[0], "final_logits_bias")] == list(cards)
    for pins, expected in (((), None), (("{match: final_logits_bias, device: cuda:1}",), "cuda:1")):
        problem, aim = problem_of(monkeypatch, BART, pins=pins)
        for main_device in problem.accelerators:
            chain = Statement(problem, aim, main_device).chain
            [block] = [block for block in chain.blocks if block.name == "final_logits_bias"]
            assert [str(option.home) for option in block.options] == [expected or str(main_device)]
            assert block.options[0].demands == ((block.options[0].home, problem.graph.tensors[block.name].size_bytes),)


def test_other_contexts_are_searched_up_to_the_models_positions(workspace, monkeypatch):
    problem, aim = problem_of(monkeypatch, {**LLAMA, "max_position_embeddings": 512})
    stated = Statement(problem, aim, problem.accelerators[0])
    contexts = stated.contexts(200)
    assert (contexts.length, contexts.least) == (64, 200)
    assert contexts.longest == 512
    assert stated.contexts(None).least == stated.contexts(10).least == 64
    longer = contexts.chain_at(512)
    choice = tuple(0 for _ in longer.blocks)
    assert longer.nanoseconds(choice) == stated.chain.nanoseconds(choice)
    assert sum(longer.used_bytes(choice).values()) > sum(stated.chain.used_bytes(choice).values())
