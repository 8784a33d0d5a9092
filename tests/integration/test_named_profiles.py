"""Commands accept a profile or its lock by name, and report names that do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config import ProfileError, compile_profile, load_model
from devmap_config.cli import devmap
from devmap_config.plan.lock import profile_of

PROFILE = "version: 1\nmodel: {source: llama}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n"


@pytest.fixture
def profile(workspace):
    Path("x.yaml").write_text(PROFILE)
    assert run("compile", "x.yaml", "-q", "--no-simulate").return_value == 0
    return Path("x.yaml")


def run(*arguments):
    return CliRunner().invoke(devmap, arguments, standalone_mode=False)


@pytest.mark.parametrize(
    "command",
    [
        ["check"],
        ["compile", "--no-simulate", "--format", "json"],
        ["simulate"],
        ["fit", "--on", "rtx-3090"],
        ["update", "--dry-run"],
        ["explain"],
        ["tree"],
    ],
)
def test_a_profile_can_be_named_by_its_lock(profile, command):
    name, *options = command
    of_profile, of_lock = run(name, "x.yaml", *options), run(name, "x.lock.json", *options)
    assert of_lock.exception is None, of_lock.output
    assert (of_lock.return_value, of_lock.stdout) == (0, of_profile.stdout)


def test_a_profile_and_its_lock_given_together_are_checked_once(profile):
    assert run("check", "x.yaml", "x.lock.json", ".").stdout == "1 lock up to date\n"


def test_run_and_python_accept_a_lock(profile):
    assert "no-weights" in run("run", "x.lock.json").stderr
    assert compile_profile("x.lock.json").device_map == compile_profile("x.yaml").device_map


@pytest.mark.parametrize(
    ("files", "named", "said"),
    [
        ((), "y.yaml", "`y.yaml` does not exist"),
        (("yard.yaml",), "yadr.yaml", "did you mean `yard.yaml`?"),
        ((), "llama", "`llama` is a folder (name a profile in it; `devmap check` takes folders as well)"),
        ((), "y.lock.json", "`y.lock.json` is a lock, and beside it is no `y.yaml`"),
        (("y.yaml", "y.yml"), "y.lock.json", "`y.lock.json` is a lock, and beside it is `y.yaml` and `y.yml`"),
        ((), "nowhere/y.yaml", "`nowhere/y.yaml` does not exist"),
    ],
)
def test_a_missing_profile_is_reported(workspace, files, named, said):
    for name in files:
        Path(name).write_text(PROFILE)
    for load in (compile_profile, load_model):
        with pytest.raises(ProfileError) as error:
            load(named)
        assert [each.code for each in error.value.diagnostics] == ["missing-file"]
        assert said in str(error.value)


def test_a_lock_finds_its_profile_with_either_suffix(workspace):
    Path("y.yml").write_text(PROFILE)
    assert profile_of(Path("y.lock.json")) == Path("y.yml")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["compile"], ""),
        (["run"], ""),
        (["fit", "--on", "l4"], ""),
        (["check"], "1 profile is not there\n"),
        (["explain"], ""),
        (["simulate"], ""),
    ],
)
def test_every_command_reports_a_missing_profile_and_exits_with_2(workspace, command, shown):
    name, *options = command
    executable = Path(sys.executable).with_name("devmap")
    done = subprocess.run([executable, name, "y.lock.json", *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, shown), done.stderr
    assert "error[missing-file]: `y.lock.json` is a lock, and beside it is no `y.yaml`" in done.stderr


def test_a_missing_profile_is_reported_as_one_json_object(workspace):
    executable = Path(sys.executable).with_name("devmap-compile")
    done = subprocess.run([executable, "y.yaml", "--format=json"], capture_output=True, text=True, check=False)
    value = json.loads(done.stdout)
    assert (done.returncode, value["plan"], value["diagnostics"][0]["code"]) == (2, None, "missing-file")
