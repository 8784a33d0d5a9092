"""`devmap init` writes first profiles that compile unchanged."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from devmap_config.cli import devmap
from devmap_config.cli.init import InitOptions, first_profile
from devmap_config.cli.machines import machine_of
from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.hardware.catalogue import load_catalogue
from devmap_config.profile.permissions import NO_PERMISSIONS

PUBLISHED = sorted(path.parent.name for path in (REPOSITORY / "profiles" / "models").glob("*/config.json"))
MACHINES = tuple(load_catalogue())


def run(*arguments):
    return CliRunner().invoke(devmap, list(arguments), standalone_mode=False)


def said(done):
    return " ".join((done.exception.format_message() if done.exception else done.stderr).split())


def test_init_does_not_replace_a_pipe(workspace):
    os.mkfifo("pipe")
    assert "`pipe` is not a regular file" in said(run("init", "llama", "--on", "t4", "-o", "pipe", "--force"))
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize(
    "machine",
    ["t4", "2x300KiB", "200KiB+cpu:100KiB", "m4-max", "box.yaml", None],
)
def test_init_writes_a_profile_that_compiles(workspace, machine):
    Path("box.yaml").write_text('hardware: {devices: {"cuda:[0-1]": {accelerator: rtx-3090, reserve: 2GiB}}}\n')
    on = ["--on", machine] if machine else []
    assert run("init", "llama", *on, "-o", "first.yaml").return_value == 0
    assert run("compile", "first.yaml").return_value == 0
    assert "exists: pass `--force`" in said(run("init", "llama", *on, "-o", "first.yaml"))
    assert run("init", "llama", *on, "-o", "first.yaml", "--force").return_value == 0
    assert [path.name for path in Path().glob(".draft*")] == []


@pytest.mark.parametrize(("model", "context_length"), [("learned", 256), ("short", 2048)])
def test_init_chooses_a_context_within_the_models_positions(model, context_length, workspace):
    Path("short").mkdir()
    short = json.loads(Path("llama/config.json").read_text()) | {"max_position_embeddings": 2048}
    Path("short/config.json").write_text(json.dumps(short))
    assert f"  context_length: {context_length} " in run("init", model, "--on", "rtx-4090").stdout
    asked = run("init", "short", "--on", "rtx-4090", "--workload", "4096")
    assert "  context_length: 4096 " in asked.stdout


def test_init_writes_schema_machine_context_and_strategies(workspace):
    text = run("init", "llama", "--on", "2xrtx-4090+cpu:64GiB").stdout
    assert text.startswith("# yaml-language-server: $schema=schemas/profile.v1.schema.json\n")
    assert '    "cuda:[0-1]": rtx-4090\n    # cpu: {memory: 64GiB}   # for what is to be offloaded\n' in text
    assert "  context_length: 4096 " in text
    assert "  strategy: fastest\n" in text
    for strategy in ("longest-context", "fewest-devices", "balanced_low_0", "sequential", "single", "manual"):
        assert strategy in text


def test_init_says_which_device_it_assumes(workspace):
    done = run("init", "llama", "--on", "300KiB", "-o", "first.yaml")
    assert "cpu: {memory: 1TiB}   # assumed: say what there is" in Path("first.yaml").read_text()
    assert "does not fit without cpu, of which the machine says nothing: memory: 1TiB is assumed" in said(done)
    assert "name it by `--on 300KiB+cpu:…`" in said(done)
    assert "assumed" not in said(run("init", "llama", "--on", "300KiB+cpu:1GiB"))


def test_init_limits_the_default_context_to_the_models_positions(workspace):
    config = json.loads(Path("llama/config.json").read_text())
    Path("llama/config.json").write_text(json.dumps({**config, "max_position_embeddings": 900}))
    assert "  context_length: 900 " in run("init", "llama", "--on", "l4").stdout
    asked = run("init", "llama", "--on", "l4", "--workload", "1000").stdout
    assert "  context_length: 1000 " in asked


def test_commented_lines_of_the_profile_compile(workspace):
    text = run("init", "llama", "--on", "2xrtx-4090+cpu:64GiB").stdout
    Path("first.yaml").write_text(re.sub(r"# (pins:|  - \{match|cpu:)", r"\1", text))
    plan = json.loads(run("compile", "first.yaml", "--no-simulate", "--format", "json").stdout)["plan"]
    assert plan["device_map"]["lm_head"] == 0
    assert [device["id"] for device in plan["devices"]] == ["cuda:0", "cuda:1", "cpu"]


def test_paths_in_the_profile_are_relative_to_it(workspace):
    Path(".git").mkdir()
    Path("profiles").mkdir()
    run("init", "llama", "--on", "l4", "-o", "profiles/first.yaml")
    lines = Path("profiles/first.yaml").read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../schemas/profile.v1.schema.json"
    assert "  source: ../llama" in lines


def test_init_uses_the_given_workload_and_strategy(workspace):
    done = run("init", "llama", "--on", "2xl4", "--workload", "512", "--strategy", "balanced", "--format", "json")
    text = json.loads(done.stdout)["profile"]
    assert "  context_length: 512 " in text
    assert "  strategy: balanced\n" in text


def test_init_copies_all_values_of_a_machine_file(workspace):
    box = """\
hardware:
  devices:
    cuda:0: {accelerator: rtx-4090, memory: 20GiB, reserve: 2GiB, slack: 2.5%, efficiency: 80%}
    cuda:1: {memory: 24GiB, overhead: 512MiB, bandwidth: 936GB/s, flops: 71TFLOP/s}
  links: {host: 25GB/s, "cuda:0-cuda:1": {bandwidth: 12500MB/s, latency: 10us}}
"""
    Path("box.yaml").write_text(box)
    run("init", "llama", "--on", "box.yaml", "-o", "first.yaml")
    assert machine_of("first.yaml").model_dump() == machine_of("box.yaml").model_dump()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama", "--on", "rtx4090"), "did you mean `rtx-4090`?"),
        (("llama", "--on", "2xrtx-4090,cpu:64GiB"), "as in `2xrtx-4090+cpu:64GiB`"),
        (("unknown", "--on", "l4"), "unsupported-model"),
        (("llama", "--on", "l4", "--workload", "8k"), "is not a valid number of tokens, such as 8192"),
        (("first.yaml", "--on", "l4"), "`first.yaml` is YAML, and no model"),
        (("nameless", "--on", "l4"), "name it: `class: AutoModelForCausalLM`"),
        (("llama", "--on", "300KiB", "--strategy", "single"), "cuda:0 would hold"),
    ],
)
def test_init_reports_errors(workspace, arguments, message):
    Path("first.yaml").write_text("version: 1\n")
    done = run("init", *arguments)
    assert done.return_value != 0
    assert message in said(done)


def test_init_takes_the_class_for_a_config_without_one(workspace):
    text = run("init", "nameless", "--on", "l4", "--class", "LlamaForCausalLM").stdout
    assert "  class: LlamaForCausalLM\n" in text


def check(model, machine, folder, *, simulates):
    """Check that the profile of a published model on a machine of the catalogue compiles."""
    source = REPOSITORY / "profiles" / "models" / model / "config.json"
    (folder / "config.json").write_bytes(source.read_bytes())
    asked = InitOptions(
        source=str(folder / "config.json"),
        hardware=machine_of(machine),
        machine_name=machine,
        output=folder / "first.yaml",
        permissions=NO_PERMISSIONS,
    )
    (folder / "first.yaml").write_text(first_profile(asked, simulates=simulates))
    compilation = run_pipeline(Request(path=folder / "first.yaml", simulates=simulates))
    assert isinstance(compilation, Compiled), [each.message for each in compilation.diagnostics]


PAIRS = [(model, machine) for model in PUBLISHED for machine in MACHINES]
SMALL = [(model, machine) for model, machine in PAIRS if model in ("all-minilm-l6-v2", "llama-3.2-1b")]


@pytest.mark.parametrize(("model", "machine"), random.Random(16).sample(SMALL, 4))
def test_profiles_of_some_published_models_and_machines_compile(model, machine, tmp_path):
    check(model, machine, tmp_path, simulates=False)


@pytest.mark.zoo
@pytest.mark.parametrize("model", PUBLISHED)
def test_profiles_of_every_published_model_and_machine_compile(model, tmp_path):
    for machine in MACHINES:
        check(model, machine, tmp_path, simulates=False)


@pytest.mark.zoo
@pytest.mark.parametrize(("model", "machine"), random.Random(16).sample(PAIRS, len(PAIRS) // 20))
def test_profiles_of_published_models_pass_the_dry_run(model, machine, tmp_path):
    check(model, machine, tmp_path, simulates=True)
