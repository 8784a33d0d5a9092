"""Makes a receipt of a run: the plan's predictions beside the measurements."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from devmap_config.devices import CPU
from devmap_config.files import write_atomically
from devmap_config.libraries.versions import TRIED, installed
from devmap_config.plan.plan import OWN
from devmap_config.plan.prediction import amounts
from devmap_config.runner.receipts import RECEIPT_VERSION
from devmap_config.runner.usage import peaks, weights_by_device
from devmap_config.wording import json_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from devmap_config.plan.plan import Plan
    from devmap_config.runner.generation_times import GenerationTimes
    from devmap_config.runner.runner import Deployment
    from devmap_config.runner.usage import LoadCost, ProcessUse


def receipt_of(
    deployment: Deployment,
    model: PreTrainedModel,
    load: LoadCost,
    generation: GenerationTimes | None,
    process: ProcessUse,
    *,
    command: str,
) -> dict[str, Any]:
    """Return a receipt of one case: the predictions for a deployment, and the measurements of this process.

    Args:
        deployment: the locked plan.
        model: its model, the only one that was loaded in this process.
        load: the cost of loading.
        generation: the times of generating; `None` if nothing was generated.
        process: the memory of the process meanwhile.
        command: the command that makes such a receipt.
    """
    plan, compiled = deployment.plan, deployment.compiled
    inventory, workload = compiled.inventory, compiled.loaded.profile.workload
    predicted = compiled.to_json()
    memory = compiled.process_memory
    return {
        "receipt_version": RECEIPT_VERSION,
        "command": command,
        "model": compiled.loaded.profile.model.source.value,
        "weights": "random" if deployment.has_random_weights else "checkpoint",
        "weights_bytes": compiled.model.graph.size_bytes,
        "dtype": compiled.model.dtype,
        "devices": _names_of_cards(plan),
        "machine": _machine(),
        "versions": {name: installed(name) for name in ("devmap-config", *TRIED)},
        "inventory": {**inventory.to_json(), "dispatch_nanoseconds": inventory.dispatch_nanoseconds},
        "cases": [
            {
                "case": compiled.loaded.path.stem,
                "by": "devmap run",
                "executor": plan.executor.name,
                "batch_size": workload.batch_size,
                "context_length": workload.context_length.value,
                "inputs": workload.inputs.model_dump(exclude_none=True, exclude_defaults=True),
                "load_seconds": load.seconds,
                "predicted": {
                    **{name: predicted[name] for name in ("devices", "loading_ram_bytes", "prediction", "basis")},
                    "process_memory": None if memory is None or generation is None else asdict(memory),
                },
                "compute": predicted["compute"],
                "compiled": deployment.compiles,
                "forward": {
                    phase: amounts(plan, compiled.model.graph, inventory, phase)
                    for phase, name in OWN.items()
                    if predicted["prediction"][name] is not None
                },
                "seen": _seen(deployment, model, load, generation, process),
                "generation": None if generation is None else generation.to_json(),
            }
        ],
    }


def _seen(
    deployment: Deployment,
    model: PreTrainedModel,
    load: LoadCost,
    generation: GenerationTimes | None,
    process: ProcessUse,
) -> dict[str, dict[str, int]]:
    """Return the bytes that were held on each device; on the CPU, by this process."""
    plan = deployment.plan
    weights = weights_by_device(model, plan, deployment.compiled.model.graph)
    cache = {} if generation is None else generation.kv_cache_bytes
    peak_bytes = peaks(plan)
    seen: dict[str, dict[str, int]] = {}
    for device in (use.id for use in plan.devices):
        figures = {
            "weights_bytes": weights.get(device, 0),
            "kv_cache_bytes": None if generation is None else cache.get(device, 0),
            "process_bytes": load.process_bytes if device == CPU else None,
            "loading_peak_bytes": load.peak_bytes.get(device),
            "peak_bytes": peak_bytes.get(device),
            "anonymous_bytes": process.anonymous_bytes or None if device == CPU else None,
            "file_bytes": process.file_bytes or None if device == CPU else None,
            "library_file_bytes": process.library_file_bytes or None if device == CPU else None,
        }
        seen[str(device)] = {name: size_bytes for name, size_bytes in figures.items() if size_bytes is not None}
    return seen


def _names_of_cards(plan: Plan) -> dict[str, str]:
    import torch

    used = sorted(
        {assignment.location.runs_on for assignment in plan.assignments if assignment.location.runs_on.is_accelerator}
    )
    name_of = {device: getattr(getattr(torch, device.kind, None), "get_device_name", None) for device in used}
    return {str(device): device.kind if name is None else name(device.index) for device, name in name_of.items()}


def _machine() -> dict[str, Any]:
    import platform

    import torch

    from devmap_config.probe.host import seen_host

    host = seen_host()
    return {
        "processor": host.name,
        "threads": torch.get_num_threads(),
        "memory_bytes": host.memory_bytes,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def write_receipt(path: Path, receipt: Mapping[str, Any]) -> None:
    """Write a receipt atomically, with fractions rounded to four digits, which is about their accuracy.

    Raises:
        OSError: if it cannot be written.
    """
    write_atomically(path, json_text(_rounded(receipt)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
