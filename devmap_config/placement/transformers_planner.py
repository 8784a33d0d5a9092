"""`auto`, `balanced`, `balanced_low_0` and `sequential`: the decisions of transformers' own planner.

The algorithm is that of `transformers.integrations.accelerate` (5.20 to 5.24): fill the devices in order with the
model's children; if a child does not fit, go one level down, unless it is a no-split block; then go on to the next
device, and never back. It is reimplemented here because theirs needs torch, loses buffers, crashes on some trees and
depends on the hash seed; `tests/conformance` compares the two for every architecture.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from devmap_config.devices import CPU, DISK
from devmap_config.graph.model import Module, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph, TensorName
    from devmap_config.placement.problem import Problem

TransformersStrategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]

OVERFLOW = DISK
"""The device to which their planner assigns what fits nowhere, even if the machine has none."""

BALANCE_BUFFER = 1.25
"""Their margin over the largest block, so that the last device is not left with more than its share."""

QUANTIZER_SHARE = 0.90
"""The share of every budget that several quantizers leave (`adjust_max_memory`); the rest is for buffers of
quantising.
"""


@dataclass(frozen=True)
class TransformersPlacement:
    """The device of every tensor that is not pinned; `is_mended` says that transformers' own map had to be
    corrected.
    """

    devices: Mapping[TensorName, Device]
    is_mended: bool = False


def plan_like_transformers(problem: Problem, strategy: TransformersStrategy) -> TransformersPlacement:
    """Return the device of every tensor that is not pinned, as transformers chooses it for the same budgets.

    What fits on no device is put on `disk`, even if the problem has none; the caller must check that. Tensors that
    transformers' map loses, or whose ties it splits, are placed with their siblings or ties.
    """
    remaining = _without(problem.graph.root, problem.pinned)
    if remaining is None:
        return TransformersPlacement({})
    sizes = _Sizes.of(problem.graph, remaining)
    used = problem.pinned_bytes
    budgets = {device: max(0, capacity - used.get(device, 0)) for device, capacity in problem.capacities.items()}
    if strategy != "sequential":
        budgets = _balanced(problem.graph, remaining, sizes, budgets, low_zero=strategy == "balanced_low_0")
    if problem.quantizer_lowers_budgets:
        budgets = {device: int(budget * QUANTIZER_SHARE) for device, budget in budgets.items()}
    filling = _Filling(problem, remaining, sizes, budgets)
    devices, is_completed = _complete(problem, remaining, filling.run())
    crashes = filling.crashes or (strategy != "sequential" and _lacks_named_blocks(problem.graph))
    return TransformersPlacement(devices, is_mended=is_completed or crashes)


def _lacks_named_blocks(graph: ModelGraph) -> bool:
    """Return whether a model names classes of blocks but has none of them; the planner then fails to find the
    largest.
    """
    named = set(graph.no_split_classes)
    return bool(named) and not any(module.class_name in named for module in graph.modules.values())


@dataclass(frozen=True)
class _Sizes:
    """The bytes of every module and tensor by path, as their planner counts them: tied targets and aliases have
    none.
    """

    by_path: Mapping[str, int]
    leaf_modules: Mapping[str, int]

    @staticmethod
    def of(graph: ModelGraph, root: Module) -> _Sizes:
        targets = {target for target, _ in graph.ties}
        by_path: defaultdict[str, int] = defaultdict(int)
        leaf_modules: defaultdict[str, int] = defaultdict(int)
        for tensor in root.tensors():
            if tensor.name in targets or tensor.alias_of is not None:
                continue
            parts = tensor.name.split(".")
            for length in range(len(parts) + 1):
                by_path[".".join(parts[:length])] += tensor.planner_bytes
            if len(parts) > 1:
                leaf_modules[".".join(parts[:-1])] += tensor.planner_bytes
        return _Sizes(by_path, leaf_modules)

    def __getitem__(self, path: str) -> int:
        return self.by_path.get(path, 0)


def _balanced(
    graph: ModelGraph, root: Module, sizes: _Sizes, budgets: Mapping[Device, int], *, low_zero: bool
) -> dict[Device, int]:
    """Return budgets lowered so that every accelerator except the last gets about its share (their
    `get_balanced_memory`).
    """
    balanced = dict(budgets)
    accelerators = [device for device in budgets if device.is_accelerator]
    usable = [device for device in accelerators if budgets[device] > 0]
    if not usable:
        return balanced
    low_zero = low_zero and len(usable) > 1
    # A model that names its own class counts as its largest block here, even though it is split.
    blocks = [sizes[module.path] for module in root.walk() if module.class_name in graph.no_split_classes]
    largest = max(max(blocks, default=0), max(sizes.leaf_modules.values(), default=0))
    share = sizes[""] // (len(usable) - 1 if low_zero else len(usable)) + int(BALANCE_BUFFER * largest)
    indexed = [device for device in usable if device.kind != "mps"]
    for device in indexed[:-1]:
        if not (low_zero and device == accelerators[0]):
            balanced[device] = min(share, budgets[device])
    if low_zero:
        others = sum(balanced[device] for device in accelerators[1 : len(usable)])
        first = accelerators[0]
        balanced[first] = min(max(0, sizes[""] - others), balanced[first])
    return balanced


_Item = tuple[str, "Module | Tensor"]
"""A path, and the module or tensor at it."""


class _Filling:
    """One run of their `infer_auto_device_map` over the tree."""

    def __init__(self, problem: Problem, root: Module, sizes: _Sizes, budgets: Mapping[Device, int]) -> None:
        self._graph = problem.graph
        self._sizes = sizes
        self._forbidden = problem.forbidden
        self._devices = [*(device for device in budgets if device != OVERFLOW), OVERFLOW]
        self._budgets = budgets
        self._used = dict.fromkeys(self._devices, 0)
        self._groups = (*_tie_groups(problem.graph), *problem.groups)
        self._queue: list[_Item] = [
            *((tensor.name, tensor) for tensor in root.parameters),
            *((child.path, child) for child in root.children),
            *((tensor.name, tensor) for tensor in root.buffers),
        ]
        accelerators = [device for device in self._devices if device.is_accelerator]
        self._accelerators = accelerators
        # These devices keep room for the largest block, which may have to be streamed through them.
        first = accelerators[:1]
        self._main_devices = (*first,) if first and first[0].kind == "mps" else (*first, CPU)
        self.crashes = False  # their planner does, because it searches for a tied tensor only in the queue

    def run(self) -> dict[str, Device]:
        """Return the device of each path that was placed whole."""
        placed: dict[str, Device] = {}
        current = 0
        largest_bytes, largest_paths = self._largest_block(self._queue)
        while self._queue:
            path, node = self._queue.pop(0)
            largest_paths = [other for other in largest_paths if not _is_at_or_below(other, path)]
            if not largest_paths:
                largest_bytes, largest_paths = self._largest_block(self._queued_modules())
            device = self._devices[current]
            reserved = largest_bytes if device in self._main_devices else 0
            room = None if device == OVERFLOW else self._budgets[device] - reserved - self._used[device]
            partners = self._partners(path)
            tied_items = self._items_holding(partners)
            self.crashes |= not all(any(name.startswith(f"{item[0]}.") for item in self._queue) for name in partners)
            own_bytes = self._sizes[path]
            bytes_with_ties = own_bytes + sum(self._sizes[tied] for tied, _ in tied_items)
            if not self._allows(device, node, tied_items):
                if self._can_split(node):
                    self._queue = self._parts(path, node) + self._queue
                    continue
                device = self._next_allowed(current, node, tied_items, bytes_with_ties)
                room = None

            if room is None or bytes_with_ties <= room:
                self._used[device] += bytes_with_ties
                placed[path] = device
                for tied, _ in tied_items:
                    placed[tied] = device
                taken = {tied for tied, _ in tied_items}
                self._queue = [item for item in self._queue if item[0] not in taken]
                continue
            if partners and own_bytes <= room and self._split_a_partner(path, node, tied_items):
                largest_bytes, largest_paths = self._largest_block(self._queued_modules())
                continue
            if self._can_split(node):
                self._queue = self._parts(path, node) + self._queue
                largest_bytes, largest_paths = self._largest_block(self._queued_modules())
                continue
            if escaped := self._around_unplaced_parameters(path, node, self._devices[current + 1], bytes_with_ties):
                self._queue = escaped + self._queue
                continue
            self._used[device] += reserved
            current += 1
            self._queue = [(path, node), *self._queue]
        return placed

    def _allows(self, device: Device, node: Module | Tensor, tied_items: Sequence[_Item]) -> bool:
        if not self._forbidden:
            return True
        nodes = (node, *(item[1] for item in tied_items))
        return not any(device in self._forbidden.get(tensor.name, ()) for item in nodes for tensor in _tensors(item))

    def _next_allowed(
        self, current: int, node: Module | Tensor, tied_items: Sequence[_Item], size_bytes: int
    ) -> Device:
        """Return the device for a module that a rule keeps off the current device, which stays the current one."""
        for device in self._devices[current + 1 :]:
            fits = device == OVERFLOW or self._used[device] + size_bytes <= self._budgets[device]
            if fits and self._allows(device, node, tied_items):
                return device
        return OVERFLOW

    def _can_split(self, node: Module | Tensor) -> bool:
        return isinstance(node, Module) and bool(node.children) and not self._graph.is_no_split(node)

    def _parts(self, path: str, node: Module | Tensor) -> list[_Item]:
        """Return the items that replace a module when it is split; like transformers, without its own buffers."""
        if isinstance(node, Tensor):
            return []
        own: list[_Item] = [(tensor.name, tensor) for tensor in node.parameters]
        return own + [(child.path, child) for child in node.children]

    def _partners(self, path: str) -> list[TensorName]:
        """Return the tensors outside of `path` that must be on the device of those inside."""
        inside = path + "."
        partners: list[TensorName] = []
        for group in self._groups:
            # Theirs searches for a substring rather than a prefix; the results must be equal, even where theirs is
            # wrong.
            outside = [name for name in group if inside not in name + "."]
            if outside and len(outside) < len(group):
                partners += outside
        return partners

    def _items_holding(self, names: Iterable[TensorName]) -> list[_Item]:
        """Return the queued items that hold these tensors; tensors that are placed already have none."""
        items: dict[str, _Item] = {}
        for name in names:
            holder = next((item for item in self._queue if _is_at_or_below(name, item[0])), None)
            if holder is not None:
                items.setdefault(holder[0], holder)
        return list(items.values())

    def _split_a_partner(self, path: str, node: Module | Tensor, tied_items: Sequence[_Item]) -> bool:
        """Split the first tied item that can be split, so that less must be placed along with it."""
        for tied_path, tied_node in tied_items:
            if self._can_split(tied_node):
                index = next(i for i, item in enumerate(self._queue) if item[0] == tied_path)
                parts = self._parts(tied_path, tied_node)
                self._queue = [(path, node), *self._queue[:index], *parts, *self._queue[index + 1 :]]
                return True
        return False

    def _around_unplaced_parameters(
        self, path: str, node: Module | Tensor, next_device: Device, bytes_with_ties: int
    ) -> list[_Item]:
        """Return the parts of a no-split block without its `no_placement_parameters`, if only these do not fit."""
        unplaced = self._graph.no_placement_parameters
        if unplaced is None or not isinstance(node, Module) or not self._graph.is_no_split(node):
            return []
        if next_device not in self._accelerators or bytes_with_ties <= self._budgets[next_device]:
            return []
        inside = {tensor.name.removeprefix(f"{path}."): tensor for tensor in node.tensors()}
        if not any(name in unplaced for name in inside):
            return []
        remaining_tensors = [tensor for name, tensor in inside.items() if name not in unplaced]
        remaining_tensors.sort(key=lambda tensor: tensor.kind == "buffer")  # parameters first, as they are registered
        return [(tensor.name, tensor) for tensor in remaining_tensors]

    def _queued_modules(self) -> list[_Item]:
        return [item for item in self._queue if isinstance(item[1], Module)]

    def _largest_block(self, items: Iterable[_Item]) -> tuple[int, list[str]]:
        """Return the bytes of the largest item that is never split, and the paths of all items of that size."""
        largest_bytes = 0
        paths: list[str] = []
        stack = list(items)[::-1]
        while stack:
            path, node = stack.pop()
            if self._can_split(node) and isinstance(node, Module):
                stack.extend((child.path, child) for child in reversed(node.children))
                continue
            size = self._sizes[path]
            if size > largest_bytes:
                largest_bytes, paths = size, [path]
            elif size == largest_bytes:
                paths.append(path)
        return largest_bytes, paths


def _complete(problem: Problem, root: Module, devices: Mapping[str, Device]) -> tuple[dict[TensorName, Device], bool]:
    """Return the device of every tensor, from those of the paths, and place tensors that their map leaves out.

    Also return whether any tensor had to be placed differently from their map.
    """
    placement: dict[TensorName, Device] = {}
    unplaced: list[Tensor] = []

    def visit(module: Module, inherited: Device | None) -> None:
        device = devices.get(module.path, inherited)
        for tensor in module.own_tensors:
            own = devices.get(tensor.name, device)
            if own is None:
                unplaced.append(tensor)
            else:
                placement[tensor.name] = own
        for child in module.children:
            visit(child, device)

    visit(root, None)
    escaped = set(problem.graph.no_placement_parameters or ())
    for tensor in unplaced:
        if any(tensor.name.endswith(name) for name in escaped):
            placement[tensor.name] = CPU if CPU in problem.capacities else OVERFLOW
        elif not problem.forbidden.get(tensor.name):
            placement[tensor.name] = _device_of_siblings(tensor, placement, problem)
    before = dict(placement)
    for group in (*problem.graph.tied_groups, *problem.groups):
        _unite(group, placement, problem)
    return placement, bool(unplaced) or placement != before


def _device_of_siblings(tensor: Tensor, placement: Mapping[TensorName, Device], problem: Problem) -> Device:
    """Return the device of the first placed tensor beside a tensor or around it."""
    parent = tensor.name
    while parent:
        parent = parent.rpartition(".")[0]  # type: ignore[assignment]
        prefix = f"{parent}." if parent else ""
        for name, device in placement.items():
            if name.startswith(prefix):
                return device
    return next(iter(problem.capacities), OVERFLOW)


def _unite(group: Sequence[TensorName], placement: dict[TensorName, Device], problem: Problem) -> None:
    """Put the tensors of a group on the device of its first placed tensor."""
    held = [name for name in group if name in placement]
    if len({placement[name] for name in held}) > 1:
        storage = problem.graph.storage_of[held[0]]
        home = placement[storage] if storage in placement else placement[held[0]]
        for name in held:
            placement[name] = home


def _tie_groups(graph: ModelGraph) -> list[tuple[TensorName, ...]]:
    """Return the planner's groups of tied parameters: each source with its targets, by name."""
    targets: dict[TensorName, list[TensorName]] = {}
    for target, source in graph.ties:
        targets.setdefault(source, []).append(target)
    return [tuple(sorted((*tied, source))) for source, tied in targets.items()]


def _without(module: Module, pinned: Mapping[TensorName, Device]) -> Module | None:
    """Return the tree without pinned tensors and without modules that are then empty."""
    if not pinned:
        return module
    parameters = tuple(tensor for tensor in module.parameters if tensor.name not in pinned)
    buffers = tuple(tensor for tensor in module.buffers if tensor.name not in pinned)
    children = tuple(kept for child in module.children if (kept := _without(child, pinned)) is not None)
    if not (parameters or buffers or children):
        return None
    return replace(module, parameters=parameters, buffers=buffers, children=children)


def _tensors(node: Module | Tensor) -> Iterable[Tensor]:
    return (node,) if isinstance(node, Tensor) else node.tensors()


def _is_at_or_below(path: str, ancestor: str) -> bool:
    return path == ancestor or path.startswith(f"{ancestor}.")
