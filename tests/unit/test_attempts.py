"""Plans are made anew while loading lacks room: a few times, however little each time is gained."""

import json
from pathlib import Path

import pytest

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
def test_what_stays_put_for_less_room_is_left_less_by_each_attempt(strategy, workspace, monkeypatch):
    """Here loading lacks 128 bytes anew, for each 128 that the CPU is left less."""
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
