"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import click
import pytest

from devmap_config.cli.locking import write
from devmap_config.files import write_atomically


def test_writing_replaces_the_old_file_atomically(tmp_path):
    target = tmp_path / "x.lock.json"
    target.write_text("old")
    write_atomically(target, "new\n")
    assert target.read_bytes() == b"new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.lock.json"]


def test_an_interrupted_write_leaves_only_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "x.lock.json"
    target.write_text("old")

    def interrupted(self, other):
        assert self.read_text() == "new"
        assert target.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.lock.json", "old")]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(click.ClickException, match="cannot be written"):
        write(tmp_path / "nowhere" / "x.lock.json", "new")


def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no file that is always full")
    target = tmp_path / "x.lock.json"
    target.write_text("old")

    def full(descriptor, *_arguments, **_options):
        os.close(descriptor)
        return Path("/dev/full").open("wb")

    with mock.patch("os.fdopen", full), pytest.raises(click.ClickException, match="No space left"):
        write(target, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.lock.json", "old")]
