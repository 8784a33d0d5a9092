"""The memory of running by device, and the longest context that fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from devmap_config.devices import CPU
from devmap_config.execution.running import Running, longest_context
from devmap_config.graph.costs import ModuleCost

LENGTH = 50


def running(*costs, streaming_bytes=0):
    return Running(
        workload=SimpleNamespace(at=lambda context_length: SimpleNamespace(context_length=context_length)),
        holding={CPU: dict.fromkeys(costs, 2)} if costs else {},
        peaking={},
        own={},
        streaming={CPU: streaming_bytes},
        most_tokens=LENGTH,
    )


def test_retained_bytes_are_added_to_the_largest_peak():
    cost = running(ModuleCost(path="x", cache_bytes=3, retained_bytes=5), streaming_bytes=7).costs()[CPU]
    assert (cost.kv_cache_bytes, cost.activation_bytes, cost.streaming_bytes, cost.total_bytes) == (6, 10, 7, 23)


@pytest.mark.parametrize(("room_bytes", "tokens"), [(10, LENGTH), (9, 0)])
def test_streaming_buffers_count_to_the_byte_for_the_longest_context(room_bytes, tokens):
    assert longest_context(running(streaming_bytes=10), {CPU: room_bytes}) == tokens
