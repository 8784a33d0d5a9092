"""Failures of the machine give one line and lose no data: closed streams, full disks, no memory, killed processes."""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MIXTURE, devmap
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations import accelerate as integration

from devmap_config import load_model
from devmap_config.runner.loading import RunnerError

PROFILE = """\
version: 1
model: {source: llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: single}
"""

DONE, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130

DEVMAP = [sys.executable, "-c", "from devmap_config.cli import main; main()"]


@pytest.fixture
def repository(workspace):
    """A profile with its lock and its graph."""
    Path("p.yaml").write_text(PROFILE)
    assert devmap("compile", "-q", "--vendor", "p.yaml") == DONE
    return workspace


# -- streams -----------------------------------------------------------------------------------------------------------

FULL = "Error: what was found cannot be written: No space left on device\n"
CLOSED = "Error: what was found cannot be written: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("command", "exit_code", "said"),
    [
        ("check p.yaml > /dev/full", USAGE, FULL),
        ("compile --format json p.yaml > /dev/full", USAGE, FULL),
        ("check p.yaml >&-", USAGE, CLOSED),
        ("check p.yaml 2>&- >/dev/null", DONE, ""),
        ("check none.yaml 2>/dev/full", USAGE, ""),
        ("compile p.yaml <&- >&- 2>&-", USAGE, ""),
    ],
)
def test_an_unwritable_stream_gives_one_line_and_keeps_the_lock(repository, command, exit_code, said):
    before = Path("p.lock.json").read_bytes()
    script = f'"$@" {command}'
    done = subprocess.run(["bash", "-c", script, "bash", *DEVMAP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (exit_code, said)
    assert Path("p.lock.json").read_bytes() == before


def test_a_closed_pipe_gives_no_message_and_the_lock_is_written(repository):
    Path("p.lock.json").unlink()
    script = 'set -o pipefail; "$@" compile p.yaml | true'
    done = subprocess.run(["bash", "-c", script, "bash", *DEVMAP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (WRONG, "")
    assert devmap("check", "-q", "p.yaml") == DONE


def test_input_that_is_not_utf_8_is_reported_or_escaped(repository, capsys, monkeypatch):
    assert devmap("run", "p.yaml", "--prompt", "caf\udce9") == USAGE
    assert "Error: the prompt is not UTF-8: `caf\\xe9`\n" in capsys.readouterr().err
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert devmap("check", "p.yaml") == DONE
    assert typed.read() == "caf\\xe9\n"


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Limit the size of files, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


WRITING = {
    "compile": ("compile", "p.yaml"),
    "compile with a graph": ("compile", "--vendor", "p.yaml"),
    "compile to JSON": ("compile", "--format", "json", "p.yaml"),
    "update": ("update", "p.yaml"),
    "init": ("init", "llama", "--on", "2xrtx-4090", "-o", "new.yaml", "--force"),
    "init to stdout": ("init", "llama", "--on", "2xrtx-4090"),
    "adopt": ("adopt", "map.json", "--model", "llama", "-o", "new.yaml", "--force"),
}


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_gives_one_line_and_keeps_existing_files(repository, capsys, request, command):
    Path("new.yaml").write_text("old")
    Path("map.json").write_text('{"": 0}')
    before = {path: path.read_bytes() for path in sorted(repository.iterdir()) if path.is_file()}
    request.getfixturevalue("small_files")
    assert devmap(*WRITING[command]) == USAGE
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert err.startswith("Error: `")
    assert err.endswith("` cannot be written: File too large\n")
    if "json" in WRITING[command]:
        assert [each["code"] for each in json.loads(out)["diagnostics"]] == ["usage"]
    assert {path: path.read_bytes() for path in sorted(repository.iterdir()) if path.is_file()} == before


@pytest.mark.parametrize("home", [None, "/proc/1/none", "/dev/null"])
def test_commands_work_without_a_cache_directory(repository, monkeypatch, capsys, home):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
        if home is not None:
            monkeypatch.setenv(name, home)
    Path("p.graph.json").unlink()
    assert devmap("check", "p.yaml") == DONE
    assert capsys.readouterr() == ("1 lock up to date\n", "")


def test_running_out_of_memory_gives_one_line(repository, monkeypatch, capsys):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr("devmap_config.compiler.run_pipeline", exhausted)
    assert devmap("compile", "p.yaml") == USAGE
    assert capsys.readouterr() == ("", "Error: memory ran out\n")


# -- loading that ends early -------------------------------------------------------------------------------------------

ON_DISK = """\
version: 1
model: {source: experts, dtype: float32}
hardware: {devices: {cpu: {memory: 1GiB}, disk: {memory: 1GiB}}}
placement: {strategy: single, device: disk, offload: {folder: offload}}
"""

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])


@pytest.fixture(scope="module")
def compiled_experts(tmp_path_factory):
    """A checkpoint of single experts, which loading merges and writes to the offload folder, and its logits."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**MIXTURE, "num_hidden_layers": 3, "dtype": "float32"})).eval()
    model.save_pretrained(folder / "experts")
    (folder / "p.yaml").write_text(ON_DISK)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        assert devmap("compile", "-q", "p.yaml") == DONE
    with torch.no_grad():
        return folder, model(TOKENS).logits


@pytest.fixture
def experts(compiled_experts, monkeypatch):
    """The checkpoint's logits; its folder is the working directory, and nothing is offloaded there yet."""
    folder, logits = compiled_experts
    monkeypatch.chdir(folder)
    shutil.rmtree("offload", ignore_errors=True)
    return logits


def killed(number):
    return lambda: os.kill(os.getpid(), number)


def out_of(error):
    def ending():
        raise error

    return ending


ENDINGS = {
    "kill -9": (killed(signal.SIGKILL), -signal.SIGKILL),
    "terminated": (killed(signal.SIGTERM), -signal.SIGTERM),
    "interrupted": (out_of(KeyboardInterrupt()), INTERRUPTED),  # a signal may come late, where exceptions are ignored
    "out of memory": (out_of(MemoryError()), 4),
    "out of an accelerator's memory": (out_of(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), 4),
    "full disk": (out_of(OSError(28, "No space left on device")), 4),
}


def run_until(moment, ending):
    """Run the profile in a process that ends while it writes its nth tensor, half of which is written."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = 0

    def save_file(tensors, path):
        nonlocal written
        written += 1
        data = save(tensors)
        Path(path).write_bytes(data if written < moment else data[: len(data) // 2])
        if written == moment:
            ending()

    integration.save_file = save_file
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code = devmap("run", "p.yaml", "--no-generate", "--no-probe")
    finally:
        os._exit(code)


@pytest.mark.parametrize(("how", "moment"), [*((how, 2) for how in ENDINGS), ("kill -9", 1), ("kill -9", 6)])
def test_files_of_an_interrupted_load_are_not_used(experts, how, moment):
    ending, exit_code = ENDINGS[how]
    assert run_until(moment, ending) == exit_code
    left = sorted(Path("offload").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(left) == moment
    with pytest.raises(SafetensorError):
        load_file(left[-1])
    with torch.no_grad():
        logits = load_model("p.yaml", probe=False)(TOKENS).logits
    torch.testing.assert_close(logits, experts)


@pytest.mark.usefixtures("experts")
def test_an_offload_folder_is_locked_by_one_process_while_its_model_lives():
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        try:
            model = load_model("p.yaml", probe=False)
            assert load_model("p.yaml", probe=False) is not model  # the same process may
            theirs.send(b"!")
            theirs.recv(1)
            del model
            gc.collect()
            theirs.send(b"!")
            theirs.recv(1)
            model = load_model("p.yaml", probe=False)
            theirs.send(b"!")
            time.sleep(60)
        finally:
            os._exit(9)
    theirs.close()
    for exit_code in (4, DONE, 4):
        ours.recv(1)
        assert devmap("run", "p.yaml", "--no-generate", "--no-probe") == exit_code
        gc.collect()
        ours.send(b"!")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert devmap("run", "p.yaml", "--no-generate", "--no-probe") == DONE  # nothing is left behind


def test_foreign_files_and_links_in_an_offload_folder_are_not_used(experts, tmp_path):
    Path("offload").mkdir()
    Path("offload/index.json").write_text("{}")  # what accelerate reads where it is told nothing
    with torch.no_grad():
        torch.testing.assert_close(load_model("p.yaml", probe=False)(TOKENS).logits, experts)
    target = tmp_path / "elsewhere"
    target.write_text("old")
    name = next(Path("offload").glob("*.safetensors"))
    name.unlink()
    name.symlink_to(target)
    with pytest.raises(RunnerError, match=f"holds a link, `{name.name}`"):
        load_model("p.yaml", probe=False)
    assert target.read_text() == "old"
