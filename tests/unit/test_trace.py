"""A plan's trace has the predicted times, and is valid for trace viewers."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from click import UsageError
from click.testing import CliRunner
from conftest import REPOSITORY, write_models

from devmap_config.cli import devmap
from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.simulate.memory import simulation_of
from devmap_config.simulate.trace import RAN_UNQUANTIZED, trace_of, trace_text

LLAMA = "llama"
CARD = "{memory: 320KiB, bandwidth: 1TB/s, flops: 100TFLOP/s}"
ROOMY_CARDS = f'"cuda:[0-1]": {CARD.replace("320KiB", "600KiB")}'
HOST = "cpu: {memory: 1GiB}"
FAST_HOST = "cpu: {memory: 1GiB, bandwidth: 50GB/s, flops: 1TFLOP/s}"
LINKS = "host: 25GB/s, peer: 10GB/s"
TAKING_TURNS = "host: 10MB/s, together: 20MB/s, peer: 10GB/s"
DISK = "cpu: {memory: 400KiB}, disk: {memory: 1GiB, bandwidth: 2GB/s}"
ON_DISK = "strategy: sequential, offload: {folder: offload}"
APART = (
    'strategy: sequential, pins: [{match: "model.layers.[1-2].mlp", device: cpu, compute: cpu},'
    ' {match: "model.layers.5", device: cuda:1}]'
)

ENCODER_AND_DECODER = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "dtype": "bfloat16",
    "vocab_size": 512,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 3,
    "num_heads": 4,
}

PROFILES = {
    "several cards": (LLAMA, ROOMY_CARDS, LINKS, "strategy: sequential", "cuda:0 → cuda:1"),
    "brought ahead": (LLAMA, f"cuda:0: {CARD}, {HOST}", LINKS, "strategy: sequential", "cpu → cuda:0, ahead"),
    "cards in turns": (
        LLAMA,
        f'"cuda:[0-1]": {CARD}, {HOST}',
        TAKING_TURNS,
        "strategy: fastest",
        "cpu → cuda:1, ahead",
    ),
    "by way of the CPU": (LLAMA, f"cuda:0: {CARD}, {DISK}", LINKS, ON_DISK, "disk → cpu, ahead"),
    "parts elsewhere": (LLAMA, f"{ROOMY_CARDS}, {FAST_HOST}", LINKS, APART, "cpu → cuda:0"),
    "the CPU alone": ("mixture", FAST_HOST, LINKS, "strategy: auto", None),
    "an encoder and a decoder": ("encdec", ROOMY_CARDS, LINKS, "strategy: balanced", "cuda:0 → cuda:1"),
    "waited for": (
        LLAMA,
        f"cuda:0: {CARD}, {HOST}",
        LINKS,
        "strategy: auto, offload: {buffers: false}",
        "cpu → cuda:0",
    ),
}
"""By what they show: a model, its devices and links, where it is placed, and a link that it then takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the models, in which tests of this module run."""
    path = tmp_path_factory.mktemp("traces")
    write_models(path)
    (path / "encdec").mkdir()
    (path / "encdec/config.json").write_text(json.dumps(ENCODER_AND_DECODER))
    with pytest.MonkeyPatch.context() as context:
        context.chdir(path)
        yield path


def profile(model, devices, links, placement, workload="workload: {context_length: 64}\n"):
    return (
        f"version: 1\nmodel: {{source: {model}}}\n{workload}"
        f"hardware:\n  devices: {{{devices}}}\n  links: {{{links}}}\nplacement: {{{placement}}}\n"
    )


def compiled(path):
    compilation = run_pipeline(Request(path=path))
    assert isinstance(compilation, Compiled), [each.message for each in compilation.diagnostics]
    return compilation


def traced(compilation, simulation=None):
    plan, graph, inventory = compilation.plan, compilation.graph, compilation.inventory
    trace = trace_of(plan, graph, inventory, simulation, tokens=2, name=compilation.model.class_name)
    assert json.loads(trace_text(trace)) == trace
    return trace


def tracks_of(trace):
    """Return the slices of each track, by the names of its process and thread."""
    named = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    processes = {each["pid"]: each["args"]["name"] for each in named if each["name"] == "process_name"}
    threads = {(each["pid"], each["tid"]): each["args"]["name"] for each in named if each["name"] == "thread_name"}
    found = {(processes[pid], thread): [] for (pid, _), thread in threads.items()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[processes[event["pid"]], threads[event["pid"], event["tid"]]].append(event)
    return found


def assert_well_formed(trace):
    """It holds to the format's document: what viewers need to know of each event, in the order of time."""
    events = trace["traceEvents"]
    metadata = [event for event in events if event["ph"] == "M"]
    assert events[: len(metadata)] == metadata
    assert all(one["ts"] <= other["ts"] for one, other in pairwise(events[len(metadata) :]))
    named = {(each["pid"], each["tid"]) for each in metadata if each["name"] == "thread_name"}
    needed = {"X": {"dur", "name", "cat"}, "C": {"name", "args"}, "s": {"id", "name", "cat"}, "f": {"id", "bp"}}
    ends = {}
    for event in events[len(metadata) :]:
        assert needed[event["ph"]] <= event.keys()
        assert (event["pid"], event["tid"]) in named
        assert isinstance(event["ts"], int)
        assert event["ph"] != "X" or (isinstance(event["dur"], int) and event["dur"] > 0)
        key = event["pid"], event["ph"]
        ends[key] = max(ends.get(key, 0), event["ts"] + event.get("dur", 0))
    # The memory of every device is told to the end, else viewers draw none of it.
    memory = {end for (_, phase), end in ends.items() if phase == "C"}
    assert memory <= {max(ends.values())}


def assert_sound(trace, prediction):
    """Check that times are the predicted ones, tracks show one slice at a time, and flows lead from copies to waits."""
    assert_well_formed(trace)
    tracks = tracks_of(trace)
    for track in tracks.values():
        assert all(one["ts"] + one["dur"] <= other["ts"] for one, other in pairwise(track))
    [forwards] = (track for (_, thread), track in tracks.items() if thread == "forwards")
    ran = [each for (_, thread), track in tracks.items() if thread == "runs" for each in track]
    figures = {"prefill": prediction.prefill_nanoseconds}
    for forward in forwards:
        predicted = figures.get(forward["name"], prediction.decode_nanoseconds_per_token)
        ends = forward["ts"] + forward["dur"]
        shown = [each for each in ran if forward["ts"] <= each["ts"] < ends]
        assert forward["args"]["predicted_nanoseconds"] == predicted
        assert abs(forward["dur"] - predicted / 1_000) <= 1
        assert sum(each["args"]["nanoseconds"] for each in shown) == predicted
        assert sum(each["dur"] for each in shown) == forward["dur"]
    copies = [each for (process, _), track in tracks.items() if process == "links" for each in track]
    begun, ended = (
        {event["id"]: event for event in trace["traceEvents"] if event["ph"] == phase} for phase in ("s", "f")
    )
    assert begun.keys() == ended.keys()
    for number, flow in begun.items():
        assert flow["ts"] <= ended[number]["ts"]
        assert any(binds(each, flow) for each in copies)
        assert any(binds(each, ended[number]) for each in (*ran, *copies))
    return [each["name"] for each in forwards]


def binds(event, flow):
    is_there = (event["pid"], event["tid"]) == (flow["pid"], flow["tid"])
    return is_there and event["ts"] <= flow["ts"] < event["ts"] + event["dur"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_trace_has_the_predicted_times_and_memory(folder, name):
    *described, link = PROFILES[name]
    (folder / "p.yaml").write_text(profile(*described))
    compilation = compiled(folder / "p.yaml")
    simulation = simulation_of(compilation.plan, compilation.model)
    trace = traced(compilation, simulation)
    assert assert_sound(trace, compilation.plan.prediction) == ["prefill", "token 1", "token 2"]
    tracks = tracks_of(trace)
    taken = [thread for (process, thread), track in tracks.items() if process == "links" and track]
    assert link in taken if link else not taken
    for number, device in enumerate(simulation.devices, 2):
        held = [
            event["args"]["bytes"]
            for event in trace["traceEvents"]
            if event["ph"] == "C" and event["pid"] == number and (str(device.id), "runs") in tracks
        ]
        assert max(held) == device.peak_bytes
        assert min(held) == held[0] == device.weights_bytes
    ran = {event["name"] for (_, thread), track in tracks.items() if thread == "runs" for event in track}
    assert ran - {"waits for copies", "outside of blocks"} <= set(compilation.graph.blocks)
    assert (name == "waited for") <= ("waits for copies" in ran)


def test_alternating_cards_copy_their_weights_at_once(folder):
    *described, _ = PROFILES["cards in turns"]
    (folder / "p.yaml").write_text(profile(*described))
    tracks = tracks_of(traced(compiled(folder / "p.yaml")))
    one, other = (tracks["links", f"cpu → cuda:{index}, ahead"] for index in (0, 1))
    assert any(a["ts"] < b["ts"] + b["dur"] and b["ts"] < a["ts"] + a["dur"] for a in one for b in other)


@pytest.mark.zoo
@pytest.mark.parametrize("path", sorted((REPOSITORY / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_trace_of_each_profile_has_the_predicted_times(path):
    compilation = compiled(path)
    prediction = compilation.plan.prediction
    if compilation.plan.pipeline is None and prediction.decode_nanoseconds_per_token is not None:
        assert_sound(traced(compilation), prediction)


# The command


def run(*arguments):
    return CliRunner().invoke(devmap, ["simulate", "p.yaml", *arguments], standalone_mode=False)


def test_simulate_writes_the_same_trace_each_time(folder):
    *described, _ = PROFILES["several cards"]
    (folder / "p.yaml").write_text(profile(*described))
    printed = run("--format", "trace", "--tokens", "3")
    written = run("--format", "trace", "--tokens", "3", "-o", "t.json")
    assert (printed.return_value, written.return_value) == (0, 0)
    assert (folder / "t.json").read_text() == printed.stdout
    assert (written.stdout, written.stderr) == ("", "wrote t.json\n")
    trace = json.loads(printed.stdout)
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "forward"]
    assert names == ["prefill", "token 1", "token 2", "token 3"]
    told = trace["otherData"]
    assert told["times"].endswith("not measured")
    assert told["basis"]["decode"]["rates"] == "stated"


def test_a_phase_without_a_known_time_is_left_out_with_the_reason(folder):
    devices = FAST_HOST.replace(", flops: 1TFLOP/s", "")
    (folder / "p.yaml").write_text(profile("mixture", devices, LINKS, "strategy: auto"))
    trace = traced(compiled(folder / "p.yaml"))
    assert assert_sound(trace, compiled(folder / "p.yaml").plan.prediction) == ["token 1", "token 2"]
    assert trace["otherData"]["not shown"] == {"prefill": "not known: the `flops` of cpu"}
    assert trace["otherData"]["memory"] == "not shown, for nothing was tried without torch"


def test_the_trace_of_a_quantised_model_says_that_its_memory_is_unquantised(folder):
    quantization = ", quantization: {method: bitsandbytes, load_in_8bit: true}"
    text = profile(LLAMA, "cuda:0: rtx-4090", LINKS, "strategy: single")
    (folder / "p.yaml").write_text(text)
    assert "unquantised" not in json.loads(run("--format", "trace").stdout)["otherData"]["memory"]
    (folder / "p.yaml").write_text(text.replace(f"source: {LLAMA}", f"source: {LLAMA}{quantization}"))
    memory = json.loads(run("--format", "trace").stdout)["otherData"]["memory"]
    assert memory.endswith(RAN_UNQUANTIZED)


@pytest.mark.parametrize(
    ("devices", "workload", "said"),
    [
        (HOST, "workload: {context_length: 64}\n", "missing-figure"),
        (FAST_HOST, "", "missing-workload"),
    ],
)
def test_without_times_there_is_no_trace(folder, devices, workload, said):
    (folder / "p.yaml").write_text(profile(LLAMA, devices, LINKS, "strategy: auto", workload))
    (folder / "none.json").unlink(missing_ok=True)
    done = run("--format", "trace", "-o", "none.json")
    assert (done.return_value, done.stdout, (folder / "none.json").exists()) == (1, "", False)
    assert f"error[{said}]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "t.json"), "add `--format trace`"),
        (("--format", "trace", "-o", "p.yaml"), "ends in `.json`"),
        (("--format", "trace", "-o", "p.lock.json"), "is no lock"),
        (("--format", "trace", "-o", "absent/t.json"), "does not exist"),
    ],
)
def test_a_trace_does_not_overwrite_other_files(folder, arguments, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        CliRunner().invoke(devmap, ["simulate", "p.yaml", *arguments], standalone_mode=False, catch_exceptions=False)


def test_hostile_names_stay_text_in_a_trace(folder):
    *described, _ = PROFILES["the CPU alone"]
    (folder / "p.yaml").write_text(profile(*described))
    compilation = compiled(folder / "p.yaml")
    name = "\u202e##[error]\x1b[2J\udce9\n::error ::"
    trace = trace_of(compilation.plan, compilation.graph, compilation.inventory, None, tokens=1, name=name)
    text = trace_text(trace)
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert "##[" not in text
    assert not any(line.startswith("::") for line in text.splitlines())
    assert json.loads(text)["otherData"]["model"] == r"\u202e##[error]\x1b[2J\xe9\n::error ::"
