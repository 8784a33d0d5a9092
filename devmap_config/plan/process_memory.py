"""Predicts the memory that the system shows for a process that runs a plan on the CPU.

It is more than the tensors. Python and the libraries take memory before a model is loaded. Weights that are loaded as
they are in the checkpoint are pages of its files, which the system can reclaim. The allocator keeps some freed memory.
torch does not repack weights: oneDNN multiplies them as they are, even in bfloat16, and keeps only the code that it
generates for each shape.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.execution.loading import is_cast, is_quantised
from devmap_config.graph.model import ITEM_BYTES
from devmap_config.hardware.constants import (
    HELD_SHARE,
    HELD_SHARE_END_BYTES,
    LIBRARY_FILE_BYTES,
    PROCESS_ANONYMOUS_BYTES,
    PROGRAM_BYTES,
    PROGRAM_SHAPES_MOST,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import LoadingFacts, ModelGraph, Tensor
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """The bytes of a process: anonymous memory and pages of files while the model runs, and the peak of both.

    Anonymous memory must be available; the system reclaims pages of files if memory is short, and reads them again.
    `file_bytes` are those of the model's files, `library_file_bytes` those of the libraries, which processes share. The
    peak may occur while loading, when the files that tensors are made from are mapped.

    A plan fits if its tensors do. While it runs, `uncounted_bytes` are held in addition, and the CPU lacks
    `missing_bytes` for everything.
    """

    anonymous_bytes: int
    file_bytes: int
    library_file_bytes: int
    peak_bytes: int
    uncounted_bytes: int
    missing_bytes: int


def process_memory(plan: Plan, graph: ModelGraph, inventory: Inventory) -> ProcessMemory | None:
    """Return the memory of the process that runs a plan; `None` if it needs accelerators, or the memory is unknown.

    Args:
        plan: the plan.
        graph: its model, measured.
        inventory: its machine.
    """
    facts, measurement = graph.loading, graph.measurement
    cpu = next((use for use in plan.devices if use.id == CPU), None)
    if facts is None or measurement is None or cpu is None or plan.pipeline is not None:
        return None
    if plan.draft is not None or graph.adapter_tensors:  # such processes were never measured
        return None
    if any(location.runs_on != CPU for location in plan.locations.values()):
        return None
    resident = [tensor for tensor, device in _stored(plan, graph) if device == CPU]
    # The executor that reads ahead copies resident weights, and releases the pages of their files.
    mapped = [] if plan.executor.works_ahead else [tensor for tensor in resident if _is_mapped(tensor, facts)]
    mapped_bytes = sum(tensor.size_bytes for tensor in mapped)
    read_bytes = sum(_source_bytes(tensor, facts) for tensor in resident if not _is_mapped(tensor, facts))
    own_bytes = cpu.weights_bytes - mapped_bytes
    working_bytes = cpu.kv_cache_bytes + cpu.activation_bytes
    held_bytes = int(min(working_bytes, HELD_SHARE_END_BYTES) * HELD_SHARE)
    anonymous_bytes = PROCESS_ANONYMOUS_BYTES + own_bytes + working_bytes + cpu.overhead_bytes + held_bytes
    anonymous_bytes += PROGRAM_BYTES * _program_shapes(graph, measurement)
    untouched_bytes = _untouched_bytes(mapped, graph, measurement)
    # The pages that experts were merged from stay mapped as long as another tensor of their file is.
    file_bytes = mapped_bytes - untouched_bytes + (read_bytes if mapped else 0)
    loading_bytes = PROCESS_ANONYMOUS_BYTES + LIBRARY_FILE_BYTES + own_bytes + read_bytes
    loading_bytes += cpu.loading_bytes - cpu.weights_bytes - _not_kept_bytes(resident, plan, facts)
    running_bytes = anonymous_bytes + file_bytes + LIBRARY_FILE_BYTES
    there_bytes = next(device.memory_bytes for device in inventory.devices if device.id == CPU)
    return ProcessMemory(
        anonymous_bytes=anonymous_bytes,
        file_bytes=file_bytes,
        library_file_bytes=LIBRARY_FILE_BYTES,
        peak_bytes=max(running_bytes, loading_bytes),
        uncounted_bytes=max(running_bytes - (cpu.capacity_bytes - cpu.free_bytes), 0),
        missing_bytes=max(running_bytes - there_bytes, 0),
    )


def _stored(plan: Plan, graph: ModelGraph) -> Iterable[tuple[Tensor, object]]:
    """Yield each tensor that occupies memory of its own, with the device that stores it."""
    for name, location in plan.locations.items():
        if graph.storage_of[name] == name:
            yield graph.tensors[name], location.stored_on


def _is_mapped(tensor: Tensor, facts: LoadingFacts) -> bool:
    """Return whether a tensor on the CPU consists of pages of the checkpoint, without a conversion."""
    is_made = tensor.name in facts.merged or is_cast(tensor, facts) or is_quantised(tensor, facts)
    return tensor.persistent and not is_made


def _source_bytes(tensor: Tensor, facts: LoadingFacts) -> int:
    """Return the bytes of the checkpoint that a tensor is made from."""
    if not tensor.persistent:
        return 0
    is_stored_so = not is_quantised(tensor, facts) and not is_cast(tensor, facts)
    item_bytes = ITEM_BYTES.get(facts.stored_dtype, 0)
    return tensor.size_bytes if is_stored_so else tensor.element_count * item_bytes


def _not_kept_bytes(resident: Iterable[Tensor], plan: Plan, facts: LoadingFacts) -> int:
    """Return the bytes that a plan reserves for cast parts of experts, but that the allocator was not observed to keep.

    It keeps half to two thirds of the parts, depending on the threads; with a disk, tensors are loaded one by one.
    """
    if facts.quantises or any(location.stored_on == DISK for location in plan.locations.values()):
        return 0
    return sum(tensor.size_bytes for tensor in resident if tensor.name in facts.merged and is_cast(tensor, facts)) // 3


def _untouched_bytes(mapped: Iterable[Tensor], graph: ModelGraph, measurement: Measurement) -> int:
    """Return the bytes of mapped embeddings that are never read: all except a row for each token."""
    workload = measurement.workload
    tokens, tied = workload.batch_size * workload.context_length, {source for _, source in graph.ties}
    untouched_bytes = 0
    for tensor in mapped:
        module = graph.modules[tensor.name.rpartition(".")[0]]  # type: ignore[index]
        if module.class_name.endswith("Embedding") and len(tensor.shape) == 2 and tensor.name not in tied:
            row_bytes = tensor.size_bytes // max(tensor.shape[0], 1)
            touched_bytes = tokens * -(-row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            untouched_bytes += max(tensor.size_bytes - touched_bytes, 0)
    return untouched_bytes


def _program_shapes(graph: ModelGraph, measurement: Measurement) -> int:
    """Return the number of shapes that oneDNN generates code for, because experts get varying numbers of tokens.

    Each expert of a layer gets the tokens that chose it. With an even router, their number is binomial, and about
    twelve standard deviations of values occur, for each of two products. Only half precision is computed by oneDNN.
    """
    merged = [graph.tensors[name] for name in graph.merged if len(graph.tensors[name].shape) > 2]
    if not merged or merged[0].dtype not in ("bfloat16", "float16"):
        return 0
    paths = {tensor.name.rpartition(".")[0]: 0 for tensor in merged}
    for tensor in merged:
        paths[tensor.name.rpartition(".")[0]] += tensor.element_count
    experts = merged[0].shape[0]
    operations = {cost.path: cost.prefill_operations for cost in measurement.modules}
    # There are two operations for each weight of an expert and each of its tokens.
    tokens = max((operations.get(path, 0) // (2 * max(elements, 1)) for path, elements in paths.items()), default=0)
    return min(2 * min(len(paths) * experts, 12 * isqrt(tokens)), PROGRAM_SHAPES_MOST)
