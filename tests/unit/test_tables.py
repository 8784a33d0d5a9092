"""Tables fit the terminal at every width where they can, and never break a name."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from devmap_config.amounts import GIBIBYTE, format_bytes, format_duration
from devmap_config.cli import devmap
from devmap_config.rules.folding import fold_paths, ranges

PROFILE = """\
version: 1
model: {source: mixture}
workload: {context_length: 64}
hardware:
  devices: {cuda:0: {memory: 700KiB}, cuda:1: {memory: 700KiB}, cpu: {memory: 1GiB}}
placement:
  strategy: sequential
  pins: [{match: "model.layers.[1-3/2].mlp.experts.gate_up_proj", device: cuda:1}]
"""

NAMES = ("model.layers.[1,3].mlp.experts.gate_up_proj", "model.embed_tokens", "model.layers.[0,2]")


@pytest.mark.parametrize("width", [40, 60, 70, 80, 120])
@pytest.mark.parametrize("command", ["compile", "simulate"])
def test_no_name_is_broken(command, width, workspace, monkeypatch):
    (workspace / "p.yaml").write_text(PROFILE)
    monkeypatch.setenv("COLUMNS", str(width))
    options = ["--dry-run", "--no-simulate"] if command == "compile" else []
    shown = CliRunner().invoke(devmap, [command, "p.yaml", *options], standalone_mode=False).stdout
    for name in NAMES if command == "compile" else NAMES[1:2]:
        assert name in shown, shown
    tables = [line for line in shown.splitlines() if "model." not in line and "max_memory" not in line]
    assert max(map(len, tables)) <= max(width, 60)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_are_as_wide_as_the_terminal_and_end_where_their_words_do(width, workspace, monkeypatch):
    (workspace / "p.yaml").write_text(PROFILE)
    (workspace / "q.yaml").write_text(PROFILE.replace("1GiB", "2GiB").replace("[1-3/2]", "[0-3]"))
    monkeypatch.setenv("COLUMNS", str(width))
    for command in ("compile p.yaml --dry-run", "explain p.yaml", "diff p.yaml q.yaml", "fit p.yaml --on rtx-4090"):
        shown = CliRunner().invoke(devmap, command.split(), standalone_mode=False).stdout
        lines = [line for line in shown.splitlines() if "max_memory" not in line]
        assert len(lines) > 3
        assert max(map(len, lines)) <= width, shown
        assert lines == [line.rstrip() for line in lines]


def test_the_table_of_costs_has_whole_names(workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    shown = CliRunner().invoke(devmap, ["tree", "--measure", "llama"], standalone_mode=False).stdout
    assert "\n  model.layers.[1-5]\n" in shown


def test_indices_in_even_steps_are_one_range():
    assert ranges([1, 3, 5, 7, 9]) == "[1-9/2]"
    assert ranges([0, 1, 2, 10, 20, 30, 31]) == "[0-2,10-30/10,31]"
    assert ranges([0, 2]) == "[0,2]"
    assert ranges([0, 2, 4], with_steps=False) == "[0,2,4]"
    assert fold_paths(f"layers.{number}.mlp" for number in range(1, 24, 2)) == ("layers.[1-23/2].mlp",)


def test_the_readmes_example_has_the_values_of_its_lock():
    lock = json.loads((REPOSITORY / "profiles" / "llama-3.1-70b-two-24gb.lock.json").read_text())
    example = (REPOSITORY / "README.md").read_text()
    plan = lock["plan"]
    predicted = plan["prediction"]
    token, prefill = (
        format_duration(predicted[name]) for name in ("decode_nanoseconds_per_token", "prefill_nanoseconds")
    )
    assert f"{token} a token, {prefill} a prefill, a context of up to {predicted['longest_context']:,} " in example
    assert f"{format_bytes(predicted['streamed_bytes_per_token'])} are copied to cuda:0 at every forward" in example
    for use in plan["devices"]:
        parts = ("capacity", "weights", "kv_cache", "activation", "overhead", "free")
        figures = (f"{use[f'{part}_bytes'] / GIBIBYTE:.1f}" for part in parts)
        assert re.search(r" +".join([use["id"], *map(re.escape, figures)]), example), use["id"]
