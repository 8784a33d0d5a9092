"""Holds where an `Executor` says that tensors are, and what is copied, to what accelerate's own hooks do.

The CPU stands in for a card: what a map has on a `torch.device` stays there and computes, while the strings `cpu` and
`disk` mean streaming. So what is on the meta device is streamed, and all else is where modules run.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import dispatch_model

from devmap_config.graph.model import Tensor, TensorName
from devmap_config.placement.executor import Executor

CARD = torch.device("cpu")

KINDS = {
    "weight": {"kind": "parameter"},
    "packed": {"kind": "parameter", "in_buffer": True},  # of a quantizer: a weight, and to accelerate a buffer
    "state": {"kind": "buffer"},
    "table": {"kind": "buffer", "persistent": False},
}
"""How a graph describes the tensors of `Layer`."""

STORES = {"kept": "cuda:0", "in_ram": "cpu", "on_disk": "disk"}


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("packed", torch.ones(8))
        self.register_buffer("state", torch.ones(2))
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.seen = {}

    def forward(self, values):
        self.seen = {name: getattr(self, name).device.type for name in KINDS}
        return values + self.weight.sum() + self.packed.sum() + self.state.sum() + self.table.sum()


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept, self.in_ram, self.on_disk = Layer(), Layer(), Layer()

    def forward(self, values):
        return self.on_disk(self.in_ram(self.kept(values)))


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_tensors_are_where_accelerate_leaves_them(offload_buffers, tmp_path):
    model = dispatch_model(
        Blocks(),
        {"kept": CARD, "in_ram": "cpu", "on_disk": "disk"},
        offload_dir=tmp_path,
        offload_buffers=offload_buffers,
    )
    executor = Executor(offload_buffers=offload_buffers)
    for store, name in itertools.product(STORES, KINDS):
        tensor = Tensor(TensorName(name), (1,), "float32", 4, 4, **KINDS[name])
        found = getattr(model.get_submodule(store), name)
        is_elsewhere = executor.residence(tensor, STORES[store], "cuda:0") != "cuda:0"
        assert is_elsewhere == (found.device.type == "meta"), (store, name)
        assert executor.is_copied_in(tensor, STORES[store], "cuda:0") == is_elsewhere
    total = model(torch.zeros(1)).item()
    assert total == 3 * 17  # what was elsewhere was copied in
    for store, name in itertools.product(STORES, KINDS):
        layer = model.get_submodule(store)
        assert layer.seen[name] == "cpu"
        is_elsewhere = store != "kept" and (name == "weight" or (offload_buffers and name != "table"))
        assert (getattr(layer, name).device.type == "meta") == is_elsewhere  # and let go again
