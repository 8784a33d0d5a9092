"""Predicts the peak of loading beyond the weights, from the tensors that transformers' loader keeps alive at once.

The loader maps the files of a checkpoint (safetensors) and takes one tensor after another from them. On the CPU, a
tensor of the right dtype stays mapped; others are allocated: cast, merged from the tensors of experts, or quantised.
For other devices, a cast is done on the CPU, and the result is copied. Without a disk in the plan and without
quantising, threads load tensors ahead; otherwise tensors are loaded one by one, and each stays alive until the next is
done.

The pages of mapped files are not counted, because the system reclaims them when it needs memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.graph.model import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.devices import Device
    from devmap_config.execution.assignment import Assignment
    from devmap_config.graph.model import LoadingFacts, ModelGraph, Tensor

THREADS = 4
"""The number of tensors that transformers loads at once (`GLOBAL_WORKERS`)."""


def loading_extra_bytes(graph: ModelGraph, assignments: Iterable[Assignment]) -> dict[Device, int]:
    """Return the most bytes that each device holds while loading, beyond the weights that stay there."""
    facts = graph.loading
    if facts is None:
        return {}
    placed = [
        (graph.tensors[name], assignment.location.stored_on)
        for assignment in assignments
        for name in assignment.tensors
        if graph.storage_of[name] == name and graph.tensors[name].persistent
    ]
    one_by_one = facts.quantises or any(device == DISK for _, device in placed)
    extra_bytes = {CPU: _on_cpu(placed, facts, one_by_one=one_by_one)}
    for tensor, device in placed:
        if device.is_accelerator:
            extra_bytes[device] = max(extra_bytes.get(device, 0), _made_bytes(tensor, facts))
    return extra_bytes


def _made_bytes(tensor: Tensor, facts: LoadingFacts) -> int:
    """Return the bytes that are alive while a tensor is made, besides the tensor: its parts, if merged, or its dense
    values.
    """
    if tensor.name in facts.merged:
        return tensor.size_bytes
    return _quantising_bytes(tensor, facts) - tensor.size_bytes if is_quantised(tensor, facts) else 0


def _on_cpu(placed: list[tuple[Tensor, Device]], facts: LoadingFacts, *, one_by_one: bool) -> int:
    here = [(tensor, device) for tensor, device in placed if not device.is_accelerator]
    cast_for_others = sorted(
        (_part_bytes(tensor, facts) for tensor, device in placed if device.is_accelerator and is_cast(tensor, facts)),
        reverse=True,
    )
    passing = sum(cast_for_others[: 1 if one_by_one else THREADS])
    if not one_by_one:
        merged = [tensor for tensor, _ in here if tensor.name in facts.merged]
        # Parts that are cast are small allocations, which the allocator keeps after they have been merged.
        cast_bytes = sum(tensor.size_bytes for tensor in merged if is_cast(tensor, facts))
        return passing + cast_bytes + max((tensor.size_bytes for tensor in merged), default=0)
    alive, last = [0], [0]
    for tensor, device in here:
        is_merged = tensor.name in facts.merged
        if is_quantised(tensor, facts):
            source_bytes = _dense_bytes(tensor, facts) if facts.dtype == facts.stored_dtype else 0  # pages of a file
            made_bytes = max(_quantising_bytes(tensor, facts) - source_bytes, tensor.size_bytes)
        else:
            made_bytes = tensor.size_bytes * (2 * is_merged + is_cast(tensor, facts))
        alive.append(made_bytes - tensor.size_bytes if device == CPU and made_bytes else made_bytes)
        if device == DISK and made_bytes:
            last.append(tensor.size_bytes)
    return passing + max(alive) + max(last)


def is_quantised(tensor: Tensor, facts: LoadingFacts) -> bool:
    """Return whether a tensor is quantised while it is loaded."""
    return facts.quantises and tensor.size_bytes < _dense_bytes(tensor, facts)


def _quantising_bytes(tensor: Tensor, facts: LoadingFacts) -> int:
    """Return the most bytes that are alive while a tensor is quantised, including the tensor."""
    known_bytes = tensor.element_count * facts.quantising_item_bytes
    return max(known_bytes, _dense_bytes(tensor, facts) + tensor.size_bytes)


def _dense_bytes(tensor: Tensor, facts: LoadingFacts) -> int:
    return tensor.element_count * ITEM_BYTES.get(facts.dtype, 4)


def is_cast(tensor: Tensor, facts: LoadingFacts) -> bool:
    """Return whether a tensor is loaded in another dtype than it is stored in."""
    return facts.stored_dtype in ITEM_BYTES and tensor.dtype in ITEM_BYTES and tensor.dtype != facts.stored_dtype


def _part_bytes(tensor: Tensor, facts: LoadingFacts) -> int:
    """Return the bytes that are read from the checkpoint at once for a tensor; for a merged one, those of one
    expert.
    """
    return tensor.size_bytes // max(tensor.shape[0], 1) if tensor.name in facts.merged else tensor.size_bytes
