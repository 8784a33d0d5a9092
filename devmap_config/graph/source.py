"""Finds the config of the model that a profile names: a local directory, a `config.json`, or a hub id."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from devmap_config.files import CONFIG, FileError, exists, is_folder, read_json
from devmap_config.graph.checkpoint import CheckpointError, first_floating_dtype, read_checkpoint
from devmap_config.graph.digest import digest
from devmap_config.graph.other_formats import ORIGINAL, names_gguf, other_format
from devmap_config.libraries.messages import without_retries
from devmap_config.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from devmap_config.files import Boundary
    from devmap_config.graph.checkpoint import Checkpoint
    from devmap_config.graph.model import TensorName
    from devmap_config.profile.loading import LoadedProfile

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
"""Matches the name of a repository on the hub, with or without its owner."""

ASSUMED_DTYPE = "float32"
"""The dtype in which transformers loads a model if neither the config nor the profile names one."""

COMMIT = re.compile("[0-9a-f]{40}")

CONNECTION_TIMEOUT_SECONDS = 5


class ModelNotFoundError(Exception):
    """No config was found; the text says where it was searched, `help` what to do, if that is known."""

    def __init__(self, message: str, help: str | None = None) -> None:
        super().__init__(message)
        self.help = help


@dataclass(frozen=True, slots=True)
class Resolved:
    """A revision of a hub id that was resolved to a commit earlier.

    Attributes:
        source: the hub id; `None` if a lock of version 1 did not keep it.
        checkpoint: the digest of the headers of that commit, if they were read.
    """

    commit: str
    source: str | None = None
    revision: str | None = None
    checkpoint: str | None = None

    def holds_for(self, source: str, revision: str | None) -> bool:
        """Return whether this source and revision are those that were resolved."""
        return self.source is None or (self.source, self.revision) == (source, revision)


@dataclass(frozen=True)
class ModelSource:
    """A model's config and checkpoint, and their origin.

    Attributes:
        location: the directory or `config.json` to build from.
        config: the parsed config.
        weights: the directory or hub id that `from_pretrained` takes; `None` if there is only a config.
        commit: the commit that a hub revision resolved to.
        stored_dtype: the dtype of the checkpoint, if the config does not state it.
        checkpoint: the headers of the checkpoint, if they are at hand.
        known_checkpoint: the digest of the same commit's headers, if they were read before but are not at hand now.
    """

    location: Path
    config: Mapping[str, Any]
    weights: str | None
    commit: str | None = None
    stored_dtype: str | None = None
    checkpoint: Checkpoint | None = None
    known_checkpoint: str | None = None

    @contextmanager
    def as_config(self) -> Iterator[Path]:
        """Yield a path to the config for transformers; that of a vendored graph is written to a temporary file."""
        if is_folder(self.location) or not self.location.name.endswith(".graph.json"):
            yield self.location
            return
        with TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(dict(self.config)), encoding="utf-8")
            yield Path(directory)

    @property
    def repository(self) -> tuple[str, str] | None:
        """The hub id and the commit of the config."""
        return None if self.weights is None or self.commit is None else (self.weights, self.commit)

    @property
    def class_name(self) -> str | None:
        """The first class that the config names; `None` if it names none, or the entry is not a name."""
        architectures = self.config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        return first if isinstance(first, str) else None

    @property
    def counted_config(self) -> dict[str, Any]:
        """The parsed config without the version of the library that wrote it, which has no effect."""
        return {key: value for key, value in self.config.items() if key != "transformers_version"}

    @property
    def config_digest(self) -> str:
        """A digest of the parsed config, whatever the layout of the file and the version that wrote it."""
        return digest(self.counted_config)

    @property
    def checkpoint_digest(self) -> str | None:
        """A digest of the checkpoint's names, shapes, dtypes and file sizes; `None` if they were never read."""
        return self.known_checkpoint if self.checkpoint is None else self.checkpoint.digest

    def checkpoint_dtype(self) -> str | None:
        """Return the dtype that transformers' `auto` loads in, if the config or the checkpoint has one."""
        return _declared_dtype(self.config) or self.stored_dtype

    def stored_apart(self, ties: Iterable[tuple[TensorName, TensorName]]) -> frozenset[tuple[TensorName, TensorName]]:
        """Return the ties whose two tensors a local checkpoint holds with different values.

        transformers then loads two tensors, whatever the config says (flan-t5 has a separate head).
        """
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.folder is None:
            return frozenset()
        stored = checkpoint.tensors
        return frozenset(
            (target, source)
            for target, source in ties
            if target in stored and source in stored and not checkpoint.holds_equal(target, source)
        )

    def dtype_for(self, wanted: str) -> str:
        """Return the dtype that weights are loaded in; `auto` is resolved."""
        return wanted if wanted != "auto" else self.checkpoint_dtype() or ASSUMED_DTYPE


def local_source(path: Path, within: Boundary | None = None) -> ModelSource:
    """Return the model in a directory, or that of a `config.json` alone.

    Links of its files must not lead out of `within` or, without that, of its own repository.

    Raises:
        ModelNotFoundError: if there is no readable config.
        CheckpointError: if there are weights that cannot be loaded.
    """
    if (other := other_format(path, within)) is not None:
        raise ModelNotFoundError(other.message, other.help)
    if is_folder(path):
        config = _read_config(path / "config.json", within)
        checkpoint = read_checkpoint(path, config, within)
        weights = None if checkpoint is None else str(path)
    else:
        config, weights, checkpoint = _read_config(path, within), None, None
    beside = checkpoint if is_folder(path) else _checkpoint_beside(path, config, within)
    return ModelSource(path, config, weights, stored_dtype=_undeclared_dtype(config, beside), checkpoint=checkpoint)


def _checkpoint_beside(path: Path, config: Mapping[str, Any], within: Boundary | None) -> Checkpoint | None:
    """Return the checkpoint in the folder of a config, which shows the dtype but is not loaded."""
    try:
        return read_checkpoint(path.parent, config, within)
    except (CheckpointError, OSError):
        return None


def _undeclared_dtype(config: Mapping[str, Any], checkpoint: Checkpoint | None) -> str | None:
    """Return the dtype of a checkpoint, if the config does not state it."""
    if checkpoint is None or _declared_dtype(config) is not None:
        return None
    return first_floating_dtype(checkpoint.tensors.values())


@dataclass(frozen=True, kw_only=True)
class HubAccess:
    """The options for access to the hub; options that are not set come from the environment of its client."""

    NAMES: ClassVar = ("cache_dir", "token", "local_files_only")

    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use these options for requests of this thread while the context lasts."""
        before = _ACCESS.set(self)
        try:
            yield
        finally:
            _ACCESS.reset(before)


_AS_CONFIGURED = HubAccess()

_ACCESS: ContextVar[HubAccess] = ContextVar("hub access")


@without_retries()
def hub_source(
    repository: str, revision: str | None, *, commit: str | None = None, must_ask: bool = False
) -> ModelSource:
    """Return the model in a repository of the hub: with its current config if online, else with the cached one.

    Args:
        repository: the hub id.
        revision: a branch, tag or commit; with `None`, the default branch.
        commit: a commit that the revision is known to resolve to, which is then read.
        must_ask: whether the hub itself must resolve a branch, and not its cache.

    Raises:
        ModelNotFoundError: if the hub and its cache have no such repository, revision or config.
        CheckpointError: if its weights cannot be loaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    requested = commit or revision
    is_fixed = requested is not None and COMMIT.fullmatch(requested) is not None
    if must_ask and not is_fixed and not _hub_answers():
        raise ModelNotFoundError(
            f"the hub cannot be reached, and only it knows what `{repository}` is at `{revision or 'main'}` now"
        )
    access = _ACCESS.get(_AS_CONFIGURED)
    had_by: dict[str, Any] = {"cache_dir": access.cache_dir, "token": access.token}
    download = partial(hf_hub_download, repository, "config.json", revision=requested, **had_by)
    try:
        try:
            # A commit never changes, so the cache is read first. A branch is resolved by the hub.
            path = Path(download(local_files_only=is_fixed or not _hub_answers()))
        except LocalEntryNotFoundError:
            if not is_fixed or not _hub_answers():
                raise
            path = Path(download())
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"`{repository}` is not a local path, it is not in the hub's cache, and the hub cannot be reached",
            ORIGINAL if names_gguf(repository) else None,
        ) from error
    except EntryNotFoundError as error:
        help = f"if it holds an adapter or GGUF files, {ORIGINAL}"
        raise ModelNotFoundError(f"`{repository}` on the hub has no config.json", help) from error
    except Exception as error:  # the errors of the hub's client have no common type
        reason = first_line(error) or type(error).__name__
        raise ModelNotFoundError(
            f"`{repository}` is neither a local path nor available from the hub: {reason}"
        ) from error
    # The cache keeps files under `snapshots/<commit>/`.
    from devmap_config.graph.hub_checkpoint import hub_checkpoint

    config, resolved = _read_config(path), path.parent.name
    token = _ACCESS.get(_AS_CONFIGURED).token
    checkpoint = hub_checkpoint(repository, resolved, config, path.parent, may_ask=_hub_answers, token=token)
    stored_dtype = _undeclared_dtype(config, checkpoint)
    return ModelSource(path.parent, config, repository, resolved, stored_dtype, checkpoint)


@without_retries()
def hub_file(repository: str, name: str, commit: str) -> Path:
    """Return a file of a repository of the hub at a commit, in the hub's cache.

    Raises:
        ModelNotFoundError: if neither the cache nor the hub has it.
    """
    from huggingface_hub import hf_hub_download

    access = _ACCESS.get(_AS_CONFIGURED)
    had_by: dict[str, Any] = {"cache_dir": access.cache_dir, "token": access.token, "revision": commit}
    try:
        if (path := _cached_snapshot(repository, commit) / name).is_file():
            return path
        return Path(hf_hub_download(repository, name, local_files_only=not _hub_answers(), **had_by))
    except Exception as error:  # the errors of the hub's client have no common type
        reason = first_line(error) or type(error).__name__
        raise ModelNotFoundError(f"`{name}` of `{repository}` is not available from the hub: {reason}") from error


def cached_checkpoint(repository: str, commit: str, config: Mapping[str, Any]) -> Checkpoint | None:
    """Return the headers of a commit's checkpoint, if they are available without a request to the hub."""
    from devmap_config.graph.hub_checkpoint import hub_checkpoint

    snapshot = _cached_snapshot(repository, commit)
    return hub_checkpoint(repository, commit, config, snapshot, may_ask=lambda: False)


def cached_hub_config(repository: str, commit: str) -> Mapping[str, Any] | None:
    """Return the config of a commit, if the hub's cache has it."""
    try:
        return _read_config(_cached_snapshot(repository, commit) / "config.json")
    except ModelNotFoundError:
        return None


def _cached_snapshot(repository: str, commit: str) -> Path:
    """Return the folder in which the hub's client keeps a commit, without the slow import of the client."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    named = (
        _ACCESS.get(_AS_CONFIGURED).cache_dir
        or os.environ.get("HF_HUB_CACHE")
        or os.environ.get("HUGGINGFACE_HUB_CACHE")
    )
    cache = named or Path(home) / "hub"
    folder = Path(cache).expanduser() / f"models--{repository.replace('/', '--')}"
    return folder / "snapshots" / commit


def _hub_answers() -> bool:
    """Return whether the hub can be reached, which its client would know only after half a minute of retries."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _ACCESS.get(_AS_CONFIGURED).local_files_only:
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
    """Return whether a source may be the id of a repository on the hub."""
    return HUB_ID.fullmatch(text) is not None


def _declared_dtype(config: Mapping[str, Any]) -> str | None:
    declared = config.get("dtype") or config.get("torch_dtype")
    return declared.removeprefix("torch.") if isinstance(declared, str) and declared != "auto" else None


def _read_config(path: Path, within: Boundary | None = None) -> Mapping[str, Any]:
    try:
        config = read_json(path, CONFIG, within)
    except FileError as error:
        if error.is_absent:
            help = "name a folder with a model's `config.json`, as `save_pretrained` writes it"
            raise ModelNotFoundError(f"there is no `{path.name}` in `{path.parent.name}`", help) from error
        raise ModelNotFoundError(f"`{path.name}` {error}", error.help) from error
    if not isinstance(config, dict):
        raise ModelNotFoundError(f"`{path.name}` is not a config: it holds no JSON object")
    return config


def source_from_here(loaded: LoadedProfile) -> str:
    """Return the model's source for use in a command: local paths are relative to the working directory."""
    source = loaded.profile.model.source
    return os.path.normpath(source.path) if is_local(loaded) else source.value


def is_local(loaded: LoadedProfile) -> bool:
    """Return whether a profile's model is a file or a folder, rather than on the hub."""
    return exists(loaded.profile.model.source.path)
