"""Reads files within bounds, and writes them whole or not at all. Nothing else in the package opens a file.

A profile, the model that it names and the locks beside it may come from a stranger. Only regular files are read, up to
the size limit of their kind, and no link is followed out of a repository.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import sys
import tempfile
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, NamedTuple, TextIO
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Kind(NamedTuple):
    """A kind of file with its limits: the size in bytes, the `reason` for that limit, and the depth of its JSON."""

    max_bytes: int
    reason: str
    max_depth: int = 32


PROFILE = Kind(4_000_000, "a million characters of four bytes each, and no more is read of a YAML file")
CONFIG = Kind(16_000_000, "eight times a config that names 21,841 classes")
INDEX = Kind(100_000_000, "twenty times the index of a model of 90,000 tensors")
HEADER = Kind(100_000_000, "the bound that safetensors has on a header (`MAX_HEADER_SIZE`)")
LOCK = Kind(64_000_000, "eight times a lock that places 90,000 tensors one by one")
DEVICE_MAP = Kind(64_000_000, "ten times a map that names 90,000 tensors")
GRAPH = Kind(200_000_000, "ten times the graph of a model of 90,000 tensors", max_depth=200)  # modules lie in modules
PACKAGED = Kind(10_000_000, "more than any file of code or of figures that comes with a package")
IMAGE = Kind(64_000_000, "more than a photograph of a hundred megapixels")
SOUND = Kind(128_000_000, "ten minutes of two channels, 48,000 times a second")
REQUEST = Kind(4_000_000, "a million tokens of text, in JSON")
KERNEL = Kind(16_000_000, "more than the mounts of a host with ten thousand containers")


Code = Literal["missing-file", "outside-repository", "syntax", "too-large"]


class FileError(Exception):
    """A file cannot be read; the text says why, as the predicate of its name.

    Attributes:
        code: the code of the diagnostic for this error.
        help: what to do.
        is_absent: whether nothing of that name exists.
        line: the line of the mistake, from 1, if it has a place.
        column: the column in that line, from 1.
    """

    def __init__(
        self, message: str, code: Code, help: str, *, is_absent: bool = False, line: int = 1, column: int = 1
    ) -> None:
        super().__init__(message)
        self.code = code
        self.help = help
        self.is_absent = is_absent
        self.line = line
        self.column = column


@dataclass(frozen=True)
class Boundary:
    """The folder that links must not lead out of; `None` if they may lead anywhere."""

    folder: Path | None

    def holds(self, path: Path) -> bool:
        """Return whether a path stays within the folder, its links followed."""
        return self.folder is None or real_path(path).is_relative_to(self.folder)


ANYWHERE = Boundary(None)


def boundary_of(file: Path, *, allow_outside: bool = False) -> Boundary:
    """Return the repository of a file: the nearest folder above it with a `.git`, else its own folder.

    In the cache of the hub's client, it is the folder of the model: its snapshots link to its blobs.
    """
    if allow_outside:
        return ANYWHERE
    folder = real_path(file.parent)
    return Boundary(next((parent for parent in (folder, *folder.parents) if _is_repository(parent)), folder))


def _is_repository(folder: Path) -> bool:
    return exists(folder / ".git") or all(is_folder(folder / name) for name in ("snapshots", "blobs"))


def exists(path: Path) -> bool:
    """Return whether a path exists, even as a broken link; unlike the method, this never raises."""
    return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    """Return whether a path, its links followed, is a folder; unlike the method, this never raises."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Return whether a path, its links followed, is a regular file; unlike the method, this never raises."""
    return os.path.isfile(path)  # noqa: PTH113


def real_path(path: Path) -> Path:
    """Return a path with its links resolved; unlike the method, this never raises: a loop resolves to itself."""
    return Path(os.path.realpath(path))


@contextmanager
def opened(path: Path, within: Boundary | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading; the caller bounds how much is read.

    Args:
        path: the file.
        within: the folder that its links may not lead out of; with `None`, its repository.

    Raises:
        FileError: if the file does not exist, is not a regular file, lies outside of `within`, or may not be read.
    """
    try:
        descriptor = _descriptor(path, within or boundary_of(path))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise _unreadable(path, error) from error


def _descriptor(path: Path, boundary: Boundary) -> int:
    resolved = Path(os.path.realpath(path, strict=True))
    if boundary.folder is not None and not resolved.is_relative_to(boundary.folder):
        help = "keep the file within the repository, name it itself, or pass `--allow-outside` where there is one"
        raise FileError("is a link that leads out of the repository", "outside-repository", help)
    descriptor = os.open(resolved, FLAGS)
    try:
        _require_regular(os.fstat(descriptor).st_mode)
    except FileError:
        os.close(descriptor)
        raise
    return descriptor


FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_NOFOLLOW", "O_BINARY"))
"""Opening must not wait for the writer of a pipe, nor follow a link that replaced the file since it was checked."""


def require_regular(path: Path) -> None:
    """Raise `FileError` if a path, its links followed, is not a regular file; nothing is opened."""
    try:
        _require_regular(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
        raise FileError(what, "missing-file", "name a file")


def _unreadable(path: Path, error: OSError | ValueError) -> FileError:
    if not isinstance(error, OSError):
        return FileError("is not a name that a file can have", "missing-file", "name a file")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        is_link = path.is_symlink()
        what = "is a link to a file that is not there" if is_link else "does not exist"
        return FileError(what, "missing-file", "name a file that is there", is_absent=not is_link)
    if error.errno == errno.ELOOP:
        return FileError("is a link that leads back to itself", "missing-file", "name a file that is there")
    if error.errno == errno.ENXIO:
        return FileError("is not a regular file", "missing-file", "name a file")  # a socket
    return FileError(f"cannot be read: {error.strerror}", "missing-file", "check that it may be read")


def read_bytes(path: Path, kind: Kind, within: Boundary | None = None) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileError: as `opened`, and if the file is larger than its kind may be.
    """
    with opened(path, within) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        # Files of the kernel have no size before they are read, and a file may grow meanwhile.
        data = b"" if size_bytes > kind.max_bytes else file.read(kind.max_bytes + 1)
    if max(size_bytes, len(data)) > kind.max_bytes:
        help = f"name another file: {kind.max_bytes:,} bytes are {kind.reason}"
        raise FileError(f"is larger than {kind.max_bytes:,} bytes", "too-large", help)
    return data


def read_text(path: Path, kind: Kind, within: Boundary | None = None) -> str:
    """Return the text of a file.

    Raises:
        FileError: as `read_bytes`, and if it is not UTF-8, or begins with a byte order mark.
    """
    return decoded(read_bytes(path, kind, within))


def kernel_text(path: Path) -> str:
    """Return the text of a file of `/proc` or `/sys`; an empty text if there is no such file."""
    try:
        return read_bytes(path, KERNEL, ANYWHERE).decode("utf-8", errors="replace")
    except FileError:
        return ""


def decoded(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        FileError: with the place, if the data are not UTF-8, or begin with a byte order mark.
    """
    if data.startswith(BYTE_ORDER_MARKS):
        raise FileError("begins with a byte order mark", "syntax", "save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = LINE_BREAK.split(data[: error.start].decode("utf-8"))
        line, column = len(before), len(before[-1]) + 1
        message = f"is not UTF-8 at line {line}, column {column}"
        raise FileError(message, "syntax", "save it as UTF-8", line=line, column=column) from error


LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""Matches the end of a line, as libyaml counts lines."""

BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
"""The marks of UTF-8, and of UTF-16, which is not read."""


def read_json(path: Path, kind: Kind, within: Boundary | None = None) -> Any:
    """Return the JSON value that a file holds.

    Raises:
        FileError: as `read_text`, and as `parse_json`.
    """
    return parse_json(read_text(path, kind, within), kind)


Pairs = list[tuple[str, Any]]


def parse_json(text: str, kind: Kind, *, object_of: Callable[[Pairs], Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        kind: the kind of file that the text comes from.
        object_of: makes an object of its pairs, like `object_pairs_hook` of `json.loads`.

    Raises:
        FileError: if the text is not JSON, is nested deeper than its kind may be, or holds too many values or half a
            character.
    """
    _check_size(text, kind.max_depth)
    try:
        value = json.loads(text, object_pairs_hook=object_of)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        message = f"is not JSON at line {error.lineno}, column {error.colno}"
        raise FileError(message, "syntax", "mend it", line=error.lineno, column=error.colno) from error
    except UnicodeEncodeError as error:
        raise FileError("holds text that is no Unicode", "syntax", "mend it") from error
    except ValueError as error:  # a number of thousands of digits
        raise FileError(f"is not JSON that can be read: {error}", "syntax", "mend it") from error
    return value


HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""Matches half of a surrogate pair of UTF-16, which alone is no Unicode character."""

ESCAPE = re.compile(rb"\\.", re.DOTALL)
STRING = re.compile(rb'"[^"]*"?')
ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))


MAX_VALUES = 4_000_000
"""Five times as many as in a header of 90,000 tensors; each takes about a hundred bytes once it is parsed."""


def _check_size(text: str, max_depth: int) -> None:
    """Refuse a JSON text that is too deep or would take too much memory, by counting brackets and commas before
    parsing.
    """
    data = text.encode("utf-8", "surrogatepass")
    unescaped = ESCAPE.sub(b"", data) if b"\\" in data else data
    # Strings may hold brackets of their own; most hold none, and are empty once only brackets and quotes are left.
    brackets = STRING.sub(b"", unescaped.translate(None, ALL_BUT_BRACKETS).replace(b'""', b""))
    if len(brackets) // 2 + data.count(b",") > MAX_VALUES:
        raise FileError(f"holds more than {MAX_VALUES:,} values", "too-large", "name another file")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise FileError(f"is nested deeper than {max_depth}", "too-large", "flatten it")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it, and no unfinished file is left behind.

    Raises:
        OSError: if it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # the mode that `open` would have given it
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_standard_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed, so that no file that is opened later takes their number.
    Writing to a stdout that was closed fails, as on a full disk; what is written to stderr is dropped.
    """
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def discard_output(stream: TextIO) -> None:
    """Discard what a stream still buffers, so that the interpreter does not try to write it again when it ends."""
    with suppress(io.UnsupportedOperation):  # a stream in memory has no file number
        number = stream.fileno()
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)


CAST = "cast-"
"""The beginning of the names of files in an offload folder that hold a tensor in another dtype, each made only once."""


class HeldFolder:
    """A lock on a folder that this process holds as long as this object exists; it leaves no file behind."""

    _known: ClassVar[WeakValueDictionary[tuple[int, int], HeldFolder]] = WeakValueDictionary()

    def __init__(self, descriptor: int) -> None:
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, folder: Path) -> HeldFolder | None:
        """Lock a folder, which is made if needed; return `None` if this system or its disk cannot lock.

        Raises:
            BlockingIOError: if another process holds it.
        """
        if fcntl is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            return None
        state = os.fstat(descriptor)
        if (known := cls._known.get((state.st_dev, state.st_ino))) is not None:
            os.close(descriptor)
            return known
        held = cls(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return None
        return cls._known.setdefault((state.st_dev, state.st_ino), held)
