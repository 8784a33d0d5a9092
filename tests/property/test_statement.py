"""What a chain says of a choice is what the plan of that choice says: its time, and what each device holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import LLAMA, MIXTURE

from devmap_config.compiler import Request, run_pipeline
from devmap_config.placement import optimal
from devmap_config.placement.assignment import Assignment
from devmap_config.placement.statement import Statement
from devmap_config.placement.timing import Timing, forward_nanoseconds
from devmap_config.placement.units import fold
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
    cpu: {{memory: 1GiB, bandwidth: 50GB/s, flops: 1TFLOP/s}}
    disk: {{memory: 1GiB, bandwidth: 3GB/s}}
  links: {{host: 25GB/s, peer: 10GB/s}}
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


def problem_of(monkeypatch, config, optimize="decode", pins=()):
    """What `place_fastest` is asked for such a profile: the problem and the aim."""
    asked = []
    monkeypatch.setattr(optimal, "place_fastest", lambda *arguments: asked.append(arguments))
    Path("small").mkdir(exist_ok=True)
    Path("small/config.json").write_text(json.dumps(config))
    lines = "  pins:\n" + "".join(f"    - {pin}\n" for pin in pins) if pins else ""
    Path("profile.yaml").write_text(PROFILE.format(optimize=optimize, pins=lines))
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert asked, compilation.diagnostics
    return asked[0][:2]


def random_choice(chain, seed):
    """A choice in which blocks of one group share a place."""
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
    "t5": (TIED_T5, "decode", ()),
    "t5 prefill": (TIED_T5, "prefill", ()),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_chain_says_what_the_plan_says(workspace, monkeypatch, setting):
    problem, aim = problem_of(monkeypatch, *SETTINGS[setting])
    modes = set()
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
            assignments = [
                Assignment(unit.name, unit.tensors, location) for unit, location in fold(problem.graph, locations)
            ]
            if problem.executor.main_device(each.stored_on for each in locations.values()) != main_device:
                continue  # what is streamed then runs elsewhere, and this choice is another statement's
            modes |= {option.mode[0] for option in options}
            used = stated.chain.used_bytes(choice)
            for use in device_uses(problem.graph, assignments, problem.capacities, problem.executor):
                assert used.get(use.id, 0) == use.capacity_bytes - use.free_bytes, (use.id, seed)
    assert modes >= {"resident", "streamed", "computed"}
    assert "part" in modes or "llama" not in setting
