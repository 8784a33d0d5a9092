"""Progress of commands is shown on a terminal only."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys

import pytest
from click.testing import CliRunner
from command_process import run_command

import devmap_config.cli.progress as progress_module
from devmap_config.cli import devmap
from devmap_config.stages import LOGGER

PROFILE = """\
version: 1
model: {source: llama}
workload: {context_length: 32}
hardware: {devices: {cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}}}
placement: {strategy: sequential}
"""

COMPILE = [sys.executable, "-c", "from devmap_config.cli import main; main()", "compile", "p.yaml"]


@pytest.fixture
def fresh(workspace, monkeypatch):
    """A profile, and an empty cache."""
    (workspace / "p.yaml").write_text(PROFILE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))


def on_terminal(command):
    """Return what a command prints on stderr if that is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs) as running:
        os.close(theirs)
        printed = b""
        try:
            while part := os.read(ours, 65536):
                printed += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert running.returncode == 0
    return printed.decode()


def test_stages_are_shown_on_a_terminal(fresh):
    shown = on_terminal(COMPILE)
    stages = ("reading llama", "measuring LlamaForCausalLM at 32 tokens", "placing LlamaForCausalLM by", "simulated")
    assert all(stage in shown for stage in stages), shown
    assert "reading llama" not in on_terminal([*COMPILE, "--quiet"])


@pytest.mark.parametrize(("options", "is_told"), [([], True), (["--format", "json"], True), (["-q"], False)])
def test_a_long_stage_is_announced_once_without_a_terminal(options, is_told, fresh, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_WITHOUT_A_WORD", 0.01)
    done = CliRunner().invoke(devmap, ["compile", "p.yaml", "--dry-run", *options], standalone_mode=False)
    assert done.stderr.count(": this may take a minute\n") == is_told
    assert "may take" not in done.stdout
    assert is_told == ("LlamaForCausalLM" in done.stderr or "reading llama" in done.stderr)


def test_a_long_step_is_announced_once_without_a_terminal(fresh, monkeypatch):
    monkeypatch.setattr(progress_module, "SECONDS_WITHOUT_A_WORD", 0.01)
    done = CliRunner().invoke(devmap, ["fit", "p.yaml", "--on", "rtx-4090,l4"], standalone_mode=False)
    assert done.stderr == "rtx-4090 (1 of 2): this may take a minute\n"


def test_no_progress_is_shown_without_a_terminal(fresh, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run_command("devmap", "compile", "p.yaml")
    assert (done.returncode, done.stderr) == (0, "wrote p.lock.json\n")


def test_tracebacks_are_shown_with_verbose_only(fresh, workspace, monkeypatch):
    (workspace / "p.yaml").write_text(PROFILE.replace("llama", "unmeasurable"))

    def printed(*more):
        monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / f"cache{len(more)}"))
        done = run_command("devmap", "compile", "p.yaml", "--no-simulate", *more)
        assert done.returncode == 0, done.stderr
        return done.stderr

    plain, verbose = printed(), printed("--verbose")
    assert "takes\n  `pixel_values`, and no text" in plain
    assert "Traceback" not in plain
    assert "Traceback" in verbose
    assert "measuring ViTModel at 32 tokens" in verbose


def test_log_records_have_the_stage(caplog):
    from devmap_config import stages

    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        stages.begin("place", "placing it")
    assert [(each.getMessage(), each.stage) for each in caplog.records] == [("placing it", 2)]
