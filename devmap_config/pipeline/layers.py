"""`Layers`: a model as vLLM cuts it, a list of layers with the modules before and after them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from devmap_config.execution.timing import execution_order
from devmap_config.graph.model import TensorName, is_within
from devmap_config.pipeline.cache import LayerCache
from devmap_config.pipeline.windows import UnknownWindowsError, windows_of
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import ModelGraph, ModulePath, Tensor

LAYER = re.compile(r"(?P<list>.+)\.(?P<number>[0-9]+)")

MOST_VOCABULARY_PADDING = 64
"""vLLM pads embedding and head to a multiple of this (`vocab_parallel_embedding.py`, `DEFAULT_VOCAB_PADDING_SIZE`)."""

MOST_LAYERS = 1024
MOST_OF_A_FIGURE = 2**24
"""No model has more layers, heads, hidden units or tokens in its vocabulary: larger numbers are mistakes, and would
overflow sums.
"""

KEYS_OF_OTHER_CACHES = ("kv_lora_rank", "attention_chunk_size", "num_kv_shared_layers")
"""Keys of configs whose layers cache something other than their own keys and values for each head."""

MULTI_QUERY = frozenset({"falcon", "gpt_bigcode"})
"""Families that have one head of keys and values unless their config says `multi_query: false`."""

COLUMN = frozenset(
    "q_proj k_proj v_proj qkv_proj query_key_value c_attn gate_proj up_proj gate_up_proj fc1 c_fc fc_in w1 w3"
    " dense_h_to_4h".split()
)
ROW = frozenset("o_proj out_proj down_proj fc2 c_proj fc_out w2 dense_4h_to_h dense".split())
"""The matrices that vLLM divides among the ranks of a group, by rows or by columns; every rank has all others whole."""

KEY_OR_VALUE = frozenset({"k_proj", "v_proj"})
FUSED_HEADS = frozenset({"qkv_proj", "query_key_value", "c_attn"})


class UncutModelError(ValueError):
    """The model is not a list of layers that vLLM can cut, or its cache cannot be counted; the text says why."""


@dataclass(frozen=True)
class Layers:
    """A model's layers in order, the tensors before and after them, and the heads and windows of its config.

    `caches` returns the cache of each layer, by the kind of its attention, on one rank of a group of `ranks`.
    """

    graph: ModelGraph
    paths: tuple[ModulePath, ...]
    before: tuple[ModulePath, ...]
    behind: tuple[ModulePath, ...]
    heads: int
    key_value_heads: int
    head_size: int
    hidden_size: int
    vocabulary: int
    positions: int
    windows: tuple[int | None, ...]
    element_bytes: int
    is_rotary: bool
    is_multi_query: bool = False

    def caches(self, ranks: int) -> tuple[LayerCache, ...]:
        """Return the cache of each layer on one rank of a group: the keys and values of its share of heads, at least of
        one.
        """
        heads = max(1, self.key_value_heads // ranks)
        token_bytes = 2 * heads * self.head_size * self.element_bytes
        return tuple(LayerCache(token_bytes=token_bytes, window=window) for window in self.windows)

    def check_caches(self, measurement: Measurement) -> None:
        """Compare the cache of each layer by the config with the measured cache of the model's own code.

        A layer with a window may cache fewer tokens than the context. If vLLM caches one head for all, but transformers
        every one, the two differ.

        Raises:
            UncutModelError: if they differ.
        """
        if not measurement.measured or self.is_multi_query:
            return
        workload = measurement.workload
        for path, layer in zip(self.paths, self.caches(1), strict=True):
            kept_bytes = sum(cost.cache_bytes for cost in measurement.modules if is_within(cost.path, path))
            sequences_bytes = workload.batch_size * layer.token_bytes
            kept, rest = divmod(kept_bytes, sequences_bytes)
            least = workload.context_length if layer.window is None else 1
            if rest or not least <= kept <= workload.context_length:
                raise UncutModelError(
                    f"`{path}` keeps {layer.token_bytes:,} bytes of a token by its config, and its code kept"
                    f" {kept_bytes:,} bytes of {workload.context_length:,} tokens"
                )

    def obstacle_to(self, ranks: int) -> str | None:
        """Return why a group of `ranks` devices cannot share the layers; `None` if it can."""
        padded = _padded(self.vocabulary)
        if self.heads % ranks:
            return f"{self.heads} heads of attention cannot be divided among {ranks} devices"
        if self.key_value_heads % ranks and ranks % self.key_value_heads:
            return f"{self.key_value_heads} heads of keys and values cannot be divided among {ranks} devices"
        if padded % ranks:
            return f"a vocabulary of {padded:,}, padded, cannot be divided among {ranks} devices"
        for path in self.paths:
            for tensor in self.graph.modules[path].tensors():
                if (
                    _kind(tensor) == "column"
                    and tensor.shape
                    and tensor.shape[-2 if len(tensor.shape) > 1 else 0] % ranks
                ):
                    rows = tensor.shape[-2 if len(tensor.shape) > 1 else 0]
                    if not _is_of_keys(tensor):
                        return f"`{tensor.name}` has {rows:,} rows, which cannot be divided among {ranks} devices"
        return None

    @cached_property
    def ends(self) -> tuple[ModulePath, ...]:
        """The modules before and after the layers."""
        return (*self.before, *self.behind)

    def layer_bytes(self, ranks: int) -> tuple[int, ...]:
        """Return the weights of each layer on one rank."""
        return tuple(self._bytes_of((path,), ranks) for path in self.paths)

    def first_bytes(self, ranks: int) -> int:
        """Return the bytes of the first stage besides layers: the embedding, and the rotary table of every stage."""
        return self._bytes_of(self.before, ranks)

    def last_bytes(self, ranks: int, stages: int) -> int:
        """Return the bytes of the last stage besides layers: norm and head; a tied head is a copy of the embedding."""
        first = {self.graph.storage_of[name] for name in self._names(self.before)}
        names = self._names(self.behind)
        if stages == 1:
            names = [name for name in names if self.graph.storage_of[name] not in first]
        return self._bytes(names, ranks)

    @property
    def rotations_bytes(self) -> int:
        """The bytes of the rotary table, which every stage has."""
        return self.positions * self.head_size * self.element_bytes if self.is_rotary else 0

    def _names(self, paths: Iterable[ModulePath]) -> list[TensorName]:
        return [tensor.name for path in paths for tensor in self.graph.modules[path].tensors()]

    def _bytes_of(self, paths: Iterable[ModulePath], ranks: int) -> int:
        return self._bytes(self._names(paths), ranks)

    def _bytes(self, names: Iterable[TensorName], ranks: int) -> int:
        storages = dict.fromkeys(self.graph.storage_of[name] for name in names)
        return sum(self._rank_bytes(self.graph.tensors[name], ranks) for name in storages)

    def _rank_bytes(self, tensor: Tensor, ranks: int) -> int:
        """Return the bytes that one rank of a group holds of a tensor."""
        size_bytes, kind = tensor.size_bytes, _kind(tensor)
        if tensor.kind == "buffer" and not tensor.in_buffer:
            return 0  # rotary tables, which vLLM makes differently
        if _is_of_vocabulary(tensor, self.vocabulary):
            return size_bytes * _padded(self.vocabulary) // self.vocabulary // ranks
        if kind == "row":
            return size_bytes if _is_bias(tensor) else size_bytes // ranks
        if kind != "column":
            return size_bytes // ranks if tensor.name.endswith(".sinks") else size_bytes
        heads = max(1, self.key_value_heads // ranks)
        if _is_of_keys(tensor):
            return size_bytes * heads // self.key_value_heads
        if _owner(tensor) in FUSED_HEADS:
            return size_bytes * (self.heads // ranks + 2 * heads) // (self.heads + 2 * self.key_value_heads)
        return size_bytes // ranks


def layers_of(graph: ModelGraph, config: Mapping[str, Any]) -> Layers:
    """Return the layers of a model as vLLM cuts it.

    Raises:
        UncutModelError: if it cannot be cut, or its cache cannot be counted.
    """
    paths = _list_of_layers(graph)
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if count != len(paths):
        raise UncutModelError(f"its config has {count} layers, and {len(paths)} are found")
    order = [
        path
        for path in execution_order(graph)
        if path not in paths and any(True for _ in graph.modules[path].tensors())
    ]
    running = execution_order(graph)
    first, last = running.index(paths[0]), running.index(paths[-1])
    holding = [path for path in order if any(tensor.kind == "parameter" for tensor in graph.modules[path].tensors())]
    before = tuple(path for path in holding if running.index(path) < first)
    behind = tuple(path for path in holding if running.index(path) > last)
    if rest := [path for path in holding if path not in (*before, *behind)]:
        raise UncutModelError(f"{', '.join(fold_paths(rest)[:2])} runs between its layers")
    for key in KEYS_OF_OTHER_CACHES:
        if config.get(key):
            raise UncutModelError(f"what its layers keep of a token (`{key}` in its config) is not counted yet")
    try:
        windows = windows_of(config, len(paths))
    except UnknownWindowsError as error:
        raise UncutModelError(str(error)) from error
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 0)
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    vocabulary = int(config.get("vocab_size") or 0)
    if not heads or not hidden or not vocabulary:
        raise UncutModelError("its config does not say how many heads, hidden units or words it has")
    figures = (
        heads,
        hidden,
        vocabulary,
        *(config.get(key) or 0 for key in ("num_key_value_heads", "num_kv_heads", "head_dim")),
    )
    if len(paths) > MOST_LAYERS or not all(
        isinstance(figure, int) and 0 <= figure <= MOST_OF_A_FIGURE for figure in figures
    ):
        raise UncutModelError("its config names more than any model has")
    return Layers(
        graph=graph,
        paths=paths,
        before=before,
        behind=behind,
        heads=heads,
        key_value_heads=_key_value_heads(config, heads),
        head_size=int(config.get("head_dim") or hidden // heads),
        hidden_size=hidden,
        vocabulary=vocabulary,
        positions=int(config.get("max_position_embeddings") or 0),
        windows=windows,
        element_bytes=_element_bytes(graph, paths),
        is_multi_query=config.get("model_type") in MULTI_QUERY,
        is_rotary=any(path.endswith("rotary_emb") for path in graph.modules),
    )


def _list_of_layers(graph: ModelGraph) -> tuple[ModulePath, ...]:
    lists: dict[str, list[ModulePath]] = {}
    for path in graph.blocks:
        if (match := LAYER.fullmatch(path)) and graph.is_no_split(graph.modules[path]):
            lists.setdefault(match["list"], []).append(path)
    if len(lists) != 1:
        what = "no list of layers" if not lists else f"several lists of layers: {', '.join(lists)}"
        raise UncutModelError(f"it has {what}")
    return tuple(next(iter(lists.values())))


def _key_value_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return the number of heads of keys and values (vLLM's `get_total_num_kv_heads`).

    Example:
        >>> _key_value_heads({"model_type": "falcon", "num_kv_heads": 8}, 64)
        1
        >>> _key_value_heads({"model_type": "falcon", "num_kv_heads": 8, "new_decoder_architecture": True}, 64)
        8
        >>> _key_value_heads({"model_type": "gpt_bigcode", "multi_query": False}, 16)
        16
    """
    family = config.get("model_type")
    if family in MULTI_QUERY:
        if family == "falcon" and config.get("new_decoder_architecture"):
            return int(config.get("num_kv_heads") or heads)
        return 1 if config.get("multi_query", True) else heads
    return int(config.get("num_key_value_heads") or heads)


def _element_bytes(graph: ModelGraph, paths: Sequence[ModulePath]) -> int:
    """Return the bytes of an element in the model's dtype, by its norms, which no quantizer converts."""
    sizes = [
        tensor.size_bytes // tensor.element_count
        for tensor in graph.modules[paths[0]].tensors()
        if tensor.kind == "parameter" and len(tensor.shape) == 1 and tensor.element_count
    ]
    return min(sizes, default=2)


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // MOST_VOCABULARY_PADDING) * MOST_VOCABULARY_PADDING


def _is_of_vocabulary(tensor: Tensor, vocabulary: int) -> bool:
    return bool(tensor.shape) and tensor.shape[0] == vocabulary


def _owner(tensor: Tensor) -> str:
    """Return the name of the matrix that a tensor is or belongs to."""
    *_, owner, name = ("", *tensor.name.split("."))
    return owner if name in ("weight", "bias") or owner in COLUMN | ROW else name.removesuffix("_bias")


def _is_bias(tensor: Tensor) -> bool:
    return tensor.name.endswith((".bias", "_bias"))


def _kind(tensor: Tensor) -> str:
    owner = _owner(tensor)
    return "column" if owner in COLUMN else "row" if owner in ROW else "whole"


def _is_of_keys(tensor: Tensor) -> bool:
    return _owner(tensor) in KEY_OR_VALUE


def number_of(paths: Sequence[str], name: str) -> int | None:
    """Return the number of the layer that a tensor or module is in, or is itself."""
    match = re.match(rf"{re.escape(paths[0].rpartition('.')[0])}\.([0-9]+)(\.|$)", name)
    return int(match[1]) if match else None


def is_in(path: str, names: Iterable[str]) -> bool:
    """Return whether a path is one of these modules, or within one."""
    return any(is_within(path, name) for name in names)
