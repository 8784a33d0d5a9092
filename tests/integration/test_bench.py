"""`devmap bench` runs a plan and plain transformers in turns, and compares them if the machine is quiet enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from small_media_models import IMAGE_MODELS

from devmap_config.cli.bench import bench
from devmap_config.cli.compile import compile_command
from devmap_config.profile.permissions import NO_PERMISSIONS
from devmap_config.runner import benchmark, benchmark_process
from devmap_config.runner.benchmark import jobs_of, ratio_of
from devmap_config.runner.benchmark_process import Sample, SampleFailure, run_in_process
from devmap_config.runner.demonstration import planned_generation
from devmap_config.runner.generation_times import GenerationTimes
from devmap_config.runner.loading import is_out_of_memory
from devmap_config.runner.runner import prepare


def write_profile(devices="cpu: {memory: 1GiB}"):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: llama}}\nworkload: {{context_length: 32, batch_size: 2}}\n"
        f"hardware: {{devices: {{{devices}}}}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q", "--no-simulate"], standalone_mode=False) == 0


def run(*arguments):
    command = ["profile.yaml", "--random-weights", *arguments]
    return CliRunner().invoke(bench, command, standalone_mode=False, catch_exceptions=False)


def jobs():
    """Return a job of each loader, for a model whose weights are never written."""
    deployment = prepare(Path("profile.yaml"), variables={}, needs_weights=False)
    workload = deployment.compiled.loaded.profile.workload
    options = {"variables": {}, "permissions": NO_PERMISSIONS, "generation": planned_generation(workload, 4)}
    return jobs_of(deployment, Path("profile.yaml"), **options)


def takes(**seconds):
    """What stands in for processes: each loader takes these seconds for everything, in its first turn and so on."""
    turns = {loader: iter(each) for loader, each in seconds.items()}
    warm_ups = iter([True])

    def run_in_process(job):
        found = 1.0 if next(warm_ups, False) else next(turns[job.loader])
        if isinstance(found, SampleFailure):
            return found
        generation = GenerationTimes(
            workload=job.generation,
            first_generation_seconds=found,
            prefill_seconds=(found,),
            decode_seconds=(found,),
            kv_cache_bytes={},
        )
        return Sample(load_seconds=found, generation=generation, peak_bytes={"cpu": int(found * 2**30)})

    return run_in_process


def test_ratios_are_computed_per_round_with_their_spread():
    ratio = ratio_of((1.0, 1.0, 1.1, 1.0), (2.0, 2.1, 2.2, 2.0))
    assert (ratio.median, ratio.least, ratio.most, ratio.is_too_noisy) == (2.0, 2.0, pytest.approx(2.1), False)


@pytest.mark.parametrize(
    ("own", "others", "is_too_noisy"),
    [
        ((1.0, 1.09, 1.0, 1.09), (2.0,) * 4, False),
        ((1.0, 1.11, 1.0, 1.11), (2.0,) * 4, True),
        ((1.0,) * 4, (2.3, 2.0, 2.3, 2.0), True),
        ((1.0, 1.0, 3.0, 3.0), (2.0,) * 4, False),  # slower from one hour to the next, and both halves alike
    ],
)
def test_a_machine_is_noisy_if_two_equal_runs_differ_by_a_tenth(own, others, is_too_noisy):
    assert ratio_of(own, others).is_too_noisy is is_too_noisy


def test_the_order_of_loaders_rotates():
    assert list(benchmark.turns(("plan", "auto", "cpu"), 4)) == [
        ("plan", "auto", "cpu"),
        ("auto", "cpu", "plan"),
        ("cpu", "plan", "auto"),
        ("plan", "auto", "cpu"),
    ]


def test_auto_has_as_much_room_for_weights_as_the_plan(workspace):
    write_profile()
    plan, auto, cpu = jobs()
    [use] = prepare(Path("profile.yaml"), variables={}, needs_weights=False).plan.devices
    assert auto.max_memory == {"cpu": use.capacity_bytes - use.kv_cache_bytes - use.activation_bytes}
    assert (plan.loader, auto.loader, cpu.loader) == ("plan", "auto", "cpu")


def test_beside_cards_nothing_is_compared_with_the_cpu_alone(workspace):
    write_profile("cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}")
    assert [(job.loader, set(job.max_memory)) for job in jobs()] == [("plan", {0, "cpu"}), ("auto", {0, "cpu"})]


def test_a_whole_benchmark_reports_each_loaders_times(workspace, monkeypatch):
    """Seven processes, and one that imports the libraries for them: some ten seconds."""
    write_profile()
    monkeypatch.setattr(benchmark, "run_in_process", lambda job: run_in_process(replace(job, least_seconds=0)))
    done = run("--rounds", "2", "--new-tokens", "3", "--format", "json")
    value = json.loads(done.stdout)
    assert value["diagnostics"] == []
    found = value["benchmark"]
    assert (found["batch_size"], found["prompt_tokens"], found["new_tokens"]) == (2, 29, 3)
    assert list(found["loaders"]) == ["plan", "auto", "cpu"]
    for each in found["loaders"].values():
        assert each["failure"] is None
        for phase in ("load", "prefill", "decode"):
            assert len(each[f"{phase}_seconds"]) == 2
            assert all(0 < seconds < 60 for seconds in each[f"{phase}_seconds"])
        assert each["peak_bytes"]["cpu"] > 50_000_000
    for ratios in found["ratios"].values():
        for ratio in ratios.values():
            assert (ratio["median"] is None) == ratio["too_noisy"] == (ratio["noise"] > 1.1)
    noisy = any(ratio["too_noisy"] for ratios in found["ratios"].values() for ratio in ratios.values())
    assert done.return_value == (5 if noisy else 0)


def test_prompts_hold_the_images_that_were_planned(workspace, monkeypatch):
    Path("llama/config.json").write_text(json.dumps({**IMAGE_MODELS["llava"], "dtype": "float32"}))
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: llama}\nworkload: {context_length: 64, inputs: {images: 1}}\n"
        "hardware: {devices: {cpu: {memory: 1GiB}}}\n"
    )
    assert compile_command.main(["profile.yaml", "-q", "--no-simulate"], standalone_mode=False) == 0
    jobs, times = [], takes(plan=[1.0] * 2, auto=[1.0] * 2, cpu=[1.0] * 2)
    monkeypatch.setattr(benchmark, "run_in_process", lambda job: jobs.append(job) or times(job))
    done = run("--rounds", "2", "--new-tokens", "4")
    assert done.stdout.splitlines()[1:3] == [
        "batch 1, 60 tokens prefilled, 4 written; 2 rounds",
        "1 image = 16 tokens of each prompt",
    ]
    assert {job.generation.prompts.besides.images for job in jobs} == {1}


def test_times_are_shown_with_their_spread_and_ratios(workspace, monkeypatch):
    write_profile()
    monkeypatch.setattr(
        benchmark, "run_in_process", takes(plan=[1.0, 1.01, 1.0], auto=[1.5, 1.51, 1.5], cpu=[0.5, 0.6, 0.5])
    )
    done = run("--rounds", "3")
    lines = done.stdout.splitlines()
    assert done.return_value == 5
    assert lines[2].split() == ["phase", "by", "median", "spread", "×", "plan", "spread"]
    assert lines[4].split() == ["load", "plan", "1.00", "s", "1.00–1.01", "s"]
    assert lines[5].split() == ["auto", "1.50", "s", "1.50–1.51", "s", "1.50", "1.50–1.50"]
    assert lines[6].split() == ["cpu", "500", "ms", "500–600", "ms", "too", "noisy", "1.20×"]
    assert "plan: at most 1.0 GiB of cpu" in lines
    assert not any("predicted" in line for line in lines)  # the machine does not say how fast it is
    assert max(map(len, lines)) <= 80


def test_predictions_are_shown_with_their_basis(workspace, monkeypatch):
    write_profile("cpu: {memory: 1GiB, bandwidth: 9GB/s measured, flops: 90GFLOP/s measured}")
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[1.0] * 2, auto=[1.5] * 2, cpu=[2.0] * 2))
    lines = run("--rounds", "2").stdout.splitlines()
    [place] = [place for place, line in enumerate(lines) if line.startswith("predicted: ")]
    assert " a token, " in lines[place]
    assert "these times rest on stated rates" in lines[place:]  # how fast the host is, nobody measured
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[1.0] * 2, auto=[1.5] * 2, cpu=[2.0] * 2))
    told = json.loads(run("--rounds", "2", "--format", "json").stdout)["plan"]["basis"]
    assert {phase: each["rates"] for phase, each in told.items()} == {"decode": "stated", "prefill": "stated"}


def test_a_quiet_machine_gets_no_message_about_noise(workspace, monkeypatch):
    write_profile()
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[1.0] * 2, auto=[1.5] * 2, cpu=[2.0] * 2))
    done = run("--rounds", "2")
    assert (done.return_value, "nois" in done.stdout) == (0, False)


@pytest.mark.parametrize("columns", [60, 120])
def test_the_table_is_no_wider_than_the_terminal(workspace, monkeypatch, columns):
    write_profile()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[0.123] * 2, auto=[1.234] * 2, cpu=[0.111] * 2))
    done = run("--rounds", "2")
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert "…" not in done.stdout
    assert "123–123 ms" in done.stdout


OUT_OF_MEMORY = SampleFailure(doing="running", reason="CUDA out of memory", is_out_of_memory=True)


def test_running_out_of_memory_under_auto_is_a_result(workspace, monkeypatch):
    write_profile()
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[1.0] * 2, auto=[1.0, OUT_OF_MEMORY], cpu=[2.0] * 2))
    done = run("--rounds", "2")
    assert done.return_value == 0
    assert "auto: out of memory while running" in done.stdout.splitlines()
    assert [line.split()[-1] for line in done.stdout.splitlines() if " cpu " in line][:3] == ["2.00–2.00"] * 3


def test_a_plan_that_fails_is_an_error_and_no_ratio(workspace, monkeypatch):
    write_profile()
    failure = SampleFailure(doing="loading", reason="it is not there", is_out_of_memory=False)
    monkeypatch.setattr(benchmark, "run_in_process", takes(plan=[failure], auto=[1.0] * 2, cpu=[2.0] * 2))
    done = run("--rounds", "2", "--format", "json")
    value = json.loads(done.stdout)
    assert (done.return_value, [each["code"] for each in value["diagnostics"]]) == (4, ["load-failed"])
    assert value["benchmark"]["ratios"]["auto"]["decode"] is None
    assert len(value["benchmark"]["loaders"]["auto"]["decode_seconds"]) == 2


def test_an_encoder_is_measured_with_the_planned_prompt(workspace):
    write_profile()
    workload = prepare(Path("profile.yaml"), variables={}, needs_weights=False).compiled.loaded.profile.workload
    planned = planned_generation(workload, 16, decodes=False)
    assert (planned.prompts.length, planned.new_tokens) == (32, 0)


PLANS = sorted((REPOSITORY / "benchmarks" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.stem)
def test_the_plans_that_the_page_measures_compile_and_have_room_for_what_is_asked(plan):
    arguments = [str(plan), "-q", "--dry-run", "--no-simulate"]
    assert compile_command.main(arguments, standalone_mode=False) == 0
    command = f"devmap bench {plan.relative_to(REPOSITORY)} --random-weights --new-tokens 16"
    assert command in (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")


def test_more_tokens_than_the_planned_context_are_refused(workspace):
    write_profile()
    done = run("--new-tokens", "32")
    assert (done.return_value, "error[beyond-context]" in done.stderr) == (1, True)


def test_a_model_that_cannot_be_loaded_is_returned_as_a_failure(workspace):
    write_profile()
    _, auto, _ = jobs()
    found = run_in_process(replace(auto, request=replace(auto.request, weights="nowhere")))
    assert isinstance(found, SampleFailure)
    assert (found.doing, found.is_out_of_memory, "OSError" in found.reason) == ("loading", False, True)


def die(job):
    os._exit(9)


def test_a_killed_process_is_returned_as_a_failure(workspace, monkeypatch):
    write_profile()
    monkeypatch.setattr(benchmark_process, "measure", die)
    found = run_in_process(jobs()[0])
    assert isinstance(found, SampleFailure)
    assert str(found).startswith("its process was killed, as a system does that runs out of memory")


def test_nothing_is_imported_from_the_working_folder(tmp_path):
    for name in ("multiprocessing", "planted"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()")
    start = "from multiprocessing import forkserver\nfrom devmap_config.runner import benchmark_process\n"
    start += "benchmark_process.start_server(['planted'])\nforkserver._forkserver._stop()"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/start.py").write_text(start)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "elsewhere/start.py"], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_out_of_memory_errors_are_recognised(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("a size does not fit"))
