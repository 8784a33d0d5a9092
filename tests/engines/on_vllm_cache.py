"""A script for a Python with vLLM: its groups of layers, pages, blocks of a request, and names of models."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec


def counted(case):
    """Return groups by layer numbers, the bytes of a block on a stage, and the blocks of a request."""
    common = {"block_size": case["block_size"], "num_kv_heads": case["heads"], "head_size": 64, "dtype": torch.bfloat16}
    specs = {
        str(number): FullAttentionSpec(**common)
        if window is None
        else SlidingWindowSpec(sliding_window=window, **common)
        for number, window in enumerate(case["windows"])
    }
    if kv_cache_utils.is_kv_cache_spec_uniform(specs):
        groups = kv_cache_utils._get_kv_cache_groups_uniform_spec(specs)
    else:
        groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=case["context_length"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=case["tokens_in_flight"],
    )
    blocks = (-(-each.kv_cache_spec.max_memory_usage_bytes(config) // page(each)) for each in groups)
    first, last = case["stage"]
    here = (sum(page(each) for name in each.layer_names if first <= int(name) <= last) for each in groups)
    return {
        "groups": sorted(sorted(map(int, each.layer_names)) for each in groups),
        "page": max(here),
        "blocks": sum(blocks),
    }


def page(group):
    return group.kv_cache_spec.page_size_bytes


cases = json.load(sys.stdin)
print(json.dumps({"cases": list(map(counted, cases)), "models": sorted(_TEXT_GENERATION_MODELS)}))
