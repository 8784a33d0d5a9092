"""Selects the modules that decode on the CPU but prefill faster on an accelerator, and from how many tokens on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import CPU
from devmap_config.execution.segments import Copy, MachineRates, MissingFigureError, ModuleWork

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.graph.costs import ModuleCost
    from devmap_config.graph.model import ModelGraph, Module
    from devmap_config.hardware.inventory import Inventory


def prefilled_from(graph: ModelGraph, inventory: Inventory) -> dict[str, int]:
    """Return, by module, the number of tokens from which the CPU is slower than copying the weights to an accelerator.

    Only modules that hold all their weights themselves, as fused experts do, and no cache are considered, and only if a
    prompt of the planned length is long enough. If a rate of the machine is unknown, there are none.
    """
    measurement = graph.measurement
    if measurement is None or not measurement.measured or not inventory.accelerators:
        return {}
    rates, card = MachineRates(inventory, "prefill"), inventory.accelerators[0].id
    prompt_tokens = measurement.workload.batch_size * measurement.workload.prompt_length
    least_tokens = {}
    for module in graph.modules.values():
        cost = measurement.by_path.get(module.path)
        if cost is not None and _is_apart(module, cost):
            try:
                tokens = _tokens(module, cost, rates, card, prompt_tokens)
            except MissingFigureError:
                return {}
            if tokens is not None and tokens <= prompt_tokens:
                least_tokens[str(module.path)] = tokens
    return least_tokens


def _is_apart(module: Module, cost: ModuleCost) -> bool:
    own = module.own_tensors
    is_whole = bool(own) and len(own) == len(list(module.tensors()))
    return is_whole and all(tensor.kind == "parameter" for tensor in own) and not cost.cache_bytes


def _tokens(module: Module, cost: ModuleCost, rates: MachineRates, card: Device, prompt_tokens: int) -> int | None:
    """Return the number of tokens for which the CPU takes as long as copying the weights and the outputs; `None` if
    never.
    """
    computing = rates.step_nanoseconds(ModuleWork(0, cost.prefill_operations), CPU)
    size_bytes = sum(tensor.size_bytes for tensor in module.own_tensors)
    copying = rates.copy_nanoseconds(Copy(CPU, card, size_bytes, is_pinned=True))
    return -(-copying * prompt_tokens // computing) if computing else None
