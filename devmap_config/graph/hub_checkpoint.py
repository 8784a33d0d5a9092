"""Reads the headers of a checkpoint on the hub, and nothing beyond them: two byte ranges of each file of weights."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.graph.cache import default_directory, keep, kept
from devmap_config.graph.checkpoint import (
    INDEX_FILE,
    LENGTH_BYTES,
    SINGLE_FILE,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    header_length,
    index_files,
    parse_header,
    read_checkpoint,
    read_index,
)
from devmap_config.graph.digest import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The weight files of a repository that was never converted to safetensors."""

PARTIAL_CONTENT = 206

CONTENT_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")

TIMEOUT_SECONDS = 10

CONNECTIONS = 8
"""The number of files whose headers are requested at once."""

SCHEMA = "devmap-checkpoint/1"
"""Changes whenever the cached data of a checkpoint change."""


def hub_checkpoint(
    repository: str,
    commit: str,
    config: Mapping[str, Any],
    snapshot: Path,
    *,
    may_ask: Callable[[], bool],
    token: str | bool | None = None,
) -> Checkpoint | None:
    """Return the headers of a checkpoint; `None` if they are not available.

    A commit never changes, so its headers are cached beside the graphs, and a profile means the same offline.

    Args:
        repository: the hub id.
        commit: its commit.
        config: its config, which may name the file of weights.
        snapshot: the folder in which the hub's client keeps the files of this commit, if it has any.
        may_ask: returns whether the hub can be reached; called only if the headers are neither cached nor in the
            snapshot.
        token: the token for the hub; with `None`, its client's own.

    Raises:
        CheckpointError: if the files cannot be used: pickles, or headers that cannot be read.
    """
    name = digest({"checkpoint": repository, "commit": commit, "schema": SCHEMA}).removeprefix("sha256:")
    path = default_directory().with_name("checkpoints") / f"{name}.json"
    if (value := kept(path)) is not None:
        return _from_json(value)
    if (checkpoint := _in_snapshot(snapshot, config)) is not None:
        return checkpoint
    asked = _from_hub(_Commit(repository, commit, token), config) if may_ask() else None
    if asked is not None:
        keep(path, _to_json(asked))
    return asked


def _in_snapshot(snapshot: Path, config: Mapping[str, Any]) -> Checkpoint | None:
    """Return the checkpoint in the cache of the hub's client, if it is complete."""
    try:
        return read_checkpoint(snapshot, config)
    except (CheckpointError, OSError):  # an unfinished download is resumed when the model is loaded
        return None


def _to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "files": dict(checkpoint.file_bytes),
        "tensors": {name: [*tensor] for name, tensor in checkpoint.tensors.items()},
    }


def _from_json(value: Mapping[str, Any]) -> Checkpoint:
    tensors = {
        name: StoredTensor(dtype, tuple(shape), file, start, end)
        for name, (dtype, shape, file, start, end) in value["tensors"].items()
    }
    return Checkpoint(value["files"], tensors)


class _Commit(NamedTuple):
    """A commit on the hub, with the access to it."""

    repository: str
    sha: str
    token: str | bool | None


def _from_hub(commit: _Commit, config: Mapping[str, Any]) -> Checkpoint | None:
    explicit = config.get("transformers_weights")
    single, index = (explicit, explicit) if isinstance(explicit, str) else (SINGLE_FILE, INDEX_FILE)
    try:
        if not single.endswith(".json") and (header := _header_of(commit, single)) is not None:
            return header
        return _sharded(commit, index)
    except CheckpointError:
        raise
    except Exception:  # the client's errors have no common type, and without headers the checkpoint is not checked
        return None


def _sharded(commit: _Commit, index: str) -> Checkpoint | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(commit.repository, index, revision=commit.sha, token=commit.token))
    except EntryNotFoundError:
        _refuse_pickles(commit)
        return None
    files = index_files(read_index(path), index)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = list(pool.map(lambda file: _header_of(commit, file), files))
    parts = [part for part in headers if part is not None]
    if len(parts) < len(headers):
        return None
    file_bytes = {name: size for part in parts for name, size in part.file_bytes.items()}
    return Checkpoint(file_bytes, {name: tensor for part in parts for name, tensor in part.tensors.items()})


def _refuse_pickles(commit: _Commit) -> None:
    if any(_range(commit, name, 0, LENGTH_BYTES) is not None for name in PICKLES):
        raise CheckpointError(
            "no-safetensors",
            f"`{commit.repository}` holds pickles only: loading them may run any code, and they tell nothing before",
            "name a revision that holds safetensors (the hub's conversion makes one: `revision: refs/pr/1`, say), or a"
            " folder with a copy that was converted",
        )


def _header_of(commit: _Commit, filename: str) -> Checkpoint | None:
    """Return the header of one file, or `None` if the server does not send parts of it."""
    first = _range(commit, filename, 0, LENGTH_BYTES)
    if first is None:
        return None
    first_bytes, size_bytes = first
    length = header_length(first_bytes, size_bytes, filename)
    second = _range(commit, filename, LENGTH_BYTES, LENGTH_BYTES + length)
    if second is None:
        return None
    header = parse_header(second[0], size_bytes, filename)
    tensors = {name: StoredTensor(*entry[:2], filename, *entry[2:]) for name, entry in header.items()}
    return Checkpoint({filename: size_bytes}, tensors)


def _range(commit: _Commit, filename: str, start: int, end: int) -> tuple[bytes, int] | None:
    """Return the bytes of a file from `start` to before `end`, and its size; any other answer is not read."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    url = hf_hub_url(commit.repository, filename, revision=commit.sha)
    headers = {
        **build_hf_headers(token=commit.token),
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        size = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != PARTIAL_CONTENT or size is None:
            return None
        content = bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > end - start:  # the server sent more than was requested, perhaps without end
                return None
    return (bytes(content), int(size[1])) if len(content) == min(end, int(size[1])) - start else None
