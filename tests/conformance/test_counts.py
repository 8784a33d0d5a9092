"""Operations counted for a decoded token without data are those that torch's profiler records of a real one."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import transformers
from kinds import MODELS, config_of
from torch.profiler import ProfilerActivity, profile

from devmap_config.graph import recording
from devmap_config.graph.costs import WorkloadShape
from devmap_config.graph.forwards import Forwards
from devmap_config.graph.introspection import build_meta_model, graph_of
from devmap_config.graph.measurement import measure
from devmap_config.libraries.torch import operation_name

LENGTH = 24
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
FLOAT_BYTES = 4
WITH_EXPERTS = ("latent attention", "experts", "many experts")


def workload(batch_size):
    return WorkloadShape(batch_size=batch_size, context_length=LENGTH, prompt_length=LENGTH)


def class_of(name):
    return getattr(transformers, MODELS[name][0])


def counted(name, batch_size):
    model = build_meta_model(class_of(name), config_of(name), torch.float32)
    return measure(model, graph_of(model, torch.float32), workload(batch_size)).modules


def profiled(name, batch_size):
    torch.manual_seed(0)
    forwards = Forwards(class_of(name)(config_of(name)).eval(), workload(batch_size))
    with torch.no_grad():
        inputs = forwards.decode_inputs(forwards.run(forwards.prefill_inputs(LENGTH)))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
            forwards.run(inputs)
    return profiler.events()


@cache
def is_composite(name):
    """Tell whether an operation consists only of others, each of which is dispatched by itself."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    known = [each for each in overloads if torch._C._dispatch_has_kernel(each.name())]
    return any(each.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd) for each in known)


def is_dispatched(event):
    return event.name.startswith("aten::") and not is_composite(event.name)


def outermost(events):
    """Return the operations that no other operation dispatched."""
    for event in filter(is_dispatched, events):
        around = event.cpu_parent
        while around is not None and not is_dispatched(around):
            around = around.cpu_parent
        if around is None:
            yield event


def operand_bytes(event):
    """Return the bytes of the matrices that a product multiplies."""
    matrices = [shape for shape in event.input_shapes if len(shape) > 1]
    return FLOAT_BYTES * sum(map(math.prod, matrices))


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.zoo), 8])
@pytest.mark.parametrize("name", MODELS)
def test_counted_operations_of_a_token_are_those_of_the_profiler(name, batch_size, monkeypatch):
    touched_bytes = recording._touched_bytes

    def of_products(function, inputs, outputs):
        return touched_bytes(function, inputs, []) if operation_name(function) in PRODUCTS else 0

    monkeypatch.setattr(recording, "_touched_bytes", of_products)
    monkeypatch.setattr(recording.Meter, "add", lambda *_attention: None)  # the profiler tells no operations of it
    costs, events = counted(name, batch_size), profiled(name, batch_size)
    products = [event for event in events if event.name in PRODUCTS]

    assert sum(cost.decode_operations for cost in costs) == pytest.approx(
        sum(event.flops for event in products), rel=0.02
    )
    multiplied_bytes = sum(map(operand_bytes, products))
    if name in WITH_EXPERTS:  # of which the profiler sees all, and a token those that it is sent to
        assert sum(cost.decode_touched_bytes for cost in costs) < multiplied_bytes
    else:
        assert sum(cost.decode_touched_bytes for cost in costs) == pytest.approx(multiplied_bytes, rel=0.01)
    # Some kernels of the CPU ask for a view more or less.
    assert sum(cost.decode_dispatches for cost in costs) == pytest.approx(len(list(outermost(events))), rel=0.05)
