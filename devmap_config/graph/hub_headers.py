"""Reads the header of a checkpoint on the hub, and nothing beyond it: two byte ranges of the first file of weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from devmap_config.graph.cache import default_directory, keep
from devmap_config.graph.source import MAX_HEADER_BYTES, digest, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""

PARTIAL_CONTENT = 206

TIMEOUT_SECONDS = 10


def stored_header(repository: str, commit: str, *, may_ask: Callable[[], bool]) -> dict[str, dict[str, Any]]:
    """The tensors that the first file of a checkpoint holds; none where there is none or it cannot be had.

    What a commit holds never changes: it is kept beside the graphs, so that a profile means the same off line.

    Args:
        repository: the hub id.
        commit: its commit.
        may_ask: whether the hub can be reached, asked only where the header is not kept.
    """
    name = digest({"header": repository, "commit": commit}).removeprefix("sha256:")
    path = default_directory().with_name("headers") / f"{name}.json"
    try:
        return parse_header(path.read_bytes())
    except (OSError, ValueError):
        header = _asked_for(repository, commit) if may_ask() else None
    if header is None:
        return {}
    keep(path, json.dumps(header, separators=(",", ":")))
    return header


def _asked_for(repository: str, commit: str) -> dict[str, dict[str, Any]] | None:
    try:
        return _read(repository, SINGLE_FILE, commit) or _read(repository, _first_shard(repository, commit), commit)
    except Exception:  # the client's errors have no common type, and without a header the dtype is assumed, and said so
        return None


def _first_shard(repository: str, commit: str) -> str:
    """The first file that the index of a checkpoint in several files names; the index itself holds no weights."""
    from pathlib import Path

    from huggingface_hub import hf_hub_download

    index = json.loads(Path(hf_hub_download(repository, INDEX, revision=commit)).read_text(encoding="utf-8"))
    first: str = min(index["weight_map"].values())
    return first


def _read(repository: str, filename: str, commit: str) -> dict[str, dict[str, Any]] | None:
    """The header of one file; `None` where there is no such file, or the server does not send parts of it."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repository, filename, revision=commit)
    length_text = _range(url, 0, LENGTH_BYTES)
    if length_text is None:
        return None
    length = int.from_bytes(length_text, "little")
    text = _range(url, LENGTH_BYTES, LENGTH_BYTES + length) if length <= MAX_HEADER_BYTES else None
    return None if text is None else parse_header(text)


def _range(url: str, start: int, end: int) -> bytes | None:
    """The bytes of a file from `start` to before `end`; nothing is read of an answer that is not that range."""
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code != PARTIAL_CONTENT:
            return None
        content: bytes = response.read()
    return content if len(content) == end - start else None
