"""Only regular files within size limits are read, and reasons why a file cannot be read are reported."""

from __future__ import annotations

import ast
import errno
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from conftest import REPOSITORY

from devmap_config.files import (
    ANYWHERE,
    FileError,
    Kind,
    boundary_of,
    decoded,
    opened,
    parse_json,
    read_json,
    read_text,
)

SMALL = Kind(1000, "a bound for tests", max_depth=4)

SPARSE_BYTES = 10 * 2**30


def refused(path, kind=SMALL, within=None):
    with pytest.raises(FileError) as caught:
        read_text(path, kind, within)
    return caught.value


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "x").write_text("wörter\n", encoding="utf-8")
    assert read_text(tmp_path / "x", SMALL) == "wörter\n"


# -- what it is --------------------------------------------------------------------------------------------------------


def test_anything_but_a_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket"):
            assert str(refused(path)) == "is not a regular file"
    for device in ("zero", "null", "full"):
        (tmp_path / device).symlink_to(f"/dev/{device}")
        assert str(refused(tmp_path / device, within=ANYWHERE)) == "is not a regular file"
    assert str(refused(tmp_path)) == "is a folder"


def test_a_missing_file_is_reported(tmp_path):
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert (str(refused(tmp_path / "gone")), refused(tmp_path / "gone").is_absent) == ("does not exist", True)
    assert str(refused(tmp_path / "file" / "below")) == "does not exist"
    assert str(refused(tmp_path / "dangling")) == "is a link to a file that is not there"
    assert not refused(tmp_path / "dangling").is_absent
    assert str(refused(tmp_path / "loop")) == "is a link that leads back to itself"


@pytest.mark.parametrize("name", ["a\0b", "half \ud800"])
def test_a_name_that_no_file_can_have_is_reported(tmp_path, name):
    assert str(refused(tmp_path / name)) == "is not a name that a file can have"


def test_a_name_that_is_too_long_is_reported(tmp_path):
    assert str(refused(tmp_path / ("x" * 5000))) == "cannot be read: File name too long"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE])
def test_a_refusal_of_the_system_is_reported(tmp_path, monkeypatch, number):
    (tmp_path / "x").touch()

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    assert str(refused(tmp_path / "x")) == f"cannot be read: {os.strerror(number)}"


def test_a_failing_disk_is_reported(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(FileError, match="cannot be read: Input/output error"), opened(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_no_file_descriptor_stays_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "gone"):
        refused(path)
    assert len(list(descriptors.iterdir())) == before


# -- where it is -------------------------------------------------------------------------------------------------------


def test_a_link_out_of_the_repository_is_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "repository" / "profiles"
    folder.mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path / "secret")
    found = refused(folder / "out")
    assert (found.code, str(found)) == ("outside-repository", "is a link that leads out of the repository")
    assert read_text(folder / "out", SMALL, ANYWHERE) == "secret"
    (tmp_path / ".git").touch()  # now all of it is one repository: so is a worktree, which has a file of that name
    assert read_text(folder / "out", SMALL) == "secret"


def test_a_linked_folder_is_resolved(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("x")
    (tmp_path / "here").symlink_to("there")
    assert read_text(tmp_path / "here" / "x", SMALL) == "x"


def test_a_snapshot_of_the_hub_may_link_only_to_blobs_of_its_model(tmp_path):
    for model in ("models--a--b", "models--c--d"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "1").write_text(model)
        (tmp_path / model / "snapshots" / "commit").mkdir(parents=True)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "commit"
    (snapshot / "own").symlink_to("../../blobs/1")
    (snapshot / "other").symlink_to("../../../models--c--d/blobs/1")
    assert read_text(snapshot / "own", SMALL) == "models--a--b"
    assert refused(snapshot / "other").code == "outside-repository"
    assert boundary_of(snapshot / "own").holds(snapshot / "own")


def test_a_file_replaced_by_a_link_while_opening_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "x"
    path.write_text("x")
    real_open = os.open

    def swapped(name, flags):
        path.unlink()
        path.symlink_to(tmp_path / "secret")
        return real_open(name, flags)

    monkeypatch.setattr(os, "open", swapped)
    assert str(refused(path)) == "is a link that leads back to itself"


# -- how large it is ---------------------------------------------------------------------------------------------------


def test_a_file_of_many_gigabytes_is_refused_without_reading(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(SPARSE_BYTES)
    tracemalloc.start()
    try:
        found = refused(tmp_path / "sparse")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found.code, str(found)) == ("too-large", "is larger than 1,000 bytes")
    assert found.help == "name another file: 1,000 bytes are a bound for tests"
    assert peak_bytes < 10**6


def test_the_size_limit_holds_for_growing_files_and_files_without_a_size(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"x" * 1000)
    assert len(read_text(path, SMALL)) == 1000
    path.write_bytes(b"x" * 1001)
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((0o100644, *[0] * 9)))
    assert refused(path).code == "too-large"


# -- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "line", "column"),
    [
        (b"caf\xe9", 1, 4),
        (b"one\ntw\xff", 2, 3),
        (b"one\r\n\xfe", 2, 1),
        ("wörter".encode() + b"\xc3", 1, 7),
        (b"\xed\xa0\x80", 1, 1),
    ],
)
def test_text_that_is_not_utf_8_is_reported_with_its_place(data, line, column):
    with pytest.raises(FileError, match=f"^is not UTF-8 at line {line}, column {column}$") as caught:
        decoded(data)
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_refused(encoding):
    with pytest.raises(FileError, match=r"^begins with a byte order mark$"):
        decoded("{}".encode(encoding))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON at line 1, column 1"),
        ('{"a": 1,\n "b" 2}', "is not JSON at line 2, column 6"),
        ("[[[[[]]]]]", "is nested deeper than 4"),
        ('{"[": {"]": {"{": {"}": {}}}}}', "is nested deeper than 4"),
        ("[" * 200_000, "is nested deeper than 4"),
        ('{"a":' * 200_000, "is nested deeper than 4"),
        ("[" + "[]," * 4_000_000, "holds more than 4,000,000 values"),
        ("[" + "0," * 4_000_001, "holds more than 4,000,000 values"),
        ("1" * 5000, "is not JSON that can be read: "),
        ('["\\ud800"]', "holds text that is no Unicode"),
    ],
)
def test_invalid_json_is_reported(text, said):
    with pytest.raises(FileError) as caught:
        parse_json(text, SMALL)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "value",
    [
        [[[["[[[["]]]],
        {'"': {"\\": {'\\"[[[': {"]]]]": "{"}}}},
        ["[", "]", '"[', '["', "\\", "\\["],
        {"pair": "\U0001f600", "none": "\\ud800"},
    ],
)
def test_brackets_in_strings_do_not_count_as_depth(tmp_path, value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        (tmp_path / "x").write_text(text, encoding="utf-8")
        assert read_json(tmp_path / "x", SMALL) == value


# -- nobody else reads -------------------------------------------------------------------------------------------------

READER = REPOSITORY / "devmap_config" / "files.py"

ON_OTHER_HOSTS = READER.parent / "exports" / "vllm_files"
"""What is exported runs where this package is not."""

SOURCES = sorted({*READER.parent.rglob("*.py")} - {READER, *ON_OTHER_HOSTS.rglob("*.py")})

OPENING = ("open", "read_text", "read_bytes")
"""Functions and methods that open a file; what modules have (`json.load`, `os.open`), ruff keeps out by their names."""


def openings(source):
    """Return the places at which code opens a file by other means than the reader's."""
    tree = ast.parse(source)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        by_name = isinstance(called, ast.Name) and called.id in OPENING and called.id not in imported
        as_method = isinstance(called, ast.Attribute) and called.attr in OPENING and ast.unparse(called) != "os.open"
        if by_name or as_method:
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_the_reader_opens_files(path):
    assert list(openings(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    ["open(path)", "path.open()", "Path(x).read_text(encoding='utf-8')", "file.read_bytes()", "gzip.open(path)"],
)
def test_the_check_finds_each_way_of_opening_a_file(source):
    assert list(openings(source)) == [source]


def test_the_check_ignores_reads_by_the_reader():
    source = "from devmap_config.files import read_text\nread_text(path, LOCK)\nopened(path)"
    assert list(openings(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(text)",
        "from json import load",
        "import os\nos.open(path, 0)",
        "import io\nio.open(path)",
        "import yaml\nyaml.safe_load(text)",
        "from safetensors import safe_open",
        "import tomllib",
        "import pickle",
    ],
)
def test_ruff_forbids_modules_that_open_files(source):
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "TID251",
        "--stdin-filename",
        "devmap_config/plan/x.py",
        "-",
    ]
    done = subprocess.run(command, input=source, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("TID251")) == (1, 1)
