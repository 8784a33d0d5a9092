"""Reads the headers of a checkpoint's safetensors files: names, dtypes, shapes and offsets, but no weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.files import ANYWHERE, HEADER, INDEX, FileError, decoded, exists, opened, parse_json, read_json
from devmap_config.graph.digest import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import TypeGuard

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.files import Boundary

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""The file that transformers looks for if the weights are in several files."""

ADAPTER_FILE = "adapter_model.safetensors"
"""The file of an adapter that PEFT trains; it is no checkpoint of a model."""

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, as a little-endian integer."""

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element by the dtypes of a header (safetensors' `Dtype`)."""

GIT_LFS = b"version "
"""The first eight bytes of a git-lfs pointer; a safetensors file has the length of its header there."""

COMPARED_BYTES = 2**20
"""The bytes of two tensors that are compared at once."""


class CheckpointError(Exception):
    """The files of a checkpoint cannot be used; the text names the file, `help` says what to do."""

    def __init__(self, code: ErrorCode, message: str, help: str) -> None:
        self.code = code
        self.help = help
        super().__init__(message)


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its dtype in safetensors' words, its shape, and its bytes from `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint.

    Attributes:
        file_bytes: the size of each file, by its name.
        tensors: every tensor, by its name in the checkpoint.
        folder: the folder of the files; `None` if only their headers are at hand.
    """

    file_bytes: Mapping[str, int]
    tensors: Mapping[str, StoredTensor]
    folder: Path | None = None

    @cached_property
    def digest(self) -> str:
        """A digest of names, shapes and dtypes, and of the files' sizes."""
        tensors = {name: [tensor.dtype, list(tensor.shape)] for name, tensor in self.tensors.items()}
        return digest({"files": dict(self.file_bytes), "tensors": tensors})

    @property
    def summary(self) -> dict[str, int]:
        """The figures that a lock records, in order to say later what changed."""
        return {
            "file_count": len(self.file_bytes),
            "tensor_count": len(self.tensors),
            "size_bytes": sum(self.file_bytes.values()),
        }

    def holds_equal(self, first: str, second: str) -> bool:
        """Return whether two of its tensors hold the same bytes; reading stops at the first difference."""
        if self.folder is None:
            raise ValueError("only the headers of this checkpoint are at hand")
        one, other = self.tensors[first], self.tensors[second]
        remaining = one.end - one.start
        if remaining != other.end - other.start:
            return False
        # Reading the headers has checked that these files may be read.
        with opened(self.folder / one.file, ANYWHERE) as left, opened(self.folder / other.file, ANYWHERE) as right:
            left.seek(one.start)
            right.seek(other.start)
            while remaining > 0:
                count = min(remaining, COMPARED_BYTES)
                if left.read(count) != right.read(count):
                    return False
                remaining -= count
        return True


def read_checkpoint(folder: Path, config: Mapping[str, Any], within: Boundary | None = None) -> Checkpoint | None:
    """Return the headers of the checkpoint in a folder, from the files that transformers would load; `None` without
    weights.

    Args:
        folder: the model's folder.
        config: its config, which may name the file of weights (`transformers_weights`).
        within: the folder that its links may not lead out of; with `None`, its repository.

    Raises:
        CheckpointError: if there are weights that cannot be loaded: pickles, truncated or garbled files, broken links,
            or missing shards of an index.
    """
    names = _file_names(folder, config, within)
    if names is None:
        return None
    file_bytes: dict[str, int] = {}
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        file_bytes[name], header = _read_file(folder / name, within)
        tensors |= {tensor: StoredTensor(*entry[:2], name, *entry[2:]) for tensor, entry in header.items()}
    return Checkpoint(file_bytes, tensors, folder)


def _file_names(folder: Path, config: Mapping[str, Any], within: Boundary | None) -> list[str] | None:
    explicit = config.get("transformers_weights")
    for name in [explicit] if isinstance(explicit, str) else [SINGLE_FILE, INDEX_FILE]:
        path = folder / name
        if exists(path):
            return index_files(read_index(path, within), name) if name.endswith(".json") else [_within(name, name)]
    if isinstance(explicit, str):
        raise _unreadable(explicit, "is named by the config's `transformers_weights`, and is not there")
    _refuse_other_weights(folder)
    return None


def _refuse_other_weights(folder: Path) -> None:
    """Refuse weights in unsupported formats, if there are no others."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.endswith(".gguf"):
            raise CheckpointError(
                "no-safetensors",
                f"`{name}` is a GGUF, which llama.cpp loads; transformers would make it dense while loading",
                "name a checkpoint in safetensors, with its config.json",
            )
        if name.startswith(("pytorch_model", "model", "consolidated")) and name.endswith(PICKLE_ENDINGS):
            raise CheckpointError(
                "no-safetensors",
                f"`{name}` is a pickle: loading it may run any code, and it tells nothing without being loaded",
                conversion_help(folder),
            )
        if name.endswith(".safetensors") and name != ADAPTER_FILE:
            raise _unreadable(name, f"has a name that transformers does not look for: it wants `{SINGLE_FILE}`")


def conversion_help(folder: Path) -> str:
    """Return the command that converts a trusted checkpoint to safetensors."""
    script = (
        "import sys, transformers as t; c = t.AutoConfig.from_pretrained(sys.argv[1]); "
        "getattr(t, c.architectures[0]).from_pretrained(sys.argv[1], dtype='auto', use_safetensors=False)"
        ".save_pretrained(sys.argv[1])"
    )
    return f'if you trust it, convert it once: `python -c "{script}" {folder}`'


def index_files(index: Any, name: str) -> list[str]:
    """Return the files that an index names, in order.

    Raises:
        CheckpointError: if it is not an index, or names files elsewhere.
    """
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise _unreadable(name, "is not an index: it has no `weight_map` from tensors to files")
    return [_within(file, name) for file in sorted(set(weight_map.values()))]


def _within(file: str, name: str) -> str:
    if "/" in file or "\\" in file or not file.endswith(".safetensors"):
        raise _unreadable(name, f"names `{file}`, which is not a safetensors file beside it")
    return file


def read_index(path: Path, within: Boundary | None = None) -> Any:
    """Return the JSON value of an index.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        return read_json(path, INDEX, within)
    except FileError as error:
        raise _unreadable(path.name, str(error)) from error


Header = dict[str, tuple[str, tuple[int, ...], int, int]]
"""The dtype, the shape, and the first and last offset in the file, by name of the tensor."""


def read_header(path: Path, within: Boundary | None = ANYWHERE) -> Header:
    """Return the tensors of one safetensors file.

    Raises:
        CheckpointError: if it is not one, or a link leads out of the folder that it must be `within`.
    """
    return _read_file(path, within)[1]


def _read_file(path: Path, within: Boundary | None) -> tuple[int, Header]:
    try:
        with opened(path, within) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            length = header_length(file.read(LENGTH_BYTES), size_bytes, path.name)
            return size_bytes, parse_header(file.read(length), size_bytes, path.name)
    except FileError as error:
        raise _unreadable(path.name, "is named by the index, and missing" if error.is_absent else str(error)) from error


def header_length(first_bytes: bytes, size_bytes: int, name: str) -> int:
    """Return the length of the JSON after the first eight bytes of a safetensors file of this size and name.

    Raises:
        CheckpointError: if the length is impossible.
    """
    if first_bytes == GIT_LFS:
        raise CheckpointError(
            "unreadable-checkpoint",
            f"`{name}` is a pointer of git-lfs, and not the file that it stands for",
            "run `git lfs pull` in its folder",
        )
    length = int.from_bytes(first_bytes, "little")
    if len(first_bytes) < LENGTH_BYTES:
        raise _unreadable(name, "is empty" if not first_bytes else "is cut off in its first bytes")
    if length > HEADER.max_bytes or not length:
        raise _unreadable(name, "is not a safetensors file: it does not begin with a header")
    if LENGTH_BYTES + length > size_bytes:
        raise _unreadable(name, "is cut off in its header, or is not a safetensors file")
    return length


def parse_header(text: bytes, size_bytes: int, name: str) -> Header:
    """Return the tensors of a safetensors header, which is JSON.

    Args:
        text: the header.
        size_bytes: the size of the whole file.
        name: the file's name, for messages.

    Raises:
        CheckpointError: if it is not one, or is impossible for a file of this size.

    >>> parse_header(b'{"weight": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}', 90, "x.safetensors")
    {'weight': ('F16', (2, 3), 78, 90)}
    """
    try:
        value = parse_json(decoded(text), HEADER)
    except FileError as error:
        raise _unreadable(name, f"is not a safetensors file: its header {error}") from None
    if not isinstance(value, dict):
        raise _unreadable(name, "is not a safetensors file: its header is not a JSON object")
    data_start = LENGTH_BYTES + len(text)
    entries = {tensor: entry for tensor, entry in value.items() if tensor != "__metadata__"}
    header = {tensor: _parse_entry(tensor, entry, data_start, name) for tensor, entry in entries.items()}
    _check_layout(header, data_start, size_bytes, name)
    return header


def _parse_entry(tensor: str, entry: Any, data_start: int, name: str) -> tuple[str, tuple[int, ...], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _unreadable(name, f"says of `{tensor}` neither dtype, shape nor place that can be read")
    start, end = offsets
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != 8 * (end - start):
        raise _unreadable(name, f"gives `{tensor}` of {dtype} {list(shape)} {end - start:,} bytes")
    return dtype, tuple(shape), data_start + start, data_start + end


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(header: Header, data_start: int, size_bytes: int, name: str) -> None:
    """Check that the tensors fill the file without gaps, as safetensors requires."""
    position = data_start
    for tensor, (_, _, start, end) in sorted(header.items(), key=lambda item: item[1][2:]):
        if start != position or end < start:
            raise _unreadable(name, f"is damaged: `{tensor}` does not begin where the tensor before it ends")
        position = end
    if position > size_bytes:
        raise _unreadable(name, f"is cut off: {position - size_bytes:,} of {position:,} bytes are missing")
    if position < size_bytes:
        raise _unreadable(name, f"is damaged: {size_bytes - position:,} bytes follow its last tensor")


def _unreadable(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        "unreadable-checkpoint", f"`{name}` {what}", "download the file again, or name another checkpoint"
    )


def first_floating_dtype(tensors: Iterable[StoredTensor]) -> str | None:
    """Return torch's name of the dtype of the first floating-point tensor, which decides in transformers."""
    dtypes = (SAFETENSORS_DTYPES.get(tensor.dtype) for tensor in tensors)
    return next((dtype for dtype in dtypes if dtype), None)


SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of the floating-point dtypes in a safetensors header that models are loaded in."""
