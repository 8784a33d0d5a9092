"""`ModelGraph`: a model's module tree as frozen, torch-free data."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal, NewType

from devmap_config.graph.costs import Measurement  # noqa: TC001  pydantic reads the annotations

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

ModulePath = NewType("ModulePath", str)
"""Dotted path of a module, as in `named_modules()`; the root is `""`."""

TensorName = NewType("TensorName", str)
"""Dotted name of a parameter or buffer, as in `named_parameters()`."""

TensorKind = Literal["parameter", "buffer"]

ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""The bytes of an element, by torch's names of the dtypes that models are computed in."""

FUSED_DIMENSIONS = 3
"""A parameter of fused experts has a leading expert dimension besides its two own."""

LORA = ("lora_A", "lora_B", "lora_B_bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
SAVED = "modules_to_save_"
"""The names of the tensors that an adapter adds to a module, and the prefix of those that it replaces as a whole.

They are non-persistent buffers, which accelerate leaves on the device that the module runs on.
"""

CONTAINER_CLASSES = ("ModuleList", "ModuleDict")
"""Modules without a forward of their own: accelerate would hook every leaf below one that is placed as a whole."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter or buffer.

    `shape`, `dtype` (a torch name such as `bfloat16`) and `size_bytes` are those after loading. For a quantised weight,
    `shape` is that of the matrix, `dtype` that of the packed data, and `size_bytes` includes its scales, zero points
    and other extra data; `offloaded_bytes` is its size on `cpu` or `disk` of a map, if the quantizer does not convert
    it there. `planner_bytes` is what transformers' own planner counts for it, which ignores modules that are kept in
    fp32, and most scales. `kind` says whether it is a parameter or a buffer in the model's own tree; `in_buffer` is
    true for a parameter that its quantizer holds in buffers of its module. `persistent` is false for a buffer that no
    checkpoint holds. `alias_of` names the tensor that is the very same object, if a module is registered twice; an
    alias has no bytes of its own.
    """

    name: TensorName
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    planner_bytes: int
    kind: TensorKind = "parameter"
    persistent: bool = True
    alias_of: TensorName | None = None
    in_buffer: bool = False
    offloaded_bytes: int | None = None

    @property
    def is_held_in_buffer(self) -> bool:
        """True if the tensor is a buffer for accelerate, and not a parameter."""
        return self.kind == "buffer" or self.in_buffer

    def bytes_where(self, *, is_offloaded: bool) -> int:
        """Return the bytes of the tensor: on `cpu` or `disk` of a map if it `is_offloaded`, else on other devices."""
        return self.offloaded_bytes if is_offloaded and self.offloaded_bytes is not None else self.size_bytes

    @property
    def element_count(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Module:
    """One module with everything below it, in order of definition."""

    path: ModulePath
    class_name: str
    parameters: tuple[Tensor, ...] = ()
    children: tuple[Module, ...] = ()
    buffers: tuple[Tensor, ...] = ()

    def walk(self) -> Iterator[Module]:
        """Yield this module, then all modules below it, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def tensors(self) -> Iterator[Tensor]:
        """Yield every parameter and buffer at or below this module, depth first."""
        for module in self.walk():
            yield from module.parameters
            yield from module.buffers

    @property
    def experts(self) -> tuple[Tensor, ...]:
        """The parameters that hold a matrix for each of several experts."""
        fused = tuple(tensor for tensor in self.parameters if len(tensor.shape) == FUSED_DIMENSIONS)
        return () if self.class_name.startswith("Conv") else fused

    @property
    def own_tensors(self) -> tuple[Tensor, ...]:
        """The parameters and buffers that are registered on this module itself."""
        return self.parameters + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingFacts:
    """The facts that loading depends on, besides sizes.

    Attributes:
        merged: tensors that transformers merges from several of the checkpoint's.
        stored_dtype: the dtype of the checkpoint, if the config states it.
        dtype: the dtype in which the model is loaded.
        quantises: weights are quantised while they are loaded.
        quantising_item_bytes: the most bytes that an element of a weight takes while it is quantised: the dense value,
            intermediate values, and the result; 0 if there are no intermediate values.
        method: the method of quantization, or the one that the checkpoint is stored in.
        running: the weights while the model runs, if they are quantised: the method in a few words, and the dtype that
            it computes in if its arguments say so: `bitsandbytes nf4 4 bit in bfloat16`.
    """

    merged: frozenset[TensorName]
    stored_dtype: str
    dtype: str
    quantises: bool = False
    quantising_item_bytes: int = 0
    method: str | None = None
    running: str | None = None


@dataclass(frozen=True)
class ModelGraph:
    """A model's module tree, and the attributes of transformers about placing it.

    `ties` holds `(target, source)` pairs of transformers' `all_tied_weights_keys`: two names, one storage.
    `no_split_classes`, `no_placement_parameters` and `skip_keys` are the model's `_no_split_modules`,
    `_no_placement_params` (`None` if the model has no such attribute) and `_skip_keys_device_placement`. `measurement`
    holds the costs of running it under a workload, if the profile has one. `merged` are tensors that loading merges
    from several, such as the weights of experts; if a changed library hides these, `unread` says so. `computed` are
    tensors that the checkpoint at hand does not hold because transformers computes them. `loading` holds the facts
    about loading for this profile, if they are known.
    """

    root: Module
    ties: tuple[tuple[TensorName, TensorName], ...] = ()
    no_split_classes: tuple[str, ...] = ()
    no_placement_parameters: tuple[str, ...] | None = None
    skip_keys: tuple[str, ...] = ()
    measurement: Measurement | None = None
    merged: tuple[TensorName, ...] = ()
    unread: str | None = None
    computed: frozenset[TensorName] = field(default=frozenset(), compare=False)
    loading: LoadingFacts | None = field(default=None, compare=False)

    @property
    def class_name(self) -> str:
        """The model's class, such as `LlamaForCausalLM`."""
        return self.root.class_name

    @cached_property
    def modules(self) -> dict[ModulePath, Module]:
        """Every module by its path, depth first in order of definition."""
        return {module.path: module for module in self.root.walk()}

    @cached_property
    def tensors(self) -> dict[TensorName, Tensor]:
        """Every parameter and buffer by its name, depth first."""
        return {tensor.name: tensor for tensor in self.root.tensors()}

    @cached_property
    def adapter_tensors(self) -> tuple[TensorName, ...]:
        """The names of the tensors that an adapter adds to the model."""
        added = (tensor.name for tensor in self.root.tensors() if tensor.kind == "buffer" and not tensor.persistent)
        return tuple(name for name in added if (own := name.rpartition(".")[2]) in LORA or own.startswith(SAVED))

    @cached_property
    def adapted_modules(self) -> tuple[Module, ...]:
        """The modules that an adapter adds tensors to; each of them must be whole on one device."""
        return tuple(self.modules[ModulePath(path)] for path in dict.fromkeys(map(_parent, self.adapter_tensors)))

    @cached_property
    def storage_of(self) -> dict[TensorName, TensorName]:
        """For each tensor, the name under which its bytes are counted: ties and aliases share one storage."""
        tied = dict(self.ties)
        storage: dict[TensorName, TensorName] = {}
        for tensor in self.root.tensors():
            name = tensor.alias_of or tensor.name
            seen = {name}
            while (source := tied.get(name)) is not None and source in self.tensors and source not in seen:
                name = self.tensors[source].alias_of or source
                seen.add(name)
            storage[tensor.name] = name
        return storage

    @cached_property
    def tied_groups(self) -> tuple[tuple[TensorName, ...], ...]:
        """The groups of two or more names that share one storage, in order of definition."""
        groups: dict[TensorName, list[TensorName]] = {}
        for name, storage in self.storage_of.items():
            groups.setdefault(storage, []).append(name)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def decodes(self) -> bool:
        """True if the model was measured and has steps of decoding."""
        return self.measurement is None or self.measurement.decodes

    @cached_property
    def size_bytes(self) -> int:
        """The bytes of all weights and buffers after loading; tied tensors count once."""
        return self.weights_bytes(tuple(self.tensors))

    def weights_bytes(self, names: Iterable[TensorName], offloaded: Collection[TensorName] = ()) -> int:
        """Return the bytes that these tensors occupy together on one device; tied tensors count once.

        `offloaded` are those of them that a map puts on `cpu` or `disk`.
        """
        storages: dict[TensorName, int] = {}
        for name in names:
            storage = self.storage_of[name]
            size_bytes = self.tensors[storage].bytes_where(is_offloaded=name in offloaded)
            storages[storage] = max(storages.get(storage, 0), size_bytes)
        return sum(storages.values())

    @cached_property
    def composites(self) -> frozenset[ModulePath]:
        """The modules that are lists of blocks or contain one, which are never placed as a whole."""
        composites = {ModulePath("")}

        def visit(module: Module) -> bool:
            if self.is_no_split(module):
                return False
            # A list rather than a generator, so that every child is visited.
            holds = [visit(child) or self.is_no_split(child) for child in module.children]
            holds_list = any(holds) or (module.class_name in CONTAINER_CLASSES and bool(module.children))
            if holds_list:
                composites.add(module.path)
            return holds_list

        visit(self.root)
        return frozenset(composites)

    @cached_property
    def blocks(self) -> tuple[ModulePath, ...]:
        """The coarsest modules that are placed as a whole: no-split blocks, and modules outside of them."""

        def below(module: Module) -> Iterator[ModulePath]:
            for child in module.children:
                if child.path in self.composites:
                    yield from below(child)
                else:
                    yield child.path

        return tuple(below(self.root))

    def is_no_split(self, module: Module) -> bool:
        """Return whether transformers keeps this module whole on one device.

        The model itself never counts, as in transformers' planner, even though some models name their own class.
        """
        return module.path != "" and module.class_name in self.no_split_classes


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def is_within(path: str, around: str) -> bool:
    """Return whether a path is `around` or below it; the model itself, `""`, contains nothing by this.

    >>> is_within("model.layers.1.mlp", "model.layers.1"), is_within("model.layers.10", "model.layers.1")
    (True, False)
    """
    return path == around or path.startswith(f"{around}.")


def ancestors(path: str) -> Iterator[str]:
    """Yield the paths of the modules around a path: the nearest first, the model itself (`""`) last.

    >>> list(ancestors("model.layers.0"))
    ['model.layers', 'model', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path
