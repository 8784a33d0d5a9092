"""Writes a checkpoint of random weights, with the names, shapes and dtypes of a model's own, to try a plan with."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import GIBIBYTE, format_bytes
from devmap_config.graph.checkpoint import read_checkpoint
from devmap_config.graph.checkpoint_check import match_checkpoint
from devmap_config.graph.introspection import meta_model
from devmap_config.graph.remote_code import code_files, listed
from devmap_config.libraries.transformers import checkpoint_tensors
from devmap_config.runner.loading import RunnerError
from devmap_config.runner.runner import require_match

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.runner.runner import Deployment

SHARD_BYTES = GIBIBYTE
"""The bytes of a file, unless a single tensor is larger."""

ROW = 2**20
"""The length of the row of random numbers that all weights repeat, each from another start."""

SPREAD = 0.02
"""The standard deviation of weights with which most models start training."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a checkpoint: the shape and dtype of each of its tensors."""

    name: str
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def size_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())

    def write(self, folder: Path, seed: int = 0) -> None:
        """Write the file: matrices with the usual spread; of one-dimensional tensors, biases are zeros and others
        ones.
        """
        import torch
        from safetensors.torch import save_file

        row = torch.randn(ROW, generator=torch.Generator().manual_seed(seed)).mul_(SPREAD)
        tensors = {
            name: _values(name, shape, dtype, row.roll(index * 37))
            for index, (name, (shape, dtype)) in enumerate(self.tensors.items())
        }
        save_file(tensors, folder / self.name, metadata={"format": "pt"})


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, row: torch.Tensor) -> torch.Tensor:
    import torch

    if not dtype.is_floating_point or name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    size = prod(shape)
    return row[:size].to(dtype).repeat(-(-size // ROW))[:size].reshape(shape)


def shards_of(model: PreTrainedModel) -> tuple[Shard, ...]:
    """Return the files of a checkpoint for a model without data, as transformers would save them."""
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    held_bytes = 0
    for name, tensor in checkpoint_tensors(model).items():
        if held_bytes + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = (tuple(tensor.shape), tensor.dtype)
        held_bytes += tensor.nbytes
    count = len(shards)
    return tuple(Shard(f"model-{n:05}-of-{count:05}.safetensors", tensors) for n, tensors in enumerate(shards, start=1))


def write_around(folder: Path, config: Mapping[str, Any], shards: tuple[Shard, ...]) -> None:
    """Write the other files of a checkpoint: the model's config, and the index of its shards."""
    own = {key: value for key, value in config.items() if key != "transformers_weights"}
    (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")
    index = {
        "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@contextmanager
def with_random_weights(
    deployment: Deployment, expect: Callable[[int], None], advance: Callable[[int], None]
) -> Iterator[Deployment]:
    """Yield a deployment whose checkpoint is random; its files are in a temporary folder, which is deleted afterwards.

    Args:
        deployment: the deployment, whose own checkpoint is not read.
        expect: called with the number of bytes that will be written.
        advance: called with the number of bytes of each part that was written.

    Raises:
        RunnerError: if there is no room for it, or none can be made for the model.
    """
    shards = shards_of(_model_without_data(deployment))
    total_bytes = sum(shard.size_bytes for shard in shards)
    _require_room(total_bytes)
    with TemporaryDirectory(prefix="devmap-random-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        expect(total_bytes)
        for seed, shard in enumerate(shards):
            shard.write(folder, seed)
            advance(shard.size_bytes)
        write_around(folder, deployment.request.config, shards)
        random = of_random_weights(deployment, folder)
        if deployment.assistant is None:
            yield random
            return
        with with_random_weights(deployment.assistant, expect, advance) as draft:
            yield replace(random, assistant=draft)


def _require_room(total_bytes: int) -> None:
    folder = gettempdir()
    free_bytes = shutil.disk_usage(folder).free
    if total_bytes > free_bytes:
        raise RunnerError(
            "too-little-disk",
            f"random weights take {format_bytes(total_bytes)}, and `{folder}` has {format_bytes(free_bytes)} free",
            "name a folder on a larger disk by the environment's `TMPDIR`",
        )


def _model_without_data(deployment: Deployment) -> PreTrainedModel:
    model, request = deployment.compiled.model, deployment.request
    if model.quantization is not None and model.quantization.is_prequantized:
        what = f"whose checkpoint is quantised ({model.quantization.method.name})"
        raise RunnerError("no-weights", f"random weights cannot be made of a model {what}", "run it with its weights")
    if request.trust_remote_code and (files := code_files(request.config)):
        what = f"that brings code of its own ({listed(files)})"
        raise RunnerError("no-weights", f"random weights cannot be made of a model {what}", "run it with its weights")
    with model.source.as_config() as path:
        return meta_model(path, class_name=model.class_name, dtype=model.dtype, attention=None)


def of_random_weights(deployment: Deployment, folder: Path) -> Deployment:
    """Return a deployment whose checkpoint is the random one that was written to a folder."""
    compiled, request = deployment.compiled, deployment.request
    checkpoint = read_checkpoint(folder, request.config)
    source = replace(compiled.model.source, checkpoint=checkpoint)
    match = match_checkpoint(replace(compiled.model, source=source))
    require_match(match, compiled)
    offload_folder = None if request.offload_folder is None else folder / "offload"
    request = replace(request, weights=str(folder), revision=None, offload_folder=offload_folder)
    return replace(deployment, request=request, match=match, has_random_weights=True)
