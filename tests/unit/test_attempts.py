"""Plans are made again if loading lacks room: a limited number of times, however little each attempt gains."""

import json
import re
from pathlib import Path

import pytest
from conftest import LLAMA

from devmap_config.compiler import Request, run_pipeline
from devmap_config.plan import attempts

MIXTURE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "tie_word_embeddings": False,
    "vocab_size": 1000,
}
PROFILE = """\
version: 1
model: {{source: experts}}
workload: {{context_length: 64}}
hardware:
  devices:
    cpu: {{memory: 1.5MiB, slack: 0}}
    disk: {{memory: 1GiB}}
placement: {{strategy: {strategy}, offload: {{folder: ./offload}}}}
"""


@pytest.mark.parametrize("strategy", ["sequential", "auto", "fewest-devices"])
def test_each_attempt_leaves_less_room_if_the_plan_does_not_change(strategy, workspace, monkeypatch):
    """Here loading lacks another 128 bytes for each 128 bytes that the CPU is left less."""
    Path("experts").mkdir()
    Path("experts/config.json").write_text(json.dumps(MIXTURE))
    Path("profile.yaml").write_text(PROFILE.format(strategy=strategy))
    made = 0

    def counting(problem, strategy):
        nonlocal made
        made += 1
        assert made <= 30
        return place(problem, strategy)

    place = attempts.place
    monkeypatch.setattr(attempts, "place", counting)
    (finding,) = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert (finding.code, made > 1) == ("over-capacity", True)


CPU_BESIDE_A_SMALL_CARD = """\
version: 1
model: {source: long, dtype: float32}
workload: {context_length: 7598}
hardware:
  devices:
    cuda:0: {memory: 4MiB, bandwidth: 1TB/s, flops: 100TFLOP/s}
    cpu: {memory: 1GiB, bandwidth: 2TB/s, flops: 100TFLOP/s}
  links: {host: 1GB/s, peer: 25GB/s}
placement: {strategy: fastest}
"""


def test_a_capacity_that_a_dry_run_lowered_is_shown_beside_the_whole(workspace):
    Path("long").mkdir()
    Path("long/config.json").write_text(json.dumps({**LLAMA, "vocab_size": 384, "max_position_embeddings": 2**15}))
    Path("profile.yaml").write_text(CPU_BESIDE_A_SMALL_CARD)
    (finding,) = run_pipeline(Request(path=Path("profile.yaml"), simulates=True)).diagnostics
    assert finding.code == "over-capacity"
    assert re.search(r"cuda:0 \([0-9.]+ MiB of 4.0 MiB: loading or running needs the rest\)", finding.message)
