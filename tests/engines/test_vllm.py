"""Exports for vLLM work in the real engine: tokens, weights and cache, and how hosts end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import REPOSITORY
from pages import File, blocks

from devmap_config.pipeline.stages import Pipeline
from engines.hosts import Served, namespaces
from engines.small_model import write_model

pytestmark = pytest.mark.engine

HERE = """\
version: 1
name: tiny
model: {source: model, dtype: float32}
workload: {context_length: 256, concurrency: 4}
hardware:
  hosts:
    here: {devices: {"cpu:[0-1]": {memory: 3GiB}}}
placement:
  pins: [{match: "model.layers.[0-3]", device: "here/cpu:0"}, {match: "model.layers.[4-5]", device: "here/cpu:1"}]
targets: [vllm]
"""

ALONE = HERE.replace("cpu:[0-1]", "cpu").partition("placement")[0] + "targets: [vllm]\n"

APART = """\
version: 1
name: tiny
model: {source: model, dtype: float32}
workload: {context_length: 256, concurrency: 4}
hardware:
  hosts:
    left: {devices: {cpu: {memory: 2GiB}}, network: {bandwidth: 1GB/s, address: 10.77.0.1, interface: LEFT}}
    right: {devices: {cpu: {memory: 2GiB}}, network: {bandwidth: 1GB/s, address: 10.77.0.2}}
placement: {pins: [{match: "model.layers.[0-3]", device: left/cpu}, {match: "model.layers.[4-5]", device: right/cpu}]}
targets: [vllm]
"""

GROUPED = (
    APART.replace("{cpu: {", '{"cpu:[0-1]": {').partition("placement")[0]
    + """\
placement:
  groups: ["left/cpu:[0-1]", "right/cpu:[0-1]"]
  pins: [{match: "model.layers.[0-3]", device: "left/cpu:0"}, {match: "model.layers.[4-5]", device: "right/cpu:0"}]
targets: [vllm]
"""
)


@pytest.fixture(scope="module")
def python(request):
    return Path(request.config.getoption("--engines")).absolute()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with random weights whose likeliest tokens are far ahead of the others, and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def devmap(folder, *arguments):
    done = subprocess.run(
        [Path(sys.executable).with_name("devmap"), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def exported(tmp_path, model):
    """Compile a profile and export it as a user does; return the folder with the files, and the plan."""

    def exported(profile, *options):
        (tmp_path / "model").symlink_to(model)
        (tmp_path / "p.yaml").write_text(profile)
        devmap(tmp_path, "compile", "-q", "--allow-outside", "p.yaml")
        devmap(tmp_path, "export", "--allow-outside", "p.yaml", "--to", "vllm", "-o", "exported", *options)
        plan = json.loads((tmp_path / "p.lock.json").read_text())["plan"]["pipeline"]
        return tmp_path / "exported", Pipeline.from_json(plan)

    return exported


@pytest.fixture
def serve(python):
    served = []

    def serve(folder, *spaces):
        served.append(Served(folder, python, spaces or (None,)))
        return served[-1]

    yield serve
    for each in served:
        each.stop()


@pytest.fixture
def spaces():
    with ExitStack() as stack:
        try:
            made = stack.enter_context(namespaces())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.fail(f"two hosts are network namespaces, as root with `ip`; else `--without-namespaces`: {error}")
        yield made


TOKENS = {}


@pytest.fixture
def reference(request, exported, python, tmp_path_factory, model):
    """The tokens that a single rank generates."""
    if not TOKENS:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "model").symlink_to(model)
        (folder / "p.yaml").write_text(ALONE)
        devmap(folder, "compile", "-q", "--allow-outside", "p.yaml")
        devmap(folder, "export", "--allow-outside", "p.yaml", "--to", "vllm", "-o", "exported")
        served = Served(folder / "exported", python)
        try:
            TOKENS["of one rank"] = served.start().wait().tokens()
        finally:
            served.stop()
    return TOKENS["of one rank"]


def hold_to_plan(served, plan, reference):
    """Check that tokens are those of one rank, and that the engine holds what was planned."""
    assert served.tokens() == reference
    assert served.cache_tokens() == pytest.approx(plan.cache_tokens, rel=0.02)
    weights = [stage.weights_bytes for stage in plan.stages for _ in stage.devices]
    assert served.weights() == pytest.approx(weights, rel=0.02)


def test_vllms_parser_accepts_the_exported_flags(exported, python):
    assert exported(HERE, "--check", str(python))


def test_uneven_stages_on_one_host_give_the_tokens_of_one_rank(exported, serve, reference):
    folder, plan = exported(HERE)
    assert plan.partition == (4, 2)
    hold_to_plan(serve(folder).start().wait(), plan, reference)


def test_two_hosts_serve_and_end_if_a_follower_is_killed(exported, serve, spaces, reference):
    (left, _, interface), (right, *_) = spaces
    folder, plan = exported(APART.replace("LEFT", interface))
    served = serve(folder, left, right).start().wait()
    hold_to_plan(served, plan, reference)
    served.kill(1, engine_only=True)
    assert served.codes()[0] == 1
    assert "node 1 is gone" in served.log(0)


def test_two_groups_over_two_hosts_serve_and_end_if_the_head_is_killed(exported, serve, spaces, reference):
    (left, _, interface), (right, *_) = spaces
    folder, plan = exported(GROUPED.replace("LEFT", interface))
    assert (plan.tensor_parallel_size, plan.partition) == (2, (4, 2))
    served = serve(folder, left, right).start().wait()
    hold_to_plan(served, plan, reference)
    served.kill(0, engine_only=False)
    assert served.codes()[1] == 1
    assert "node 0 is gone" in served.log(1)


def test_hosts_with_different_partitions_do_not_start(exported, serve, spaces):
    (left, _, interface), (right, *_) = spaces
    folder, _ = exported(APART.replace("LEFT", interface))
    text = (folder / "plan.env").read_text()
    (folder / "other.env").write_text(text.replace("PARTITION=4,2", "PARTITION=3,3"))
    served = serve(folder, left, right).start(("plan.env", "other.env"))
    assert served.codes() == [1, 1]
    for node in (0, 1):
        assert "node 1 has another plan.env than node 0" in served.log(node)
    assert not served.weights()


def test_the_commands_of_the_page_run_in_order(tmp_path, python):
    """What they print is compared with what the page shows."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CLONE": str(REPOSITORY),
        "ENGINE": str(python.parent),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        for block in blocks(REPOSITORY / "docs" / "vllm.md"):
            if isinstance(block, File):
                (tmp_path / block.name).write_text(block.text)
                continue
            if block.needs is not None:
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.line], cwd=tmp_path, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
            )  # fmt: skip
            logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
            assert done.returncode == block.exit_code, (block.line, done.stdout, logs)
            for line in block.printed:
                expected = re.escape(" ".join(line.split())).replace("…", ".*?")
                assert re.search(expected, " ".join(done.stdout.split())), (block.line, line, done.stdout)
    finally:
        for path in tmp_path.glob("*.pid"):
            subprocess.run(["kill", path.read_text().strip()], check=False, capture_output=True)
