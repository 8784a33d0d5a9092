"""Proves that a loaded model sits where its plan says, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Misplaced:
    """A tensor that is not where the plan says. `found` is `missing` where the model has no such tensor."""

    tensor: str
    planned: str
    found: str


def misplaced_tensors(model: PreTrainedModel, plan: Plan, graph: ModelGraph) -> tuple[Misplaced, ...]:
    """Every parameter and buffer, of the plan or of the model, that the two do not agree on."""
    wrong: list[Misplaced] = []
    planned: set[str] = set()
    for each in plan.assignments:
        for name in each.tensors:
            planned.add(name)
            expected = plan.executor.residence(graph.tensors[name], each.stored_on, each.executes_on)
            found = tensor_home(model, name)
            if found != expected:
                wrong.append(Misplaced(name, expected, found))
    unplanned = [name for name in _names_of(model) if name not in planned]
    return (*wrong, *(Misplaced(name, "nowhere", tensor_home(model, name)) for name in unplanned))


def tensor_home(model: PreTrainedModel, name: str) -> str:
    """Where a tensor of a loaded model is: a device, or where accelerate streams it from (`cpu` or `disk`)."""
    parent_path, _, attribute = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        tensor: torch.Tensor | None = getattr(parent, attribute)
    except AttributeError:
        tensor = None
    if tensor is None:
        return "missing"
    if tensor.device.type != "meta":
        return _canonical(tensor.device)
    return _streamed_from(model, name)


def _streamed_from(model: PreTrainedModel, name: str) -> str:
    """The place behind accelerate's hook for a tensor that it offloaded."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        for hook in _hooks(model.get_submodule(path)):
            weights = getattr(hook, "weights_map", None)
            if weights is None or not getattr(hook, "offload", False):
                continue
            loader = getattr(weights, "dataset", weights)
            full_name = getattr(weights, "prefix", "") + name.removeprefix(f"{path}." if path else "")
            if full_name in (getattr(loader, "state_dict", None) or {}):
                return "cpu"
            if full_name in (getattr(loader, "index", None) or {}):
                return "disk"
    return "meta"


def _hooks(module: torch.nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return ()
    return tuple(getattr(hook, "hooks", (hook,)))


def _names_of(model: PreTrainedModel) -> list[str]:
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    return parameters + buffers


def _canonical(device: torch.device) -> str:
    kind = str(device.type)
    if kind in ("cpu", "mps"):
        return kind
    return f"{kind}:{device.index or 0}"
