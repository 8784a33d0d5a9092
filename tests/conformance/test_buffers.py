"""An `Executor` states the same locations and copies of tensors as accelerate's own hooks have.

The CPU stands in for a card: modules that a map has on a `torch.device` stay there and compute, while the strings `cpu`
and `disk` mean streaming. So tensors on the meta device are streamed, and all others are where modules run.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import big_modeling, dispatch_model

from devmap_config.devices import CPU, DISK, Device
from devmap_config.execution.assignment import Assignment, Location
from devmap_config.execution.executor import LEFT, OFFLOADED, Executor
from devmap_config.graph.model import ModelGraph, Module, ModulePath, Tensor, TensorName
from devmap_config.plan.plan import Plan
from devmap_config.runner.inspection import misplaced_tensors

CARD = torch.device("cpu")
FIRST_CARD = Device("cuda", 0)

KINDS = {
    "weight": {"kind": "parameter"},
    "packed": {"kind": "parameter", "in_buffer": True},  # of a quantizer: a weight, and to accelerate a buffer
    "state": {"kind": "buffer"},
    "table": {"kind": "buffer", "persistent": False},
}
"""How a graph describes the tensors of `Layer`."""

STORES = {"kept": FIRST_CARD, "in_ram": CPU, "on_disk": DISK}


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
def test_executor_states_where_accelerate_leaves_tensors(offload_buffers, tmp_path):
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
        is_elsewhere = executor.residence(tensor, Location(STORES[store], FIRST_CARD)) != FIRST_CARD
        assert is_elsewhere == (found.device.type == "meta"), (store, name)
        assert executor.is_copied_in(tensor, Location(STORES[store], FIRST_CARD)) == is_elsewhere
    total = model(torch.zeros(1)).item()
    assert total == 3 * 17  # what was elsewhere was copied in
    for store, name in itertools.product(STORES, KINDS):
        layer = model.get_submodule(store)
        assert layer.seen[name] == "cpu"
        is_elsewhere = store != "kept" and (name == "weight" or (offload_buffers and name != "table"))
        assert (getattr(layer, name).device.type == "meta") == is_elsewhere  # and let go again


@pytest.mark.parametrize("card", ["mps", 0])
def test_streamed_tensors_are_those_that_accelerate_offloads(card, monkeypatch):
    """Beside Apple's GPU accelerate offloads nothing to the CPU: it places everything where it runs."""
    told = {}
    monkeypatch.setattr(big_modeling, "attach_align_device_hook_on_blocks", lambda _, **options: told.update(options))
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("first", "second")})
    dispatch_model(model, {"first": card, "second": "cpu"}, main_device=card)
    executor, runs_on = Executor(), {"mps": Device("mps"), 0: FIRST_CARD}[card]
    weight = Tensor(TensorName("second.weight"), (2, 2), "float32", 16, 16)
    assert told["execution_device"]["second"] == card
    assert told["offload"] == {"first": False, "second": executor.streams(Location(CPU, runs_on))}
    assert executor.residence(weight, Location(CPU, runs_on)) == (CPU if told["offload"]["second"] else runs_on)


class Packed(torch.nn.Module):
    """A linear module as gptqmodel's torch kernels hold it: all in buffers, some of which no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.ones(4, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("shifts", torch.arange(8), persistent=False)

    def forward(self, values):
        return values + self.qweight.sum() + self.scales.sum() + self.shifts.sum()


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("planned", [LEFT, OFFLOADED])
def test_a_quantised_module_is_where_the_plan_has_it_only_if_its_buffers_are_moved(offloads, planned, tmp_path):
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "packed": Packed()})
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    dispatch_model(model, {"first": "cpu", "packed": "disk"}, offload_dir=tmp_path, offload_buffers=offloads)
    first = tuple(Tensor(TensorName(name), tuple(held.shape), "float32", 4, 4) for name, held in weights.items())
    packed = Tensor(TensorName("packed.weight"), (4, 8), "int32", 24, 24, in_buffer=True)
    children = (
        Module(ModulePath("first"), "Linear", first),
        Module(ModulePath("packed"), "Linear", (packed,)),
    )
    graph = ModelGraph(Module(ModulePath(""), "Model", children=children))
    assignments = (
        Assignment("first", tuple(each.name for each in first), Location(CPU, CPU)),
        Assignment("packed", (packed.name,), Location(DISK, CPU)),
    )
    plan = Plan(strategy="manual", executor=planned, main_device=CPU, assignments=assignments, devices=())
    found = {
        each.tensor: (each.planned, each.found) for each in misplaced_tensors(model, plan, graph, is_quantized=True)
    }
    homes = {True: "disk", False: "cpu"}
    differing = (homes[planned.offload_buffers], homes[offloads])
    expected = dict.fromkeys(["packed.qweight", "packed.scales"], differing) if len(set(differing)) == 2 else {}
    assert found == expected
