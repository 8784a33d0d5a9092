"""Things that can be in place of a file: directories, links, pipes, and files that cannot be used."""

from __future__ import annotations

import os
import shutil
import socket

UNTOLD = "what-nobody-may-see"

SPARSE_BYTES = 20 * 2**30

NESTED = b"[" * 200_000


def remove(path):
    """Remove a file or directory, so that something else can take its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(target):
    return lambda path, _: path.symlink_to(target)


def content(made_of):
    return lambda path, before: path.write_bytes(made_of(before))


def bound_socket(path, _):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's path is at most 108 bytes long


def sparse(path, _):
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def outside(path, _):
    """Make a link to a file outside the repository, whose content must never be shown."""
    secret = path.parents[len(path.relative_to(path.cwd()).parts)] / "secret"
    secret.write_text(f"{UNTOLD}: {UNTOLD}\n")
    path.symlink_to(secret)


NO_FILES = {
    "pipe": lambda path, _: os.mkfifo(path),
    "socket": bound_socket,
    "folder": lambda path, _: path.mkdir(),
    "device": link("/dev/zero"),
    "broken link": link("gone"),
    "loop": lambda path, _: path.symlink_to(path.name),
}
"""Functions that put something other than a regular file in a file's place; each is given the file's bytes."""

FILES = {
    "link to outside": outside,
    "empty": content(lambda _: b""),
    "byte order mark": content(lambda before: b"\xef\xbb\xbf" + before),
    "latin-1": content(lambda before: b"caf\xe9: 1\n" + before),
    "NUL": content(lambda _: b"\0" * 1000),
    "nested": content(lambda _: NESTED),
    "sparse": sparse,
}
"""Files that cannot be used."""

BAD = {**NO_FILES, **FILES}


def put(name, path):
    """Replace a file with something that cannot be read as one."""
    before = path.read_bytes()
    remove(path)
    BAD[name](path.absolute(), before)
