"""The cache of a plan for vLLM is counted as by vLLM's own functions, and its models are those of vLLM's registry."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from devmap_config.pipeline.architectures import architectures
from devmap_config.pipeline.cache import LayerCache, blocks_per_request, groups_of, page_bytes

pytestmark = pytest.mark.engine

PROGRAM = Path(__file__).with_name("on_vllm_cache.py")


def cases():
    """Yield models of full and windowed layers in all proportions, with a stage cut from each."""
    chance = random.Random(1)
    for _ in range(300):
        count, share, window = (
            chance.randint(1, 40),
            chance.choice([0, 0.1, 0.25, 0.5, 0.9, 1]),
            chance.choice([16, 512]),
        )
        first = chance.randrange(count)
        yield {
            "windows": [window if chance.random() < share else None for _ in range(count)],
            "heads": chance.choice([1, 2, 8]),
            "block_size": chance.choice([16, 128]),
            "context_length": chance.choice([100, 4096, 8192]),
            "tokens_in_flight": chance.choice([256, 2048, 8192]),
            "stage": [first, chance.randrange(first, count)],
        }


def counted(case):
    layers = [LayerCache(token_bytes=2 * case["heads"] * 64 * 2, window=window) for window in case["windows"]]
    asked = {key: case[key] for key in ("context_length", "block_size", "tokens_in_flight")}
    return {
        "groups": sorted(map(list, groups_of(layers))),
        "page": page_bytes(layers, *case["stage"], case["block_size"]),
        "blocks": blocks_per_request(layers, **asked),
    }


def test_cache_sizes_are_those_of_vllms_own_functions(request):
    python, asked = Path(request.config.getoption("--engines")).absolute(), list(cases())
    done = subprocess.run([python, PROGRAM], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    for case, answer in zip(asked, answers["cases"], strict=True):
        assert counted(case) == answer, case
    assert frozenset(answers["models"]) == architectures()
