"""A bad file in place of any input is reported by name, quickly, in little memory, and with the right exit code."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import transformers
from bad_files import BAD, NO_FILES, UNTOLD, put
from conftest import LLAMA, devmap

from devmap_config.cli import sides

PROFILE = """\
extends: base.yaml
version: 1
model: {source: small}
placement: {strategy: single}
"""

BASE = "hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}\n"

AS_SOMEONE = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]

SECONDS = 10
"""Of the processor; what is slow here is the machine."""

GROWTH_BYTES = 100 * 2**20


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A repository with a profile, the file that it extends, its model in one file and in several, its lock and its
    graph.
    """
    folder = tmp_path_factory.mktemp("compiled") / "repository"
    values = {**LLAMA, "num_hidden_layers": 1, "dtype": "float32"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.save_pretrained(folder / "small")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        Path(".git").mkdir()
        Path("base.yaml").write_text(BASE)
        Path("p.yaml").write_text(PROFILE)
        Path("q.yaml").write_text(PROFILE.replace("small", "sharded"))
        Path("machine.yaml").write_text(BASE)
        Path("map.json").write_text('{"": 0}')
        assert devmap("compile", "p.yaml", "-q", "--vendor") == 0
        assert devmap("compile", "q.yaml", "-q") == 0
        assert devmap("check", "p.yaml", "q.yaml", "-q") == 0
    return folder


@pytest.fixture
def repository(compiled, tmp_path, monkeypatch):
    """A copy of it, which is the working directory."""
    shutil.copytree(compiled, tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("COLUMNS", "1000")


DONE, WRONG, ABSENT, STALE, UNLIKE_LOCK = range(5)

COMMANDS = (
    "compile",
    "check",
    "explain",
    "fit --on 1xrtx-4090",
    "simulate",
    "report -o page.html",
    "run",
    "tree",
    "update",
)

PROFILES = {command: ("p.yaml", (*command.split(), "p.yaml"), WRONG, ABSENT) for command in COMMANDS}

OTHERS = {
    "check a folder": ("p.yaml", ("check", "."), WRONG, ABSENT),
    "diff a profile": ("p.yaml", ("diff", "p.yaml", "q.yaml"), WRONG, ABSENT),
    "compile what it extends": ("base.yaml", ("compile", "p.yaml"), WRONG, WRONG),
    "check what it extends": ("base.yaml", ("check", "p.yaml"), WRONG, WRONG),
    "compile a config": ("small/config.json", ("compile", "p.yaml"), WRONG, WRONG),
    "tree of a folder": ("small/config.json", ("tree", "small"), ABSENT, ABSENT),
    "tree of a config": ("small/config.json", ("tree", "small/config.json"), ABSENT, ABSENT),
    "init of a folder": ("small/config.json", ("init", "small", "--on", "1xrtx-4090"), WRONG, WRONG),
    "adopt for a folder": ("small/config.json", ("adopt", "map.json", "--model", "small"), ABSENT, ABSENT),
    "compile weights": ("small/model.safetensors", ("compile", "p.yaml"), WRONG, WRONG),
    "check weights": ("small/model.safetensors", ("check", "p.yaml"), WRONG, WRONG),
    "run weights": ("small/model.safetensors", ("run", "p.yaml"), UNLIKE_LOCK, UNLIKE_LOCK),
    "tree of weights": ("small/model.safetensors", ("tree", "small"), ABSENT, ABSENT),
    "compile an index": ("sharded/model.safetensors.index.json", ("compile", "q.yaml"), WRONG, WRONG),
    "compile a shard": ("sharded/model-00001-of-00003.safetensors", ("compile", "q.yaml"), WRONG, WRONG),
    "check a lock": ("p.lock.json", ("check", "p.yaml"), STALE, STALE),
    "run a lock": ("p.lock.json", ("run", "p.yaml"), STALE, STALE),
    "compile over a lock": ("p.lock.json", ("compile", "p.yaml"), DONE, ABSENT),
    "update a lock": ("p.lock.json", ("update", "p.yaml"), DONE, ABSENT),
    "diff a lock": ("p.lock.json", ("diff", "p.lock.json", "q.lock.json"), ABSENT, ABSENT),
    "diff beside a lock": ("p.lock.json", ("diff", "p.yaml", "q.yaml"), STALE, STALE),  # two models
    "probe against a lock": ("p.lock.json", ("probe", "--against", "p.lock.json"), STALE, ABSENT),
    "compile beside a graph": ("p.graph.json", ("compile", "p.yaml"), DONE, DONE),
    "check beside a graph": ("p.graph.json", ("check", "p.yaml"), DONE, DONE),
    "fit on a machine": ("machine.yaml", ("fit", "p.yaml", "--on", "machine.yaml"), ABSENT, ABSENT),
    "adopt a map": ("map.json", ("adopt", "map.json", "--model", "small"), ABSENT, ABSENT),
}

READS = PROFILES | OTHERS
"""By what is done: the file that is bad, the command, its exit codes where it is a file, and where it is none."""


def refuse_to_open(path, context):
    """Make the system refuse to read a file, since permissions do not stop root."""
    real_open = os.open

    def opened(name, *arguments, **options):
        if os.path.realpath(name) == os.path.realpath(path):
            raise PermissionError(13, os.strerror(13), str(name))
        return real_open(name, *arguments, **options)

    context.setattr(os, "open", opened)


def spent_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("bad", [*BAD, "unreadable"])
@pytest.mark.parametrize("read", READS)
def test_a_bad_file_is_named_quickly_and_in_little_memory(repository, capsys, monkeypatch, read, bad):
    file, arguments, as_file, as_none = READS[read]
    if bad == "unreadable":
        refuse_to_open(file, monkeypatch)
    else:
        put(bad, Path(file))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(120)  # what waits for a writer waits for ever
    begin_seconds, before_bytes = time.process_time(), spent_bytes()
    try:
        code = devmap(*arguments)
    finally:
        signal.alarm(0)
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    assert Path(file).name in said
    assert UNTOLD not in said
    assert code == (as_none if bad in NO_FILES else as_file), said
    assert time.process_time() - begin_seconds < SECONDS
    assert spent_bytes() - before_bytes < GROWTH_BYTES


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        *([*command.split(), f"{LONG}.yaml"] for command in COMMANDS),
        ["explain", LONG],
        ["tree", LONG],
        ["init", LONG, "--on", "1xrtx-4090"],
        ["adopt", LONG, "--model", "small"],
        ["adopt", "map.json", "--model", LONG],
        ["diff", LONG, "p.yaml"],
        ["fit", "p.yaml", "--on", f"{LONG}.yaml"],
        ["probe", "--against", LONG],
        ["compile", "p.yaml", "-o", LONG],
        ["compile", f"{LONG}/p.yaml"],
        ["init", "small", "--on", "1xrtx-4090", "-o", LONG],
        ["adopt", "map.json", "--model", "small", "-o", f"{LONG}/p.yaml"],
    ],
)
def test_a_name_too_long_for_a_file_is_reported(repository, capsys, arguments):
    code = devmap(*arguments)
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    assert LONG in said
    assert code in (WRONG, ABSENT)


def test_locks_read_from_git_have_the_same_size_limit(repository, capsys, monkeypatch):
    Path(".git").rmdir()
    for command in (["init", "-q"], ["add", "p.lock.json"], [*AS_SOMEONE, "commit", "-q", "-m", "a lock"]):
        subprocess.run(["git", *command], check=True)
    assert devmap("diff", "HEAD:p.lock.json", "p.lock.json") == DONE
    monkeypatch.setattr(sides, "LOCK", sides.LOCK._replace(max_bytes=1000))
    capsys.readouterr()
    assert devmap("diff", "HEAD:p.lock.json", "p.lock.json") == ABSENT
    assert "error[too-large]: `p.lock.json` at `HEAD` is larger than 1,000 bytes" in capsys.readouterr().err


def test_a_machine_file_may_have_ranges_and_extend_another(repository, capsys):
    Path("machine.yaml").write_text('extends: base.yaml\nhardware: {devices: {"cuda:[1-2]": rtx-4090}}\n')
    assert devmap("fit", "p.yaml", "--on", "machine.yaml", "--format", "json") == DONE
    [row] = json.loads(capsys.readouterr().out)["machines"]
    assert [device["id"] for device in row["devices"]] == ["cuda:0", "cuda:1", "cuda:2", "cpu"]


def test_errors_in_a_machine_file_have_line_and_column(repository, capsys):
    Path("machine.yaml").write_text("hardware:\n  devices:\n    cuda:0: {memry: 1GiB}\n")
    assert devmap("fit", "p.yaml", "--on", "machine.yaml", "--format", "json") == ABSENT
    [found] = json.loads(capsys.readouterr().out)["diagnostics"]
    assert (found["code"], found["file"], found["line"], found["column"]) == ("unknown-key", "machine.yaml", 3, 14)
