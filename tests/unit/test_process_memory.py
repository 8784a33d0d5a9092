"""The predicted memory of a process: its own, pages of files, and the peak, by how weights are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LLAMA

from devmap_config.cli.compile import compile_command
from devmap_config.cli.fit import fit
from devmap_config.compiler import Request, run_pipeline
from devmap_config.devices import CPU
from devmap_config.hardware.constants import (
    HELD_SHARE,
    HELD_SHARE_END_BYTES,
    LIBRARY_FILE_BYTES,
    PROCESS_ANONYMOUS_BYTES,
    PROGRAM_BYTES,
)

ON_CPU = "cpu: {memory: 4GiB}"
CONTEXT = "{context_length: 32}"


@pytest.fixture(autouse=True)
def in_workspace(workspace):
    return workspace


def compiled(source, devices=ON_CPU, *, model="", workload=CONTEXT, placement="strategy: sequential"):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {source}{model}}}\nworkload: {workload}\n"
        f"hardware: {{devices: {{{devices}}}}}\nplacement: {{{placement}}}\n"
    )
    return run_pipeline(Request(path=Path("profile.yaml")))


def held(*arguments, **options):
    """Return the predicted bytes of a plan's process beyond the libraries, and the plan's use of the CPU."""
    found = compiled(*arguments, **options)
    memory = found.process_memory
    use = next(each for each in found.plan.devices if each.id == CPU)
    running_bytes = use.kv_cache_bytes + use.activation_bytes
    own_bytes = memory.anonymous_bytes - PROCESS_ANONYMOUS_BYTES - use.overhead_bytes
    own_bytes -= running_bytes + int(min(running_bytes, HELD_SHARE_END_BYTES) * HELD_SHARE)
    storages = [found.graph.tensors[name] for name in set(found.graph.storage_of.values())]
    buffers_bytes = sum(each.size_bytes for each in storages if not each.persistent)
    return own_bytes - buffers_bytes, memory.file_bytes, memory, use.weights_bytes - buffers_bytes


def test_weights_as_they_are_stored_are_pages_of_the_file():
    own_bytes, file_bytes, memory, weights_bytes = held("llama")
    assert (own_bytes, file_bytes) == (0, weights_bytes)
    assert memory.peak_bytes == memory.anonymous_bytes + memory.file_bytes + LIBRARY_FILE_BYTES


def test_cast_weights_are_process_memory_and_their_file_is_mapped_while_loading():
    own_bytes, file_bytes, memory, weights_bytes = held("llama", model=", dtype: float32")
    assert (own_bytes, file_bytes) == (weights_bytes, 0)
    is_loading = PROCESS_ANONYMOUS_BYTES + LIBRARY_FILE_BYTES + weights_bytes * 3 // 2
    running_bytes = memory.anonymous_bytes + memory.file_bytes + LIBRARY_FILE_BYTES
    assert memory.peak_bytes == pytest.approx(max(is_loading, running_bytes), abs=2_000)


def test_merged_experts_are_process_memory_and_their_parts_stay_mapped():
    own_bytes, file_bytes, _, weights_bytes = held("mixture")
    found = compiled("mixture")
    merged_bytes = sum(found.graph.tensors[name].size_bytes for name in found.graph.merged)
    programs = (own_bytes - merged_bytes) / PROGRAM_BYTES
    assert programs == int(programs) > 0
    assert file_bytes == weights_bytes
    found_bytes, file_bytes, _, weights_bytes = held("mixture", model=", dtype: float32")
    assert (found_bytes, file_bytes) == (weights_bytes, 0)  # float32 is multiplied by what keeps no code for a shape


def test_a_token_touches_a_page_of_an_embedding():
    Path("wide").mkdir()
    Path("wide/config.json").write_text(json.dumps(LLAMA | {"vocab_size": 32_000}))
    embedding_bytes = 32_000 * LLAMA["hidden_size"] * 2
    _, file_bytes, _, weights_bytes = held("wide")
    assert weights_bytes - file_bytes == embedding_bytes - 32 * 4096
    Path("wide/config.json").write_text(json.dumps(LLAMA | {"vocab_size": 32_000, "tie_word_embeddings": True}))
    _, file_bytes, _, weights_bytes = held("wide")
    assert file_bytes == weights_bytes  # the head reads all of it


def test_weights_in_memory_beside_a_disk_are_copied():
    half = "strategy: sequential, offload: {folder: ./offload}, pins: [{match: 'model.layers.[1-]', device: disk}]"
    own_bytes, file_bytes, _, weights_bytes = held("llama", f"{ON_CPU}, disk: {{memory: 1GiB}}", placement=half)
    assert (own_bytes, file_bytes) == (weights_bytes, 0)


@pytest.mark.parametrize(
    ("devices", "workload"), [(f"cuda:0: {{memory: 1GiB}}, {ON_CPU}", CONTEXT), (ON_CPU, "{}")], ids=["card", "none"]
)
def test_no_process_memory_is_predicted_beside_a_card_or_without_a_workload(devices, workload):
    found = compiled("llama", devices, workload=workload)
    assert found.process_memory is None


def test_process_memory_is_in_the_plan_and_its_json(capsys):
    memory = held("llama")[2]
    assert compile_command.main(["profile.yaml"], standalone_mode=False) == 0
    assert "the process holds 29" in capsys.readouterr().out
    compile_command.main(["profile.yaml", "--format", "json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["process_memory"] == {
        "anonymous_bytes": memory.anonymous_bytes,
        "file_bytes": memory.file_bytes,
        "library_file_bytes": LIBRARY_FILE_BYTES,
        "peak_bytes": memory.peak_bytes,
        "uncounted_bytes": memory.uncounted_bytes,
        "missing_bytes": 0,
    }


def test_a_process_larger_than_the_cpus_memory_is_reported(capsys):
    """The CPU's memory can be meant as a budget; if it is all that exists, a reserve makes the plan fit."""
    memory = held("llama", "cpu: {memory: 40MiB}")[2]
    assert memory.missing_bytes == memory.anonymous_bytes + memory.file_bytes + LIBRARY_FILE_BYTES - 40 * 2**20
    assert memory.uncounted_bytes > PROCESS_ANONYMOUS_BYTES + LIBRARY_FILE_BYTES
    assert compile_command.main(["profile.yaml"], standalone_mode=False) == 0
    said = " ".join(capsys.readouterr().out.split())
    reserve = f"{-(-memory.uncounted_bytes // 2**20)}MiB"
    assert (
        f"more than the CPU's memory, of which tensors are counted; `reserve: {reserve}` is room for the rest" in said
    )
    memory_bytes = memory.uncounted_bytes + 40 * 2**20
    assert held("llama", f"cpu: {{memory: {memory_bytes}, reserve: {reserve}}}")[2].missing_bytes == 0
    fit.main(["profile.yaml", "--on", "cpu:40MiB,cpu:9GiB,1GiB+cpu:9GiB"], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    too_large = "with Python and the libraries its process is "
    assert said.count(too_large) == 1
    assert f"cpu:40MiB: {too_large}" in said
    assert "of the CPU's memory" not in said  # the card has room for all


def test_the_peak_of_a_process_is_sampled():
    taken = (
        "from devmap_config.runner import usage\n"
        "with usage.process_watched() as before:\n    pass\n"
        "with usage.process_watched() as seen:\n    taken = bytearray(b'x') * 64_000_000\n"
        "print(seen.anonymous_bytes - before.anonymous_bytes, seen.library_file_bytes, seen.file_bytes)"
    )  # in a process of its own, which has nothing to give back
    done = subprocess.run([sys.executable, "-c", taken], capture_output=True, text=True, check=True)
    taken_bytes, library_bytes, file_bytes = map(int, done.stdout.split())
    assert 60_000_000 < taken_bytes < 70_000_000
    assert library_bytes > 1_000_000 > file_bytes - library_bytes
