"""Finds the config of the model that a profile names: a local directory, a `config.json`, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.graph.model import TensorName

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
"""What may be the name of a repository on the hub, with or without its owner."""

SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating dtypes of a safetensors header, as torch names them."""

ASSUMED_DTYPE = "float32"
"""What transformers loads in where nothing tells."""

COMMIT = re.compile("[0-9a-f]{40}")

COMPARED_BYTES = 2**20
"""How much of two tensors is compared at once."""

CONNECTION_TIMEOUT_SECONDS = 5

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own bound on a header."""


class ModelNotFoundError(Exception):
    """No config was found; the text says where was looked."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a revision of a hub id resolved to before. `source` is `None` where a lock of version 1 did not keep it."""

    commit: str
    source: str | None = None
    revision: str | None = None

    def holds_for(self, source: str, revision: str | None) -> bool:
        """Whether it was this source and revision that was resolved."""
        return self.source is None or (self.source, self.revision) == (source, revision)


@dataclass(frozen=True)
class ModelSource:
    """A model's config, and where it came from.

    `location` is the directory or `config.json` to build from; `weights` the directory or hub id that `from_pretrained`
    takes, `None` where there is only a config. `commit` is what a hub revision resolved to, and `stored_dtype` what the
    checkpoint on the hub holds, where that was asked for because the config does not tell.
    """

    location: Path
    config: Mapping[str, Any]
    weights: str | None
    commit: str | None = None
    stored_dtype: str | None = None

    @contextmanager
    def as_config(self) -> Iterator[Path]:
        """What transformers reads the config from; one that stands in a vendored graph is written out for it."""
        if self.location.is_dir() or not self.location.name.endswith(".graph.json"):
            yield self.location
            return
        with TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(dict(self.config)), encoding="utf-8")
            yield Path(directory)

    @property
    def class_name(self) -> str | None:
        """The class that the config names first."""
        architectures = self.config.get("architectures") or [None]
        name: str | None = architectures[0]
        return name

    @property
    def counted_config(self) -> dict[str, Any]:
        """The parsed config without what changes nothing: which version wrote it."""
        return {key: value for key, value in self.config.items() if key != "transformers_version"}

    @property
    def config_digest(self) -> str:
        """A digest of the parsed config: neither the layout of the file nor who wrote it counts."""
        return digest(self.counted_config)

    def checkpoint_dtype(self) -> str | None:
        """The dtype that transformers' `auto` loads in, as far as the config or a local checkpoint tells."""
        if (declared := _declared_dtype(self.config)) is not None:
            return declared
        directory = self.location if self.location.is_dir() else self.location.parent
        for path in sorted(directory.glob("*.safetensors")):
            if dtype := _first_dtype(_safetensors_header(path)):
                return dtype
        return self.stored_dtype

    def stored_apart(self, ties: Iterable[tuple[TensorName, TensorName]]) -> frozenset[tuple[TensorName, TensorName]]:
        """The ties of which a local checkpoint holds both tensors, with different values.

        transformers then loads two tensors, whatever the config says (flan-t5 has a head of its own).
        """
        if self.weights is None or not self.location.is_dir():
            return frozenset()
        stored = _stored_tensors(self.location)
        return frozenset(
            (target, source)
            for target, source in ties
            if target in stored and source in stored and not _are_equal(stored[target], stored[source])
        )

    def dtype_for(self, wanted: str) -> str:
        """The dtype that weights are loaded in, where `auto` is wanted as well."""
        return wanted if wanted != "auto" else self.checkpoint_dtype() or ASSUMED_DTYPE


def digest(value: object) -> str:
    """A digest of plain data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def local_source(path: Path) -> ModelSource:
    """The model in a directory, or that of a `config.json` alone.

    Raises:
        ModelNotFoundError: where there is no readable config.
    """
    config_path = path / "config.json" if path.is_dir() else path
    has_weights = path.is_dir() and any(_weight_files(path))
    return ModelSource(location=path, config=_read_config(config_path), weights=str(path) if has_weights else None)


def hub_source(
    repository: str, revision: str | None, *, commit: str | None = None, must_ask: bool = False
) -> ModelSource:
    """The model in a repository of the hub: its cached config, or, on line, the current one.

    Args:
        repository: the hub id.
        revision: a branch, tag or commit; the default branch where it is `None`.
        commit: a commit that is known already, which then is what is read.
        must_ask: whether only the hub itself can say what a branch is now, and not what its cache remembers.

    Raises:
        ModelNotFoundError: where the hub and its cache have no such repository, revision or config.
    """
    import logging

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries are told by what comes of them
    wanted = commit or revision
    is_fixed = wanted is not None and COMMIT.fullmatch(wanted) is not None
    if must_ask and not is_fixed and not _hub_answers():
        raise ModelNotFoundError(
            f"the hub cannot be reached, and only it knows what `{repository}` is at `{revision or 'main'}` now"
        )
    try:
        try:
            # What a commit holds never changes: the cache is asked first. A branch is asked of the hub.
            cached_only = is_fixed or not _hub_answers()
            path = Path(hf_hub_download(repository, "config.json", revision=wanted, local_files_only=cached_only))
        except LocalEntryNotFoundError:
            if not is_fixed or not _hub_answers():
                raise
            path = Path(hf_hub_download(repository, "config.json", revision=wanted))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"`{repository}` is no local path, it is not in the hub's cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError as error:
        raise ModelNotFoundError(f"`{repository}` on the hub has no config.json") from error
    except Exception as error:  # what the hub client raises has many types and no common one
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"`{repository}` is neither a local path nor to be had from the hub: {first_line.rstrip('.')}"
        raise ModelNotFoundError(message) from error
    # The cache keeps files under `snapshots/<commit>/`.
    config, resolved = _read_config(path), path.parent.name
    stored_dtype = None
    if _declared_dtype(config) is None:
        from devmap_config.graph.hub_headers import stored_header

        stored_dtype = _first_dtype(stored_header(repository, resolved, may_ask=_hub_answers))
    return ModelSource(
        location=path.parent, config=config, weights=repository, commit=resolved, stored_dtype=stored_dtype
    )


def cached_hub_config(repository: str, commit: str) -> Mapping[str, Any] | None:
    """The config of a commit, where the hub's cache has it; without the hub's client, which takes long to import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    folder = Path(cache).expanduser() / f"models--{repository.replace('/', '--')}"
    try:
        return _read_config(folder / "snapshots" / commit / "config.json")
    except ModelNotFoundError:
        return None


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: its client would find out after half a minute of retries."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies():
        return True
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=CONNECTION_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def is_hub_id(text: str) -> bool:
    """Whether a source may be the name of a repository on the hub."""
    return HUB_ID.fullmatch(text) is not None


def _declared_dtype(config: Mapping[str, Any]) -> str | None:
    declared = config.get("dtype") or config.get("torch_dtype")
    return declared.removeprefix("torch.") if isinstance(declared, str) and declared != "auto" else None


def _first_dtype(header: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The dtype of a header's first floating tensor, which is what transformers goes by."""
    found = (SAFETENSORS_DTYPES.get(entry.get("dtype", "")) for entry in header.values())
    return next((dtype for dtype in found if dtype), None)


def _weight_files(directory: Path) -> list[Path]:
    return [*directory.glob("*.safetensors"), *directory.glob("*.bin")]


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"there is no `{path.name}` in `{path.parent.name}`") from error
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"`{path.name}` is not a config that can be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"`{path.name}` is not a config: it holds no JSON object")
    return config


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies in a file, in bytes from the file's beginning."""

    path: Path
    start: int
    end: int


def _stored_tensors(directory: Path) -> dict[str, _StoredTensor]:
    stored = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            data_start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in _safetensors_header(path).items():
            start, end = entry["data_offsets"]
            stored[name] = _StoredTensor(path, data_start + start, data_start + end)
    return stored


def _are_equal(first: _StoredTensor, second: _StoredTensor) -> bool:
    """Whether two tensors hold the same bytes; where they do not, that shows in the first of them."""
    remaining = first.end - first.start
    if remaining != second.end - second.start:
        return False
    with first.path.open("rb") as left, second.path.open("rb") as right:
        left.seek(first.start)
        right.seek(second.start)
        while remaining > 0:
            count = min(remaining, COMPARED_BYTES)
            if left.read(count) != right.read(count):
                return False
            remaining -= count
    return True


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return {}
        return parse_header(file.read(length))


def parse_header(text: bytes) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors header, which is JSON.

    Raises:
        ValueError: where it is no JSON.
    """
    header = json.loads(text)
    entries = header.items() if isinstance(header, dict) else ()
    return {name: entry for name, entry in entries if name != "__metadata__" and isinstance(entry, dict)}
