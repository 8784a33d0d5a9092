"""Attaches an adapter to a loaded model with PEFT, and puts its tensors on the planned devices."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from devmap_config.graph.adapter import AdapterError, changes_of, saved_modules, stored_names
from devmap_config.graph.checkpoint import ADAPTER_FILE
from devmap_config.graph.model import LORA, SAVED, TensorName
from devmap_config.graph.source import ModelNotFoundError, hub_file
from devmap_config.libraries.accelerate import hooks_of
from devmap_config.libraries.torch import own_parameters
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.graph.adapter import LoraAdapter
    from devmap_config.graph.model import ModelGraph
    from devmap_config.plan.plan import Plan

NAME = "default"
"""PEFT's name for an adapter without one of its own."""

SPREAD = 0.02
"""The standard deviation of an adapter's random weights."""

IN_PEFT = {
    "lora_A": (f"lora_A.{NAME}", "weight"),
    "lora_B": (f"lora_B.{NAME}", "weight"),
    "lora_B_bias": (f"lora_B.{NAME}", "bias"),
    "lora_embedding_A": ("lora_embedding_A", NAME),
    "lora_embedding_B": ("lora_embedding_B", NAME),
    "lora_magnitude_vector": (f"lora_magnitude_vector.{NAME}", "weight"),
}
"""The submodule of an adapted module in which PEFT holds a tensor, and its name there."""


def require_peft() -> Any:
    """Return PEFT.

    Raises:
        RunnerError: if it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError:
        help = "run `pip install 'devmap-config[adapters]'`, or `pip install peft`"
        raise RunnerError("peft-missing", "loading an adapter needs peft, which is not installed", help) from None
    return peft


def stored_adapter(adapter: LoraAdapter, graph: ModelGraph) -> dict[str, str]:
    """Return the names of an adapter's tensors in its file, by their names in the graph; the file is fetched if needed.

    Raises:
        RunnerError: if there is no file, or it lacks tensors that the adapter's config implies.
    """
    try:
        if adapter.repository is not None:
            hub_file(adapter.repository[0], ADAPTER_FILE, adapter.repository[1])
        return stored_names(adapter, graph, must_be_there=True)
    except (AdapterError, ModelNotFoundError) as error:
        raise RunnerError("bad-adapter", str(error), error.help) from error


def attach(
    model: PreTrainedModel, plan: Plan, graph: ModelGraph, adapter: LoraAdapter, stored: Mapping[str, str] | None
) -> Any:
    """Return PEFT's model around a loaded model, with the adapter on the planned devices.

    PEFT's own `from_pretrained` would remove the hooks of an offloaded model, and place it anew. So PEFT only creates
    its modules, without weights, and these are set here.

    Args:
        model: the loaded model, whose modules are replaced by PEFT's.
        plan: the location of every tensor.
        graph: the graph of the model, including the adapter's tensors.
        adapter: the adapter.
        stored: the names of its tensors in its file; with `None`, its weights are random.

    Raises:
        RunnerError: if PEFT is missing, or adds other tensors than planned.
    """
    import torch

    peft = require_peft()
    before = list(model.parameters())
    config = _config(model, adapter, peft)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT reads this attribute
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    names = tuple(map(TensorName, graph.adapter_tensors if stored is None else stored))
    read, added = _reader(adapter, stored), frozenset(graph.adapter_tensors)
    for name in names:
        tensor = graph.tensors[name]
        module, own = _place_of(model, name)
        home = plan.executor.residence(tensor, plan.locations[name]) if name in added else None
        device = torch.device(str(home)) if home is not None else getattr(module, own).device
        value = read(name, tensor.shape).to(device=device, dtype=getattr(torch, tensor.dtype))
        own_parameters(module)[own] = torch.nn.Parameter(value, requires_grad=False)
    _require_no_more(model, before, len(names))
    _bring_to_modules(model, plan, graph)
    adapted.eval()
    return adapted


def _config(model: PreTrainedModel, adapter: LoraAdapter, peft: Any) -> Any:
    """Return the adapter's config, with names of modules in place of expressions, which PEFT would match without a
    time limit.
    """
    from re import escape

    from devmap_config.graph.adapted import all_linear

    config = adapter.config
    paths = [path for path, _ in model.named_modules()]
    changes = changes_of(config, paths, all_linear(model, config))
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(changes),
        rank_pattern={escape(path): update.rank for path, update in changes.items() if update.rank != config.rank},
        alpha_pattern={escape(path): update.alpha for path, update in changes.items() if update.alpha != config.alpha},
        modules_to_save=list(saved_modules(config, paths)) or None,
        use_dora=config.uses_dora,
        use_rslora=config.is_rank_stabilized,
        lora_bias=config.has_lora_bias,
        bias=config.bias,
        task_type=config.task,
        inference_mode=True,
    )


def _reader(adapter: LoraAdapter, stored: Mapping[str, str] | None) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Return a function that returns the values of a tensor, by its name in the graph and its shape."""
    import torch
    from safetensors.torch import load_file

    if stored is None:
        generator = torch.Generator().manual_seed(0)
        return lambda _name, shape: torch.randn(shape, generator=generator).mul_(SPREAD)
    tensors = load_file(adapter.folder / ADAPTER_FILE)  # maps the file
    return lambda name, _shape: tensors[stored[name]]


def _place_of(model: PreTrainedModel, name: str) -> tuple[torch.nn.Module, str]:
    """Return PEFT's module that holds a tensor, and its name there."""
    path, _, own = name.rpartition(".")
    module: torch.nn.Module = model
    for segment in path.split("."):
        module = module.get_submodule(segment)
        if own.startswith(SAVED) and "modules_to_save" in dict(module.named_children()):
            module = module.get_submodule(f"modules_to_save.{NAME}")
    if own in LORA:
        part, own = IN_PEFT[own]
        return module.get_submodule(part), own
    if not own.startswith(SAVED) and "base_layer" in dict(module.named_children()):
        module = module.get_submodule("base_layer")
    return module, own.removeprefix(SAVED)


def _require_no_more(model: PreTrainedModel, before: list[torch.nn.Parameter], count: int) -> None:
    known = set(map(id, before))
    added = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    if len(added) != count:
        raise RunnerError(
            "misplaced-tensors",
            f"PEFT adds {len(added):,} tensors to the model, and {count:,} are planned: {', '.join(added[:3])}",
            "this version of PEFT may read the adapter's config in another way: please report it",
        )


def _bring_to_modules(model: PreTrainedModel, plan: Plan, graph: ModelGraph) -> None:
    """Have the inputs of an adapted module that is placed by itself copied to its device, like those of the original
    module.
    """
    import torch
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    runs_on = {assignment.unit: assignment.location.runs_on for assignment in plan.assignments}
    for path in [module.path for module in graph.adapted_modules if module.path in runs_on]:
        module = model.get_submodule(path)
        if "base_layer" in dict(module.named_children()) and hooks_of(module.get_submodule("base_layer")):
            is_brought_back = path in plan.computed_on_cpu
            device = torch.device(str(runs_on[path]))
            add_hook_to_module(module, AlignDevicesHook(device, io_same_device=is_brought_back))
