"""Every command that reads a profile uses the variables that its lock remembers, unless other values are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from devmap_config import compile_profile
from devmap_config.cli import devmap

PROFILE = """\
version: 1
variables: {context: 64}
model: {source: llama}
workload: {context_length: "{{ context }}"}
hardware: {devices: {cuda:0: rtx-4090}}
"""


def run(*arguments):
    done = CliRunner().invoke(devmap, arguments, standalone_mode=False)
    assert done.exception is None, done.output
    return done.return_value, done.stdout


@pytest.fixture
def cache_bytes(workspace):
    """The bytes of the cache at 32 tokens, the context with which the lock was compiled."""
    Path("p.yaml").write_text(PROFILE)
    code, text = run("compile", "p.yaml", "--set", "context=32", "--no-simulate", "--format", "json")
    assert code == 0
    return json.loads(text)["plan"]["devices"][0]["kv_cache_bytes"]


def cache_of(*arguments):
    return json.loads(run(*arguments, "--format", "json")[1])["plan"]["devices"][0]["kv_cache_bytes"]


@pytest.mark.parametrize("command", [["compile", "--no-simulate"], ["simulate"], ["update", "--dry-run"]])
def test_commands_that_print_a_plan_use_remembered_values(cache_bytes, command):
    name, *options = command
    assert cache_of(name, "p.yaml", *options) == cache_bytes
    assert cache_of(name, "p.yaml", *options, "--set", "context=64") == 2 * cache_bytes


def test_check_uses_remembered_values(cache_bytes):
    assert cache_of("check", "p.yaml") == cache_bytes
    assert run("check", "p.yaml", "--set", "context=64")[0] == 3  # another value than the lock's: it is stale


def test_compile_to_another_file_uses_remembered_values(cache_bytes):
    assert cache_of("compile", "p.yaml", "--no-simulate", "-o", "elsewhere.json") == cache_bytes


def test_explain_uses_remembered_values(cache_bytes):
    assert "from 32 to" in run("explain", "p.yaml")[1]
    assert "from 48 to" in run("explain", "p.yaml", "--set", "context=48")[1]


def test_fit_uses_remembered_values(cache_bytes):
    def fitted(*more):
        value = json.loads(run("fit", "p.yaml", "--on", "rtx-3090", "--format", "json", *more)[1])
        return value["machines"][0]["devices"][0]["kv_cache_bytes"]

    assert fitted() == cache_bytes
    assert fitted("--set", "context=64") == 2 * cache_bytes


def test_tree_uses_remembered_values(cache_bytes):
    assert "32 tokens prefilled" in run("tree", "p.yaml", "--measure")[1]


def test_diff_uses_remembered_values(cache_bytes):
    assert run("diff", "p.lock.json", "p.yaml") == (0, "p.lock.json and p.yaml are the same plan\n")


def test_compile_profile_uses_remembered_values(cache_bytes):
    assert compile_profile("p.yaml").devices[0].kv_cache_bytes == cache_bytes
    assert compile_profile("p.yaml", variables={"context": 64}).devices[0].kv_cache_bytes == 2 * cache_bytes


def test_an_unreadable_lock_remembers_nothing(cache_bytes):
    Path("p.lock.json").write_text("{")
    assert compile_profile("p.yaml").devices[0].kv_cache_bytes == 2 * cache_bytes
    assert "from 64 to" in run("explain", "p.yaml")[1]
    assert cache_of("simulate", "p.yaml") == 2 * cache_bytes
    assert "64 tokens prefilled" in run("tree", "p.yaml", "--measure")[1]
