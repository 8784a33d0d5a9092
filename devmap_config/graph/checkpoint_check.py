"""Checks that a checkpoint holds the model that a config describes: every tensor by its name, in its shape."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from devmap_config.graph.cache import default_directory, keep, kept, library_versions
from devmap_config.graph.checkpoint_match import CheckpointMatch
from devmap_config.graph.digest import digest
from devmap_config.graph.introspection import UntrustedCodeError
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from devmap_config.graph.checkpoint import Checkpoint
    from devmap_config.graph.loading import LoadedModel

SCHEMA = "devmap-checkpoint-match/3"
"""Changes whenever the result of a comparison may change."""


def match_checkpoint(model: LoadedModel, *, trust_remote_code: bool = False) -> CheckpointMatch | None:
    """Compare a model with its checkpoint by transformers' loader, or return the cached result of an earlier
    comparison.

    Return `None` if no checkpoint is at hand. torch is imported only if no result is cached.

    Raises:
        LibraryChangedError: if a library lacks something that this depends on.
    """
    checkpoint = model.source.checkpoint
    if checkpoint is None:
        return None
    key = {
        "schema": SCHEMA,
        "checkpoint": checkpoint.digest,
        "config": model.source.config_digest,
        "class": model.class_name,
        "dtype": model.dtype,
        "libraries": library_versions(),
    }
    path = default_directory().with_name("matches") / f"{digest(key).removeprefix('sha256:')}.json"
    # Code that comes with a model may change while its config stays the same.
    if not trust_remote_code and (value := kept(path)) is not None:
        return CheckpointMatch.from_json(value)
    match = _tried(model, checkpoint, trust_remote_code=trust_remote_code)
    if not trust_remote_code and match.unchecked is None:  # a missing package may be installed later
        keep(path, asdict(match))
    return match


def _tried(model: LoadedModel, checkpoint: Checkpoint, *, trust_remote_code: bool) -> CheckpointMatch:
    try:
        from devmap_config.graph.meta_loading import load_over_meta
    except ModuleNotFoundError as error:
        return CheckpointMatch(unchecked=f"{error.name} is not installed")
    try:
        with model.source.as_config() as config_path:
            return load_over_meta(
                config_path,
                checkpoint,
                {str(name): tensor.shape for name, tensor in model.graph.tensors.items()},
                class_name=model.class_name,
                dtype=model.dtype,
                trust_remote_code=trust_remote_code,
                repository=model.source.repository,
            )
    except UntrustedCodeError as error:
        return CheckpointMatch(unchecked=str(error))
    except LibraryChangedError:
        raise
    except Exception as error:
        quantization = model.quantization
        if quantization is None or not quantization.is_prequantized:
            raise
        reason = first_line(error) or type(error).__name__
        return CheckpointMatch(unchecked=f"transformers needs more for {quantization.method.name}: {reason}"[:300])
