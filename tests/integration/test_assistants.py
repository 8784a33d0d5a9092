"""A profile with a draft model: it is planned within the same capacities, loaded beside the model, and used in
generation.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA, REPOSITORY, devmap
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin

from devmap_config import compile_profile, load_model
from devmap_config.cli.compile import compile_command
from devmap_config.cli.run import run as run_model
from devmap_config.compiler import Request, run_pipeline
from devmap_config.graph.workload import PROPOSED_TOKENS
from devmap_config.plan.explanation import alternatives
from devmap_config.runner.loading import RunnerError

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])
SMALL = {**LLAMA, "hidden_size": 32, "num_hidden_layers": 2}

CARDS = "{cuda:0: {memory: 1400KiB}, cuda:1: {memory: 1400KiB}, cpu: {memory: 1GiB}}"
MACHINE = "{cpu: {memory: 1GiB}}"


def save(config, name, dtype=torch.float32):
    own = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **own)).to(dtype).save_pretrained(name)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".git").mkdir()
    save(LLAMA, "random")
    save(SMALL, "draft")


def write_profile(assistant="draft", *, devices=MACHINE, workload="context_length: 64", placement="{}"):
    named = "" if assistant is None else f", assistant: {assistant}"
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: random{named}}}\nworkload: {{{workload}}}\n"
        f"hardware: {{devices: {devices}}}\nplacement: {placement}\n"
    )


def compiled():
    return compile_command.main(["profile.yaml", "-q"], standalone_mode=False)


@pytest.fixture
def proposals(monkeypatch):
    """Record the width of the draft model in each assisted generation."""
    seen = []
    generate = GenerationMixin._assisted_decoding

    def counting(self, *arguments, **options):
        seen.append(options["assistant_model"].config.hidden_size)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", counting)
    return seen


@torch.no_grad()
def test_generation_with_a_draft_model_equals_plain_generation(proposals):
    plain = AutoModelForCausalLM.from_pretrained("random")
    write_profile()
    assert compiled() == 0
    model = load_model("profile.yaml")
    written = {"input_ids": TOKENS, "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(model.generate(**written), plain.generate(**written))
    assert proposals == [SMALL["hidden_size"]]
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


@torch.no_grad()
def test_a_draft_equal_to_the_model_saves_forwards(proposals):
    write_profile("random")
    assert compiled() == 0
    model = load_model("profile.yaml")
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(input_ids=TOKENS, max_new_tokens=24, do_sample=False)
    assert len(calls) < 24
    assert proposals


def test_draft_weights_and_cache_reduce_the_capacity_of_their_device():
    write_profile(None, devices=CARDS)
    before = {use.id: use for use in compile_profile("profile.yaml").devices}
    write_profile("{source: draft, device: cuda:1}", devices=CARDS)
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    plan, draft = compilation.plan, compilation.assistant
    (its,) = (use for use in draft.plan.devices if use.weights_bytes)
    assert its.weights_bytes == draft.model.graph.size_bytes
    assert its.kv_cache_bytes == draft.model.graph.measurement.cache_bytes > 0
    for use in plan.devices:
        taken = its.weights_bytes + its.kv_cache_bytes if str(use.id) == "cuda:1" else 0
        assert use.capacity_bytes == before[use.id].capacity_bytes - taken
    on_its_card = next(use for use in plan.devices if use.id == its.id)
    assert on_its_card.free_bytes + on_its_card.activation_bytes >= its.activation_bytes
    assert plan.draft.to_json() == {
        "class_name": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cuda:1",
        "weights_bytes": its.weights_bytes,
        "kv_cache_bytes": its.kv_cache_bytes,
        "activation_bytes": its.activation_bytes,
        "decode_nanoseconds_per_token": draft.plan.prediction.decode_nanoseconds_per_token,
    }


def test_alternative_placements_do_not_use_the_room_of_the_draft():
    cards = "{cuda:0: {memory: 64MiB}, cuda:1: {memory: %s}, cpu: {memory: 1GiB}}"
    write_profile("{source: draft, device: cuda:1}", devices=cards % "64MiB", placement="{strategy: sequential}")
    draft = compile_profile("profile.yaml").draft
    room_kibibytes = (draft.held_bytes + draft.activation_bytes) // 1024 + 8
    layer = "model.layers.0"
    for named, is_free in (("{source: draft, device: cuda:1}", False), (None, True)):
        write_profile(named, devices=cards % f"{room_kibibytes}KiB", placement="{strategy: sequential}")
        compiled = run_pipeline(Request(path=Path("profile.yaml")))
        places = alternatives(compiled.plan, compiled.graph, compiled.inventory, layer)
        beside_it = next(place for place in places if str(place.location.runs_on) == "cuda:1")
        assert (beside_it.missing_bytes == 0) == is_free


def test_logits_of_all_proposed_tokens_are_counted():
    save({**LLAMA, "vocab_size": 20_000}, "random")
    save({**SMALL, "vocab_size": 20_000}, "draft")
    peaks = []
    for named in (None, "draft"):
        write_profile(named, workload="context_length: 32")
        measurement = run_pipeline(Request(path=Path("profile.yaml"))).model.graph.measurement
        peaks.append(measurement.by_path["lm_head"].prefill_peak_bytes)
    assert peaks[1] - peaks[0] == PROPOSED_TOKENS * 20_000 * 4


@pytest.mark.parametrize("strategy", ["auto", "sequential", "fewest-devices"])
def test_plans_leave_the_draft_room_for_its_activations(strategy):
    """Over capacities in steps of 200 KiB that hold both models."""
    save({**SMALL, "vocab_size": 256, "intermediate_size": 2048}, "wide")
    fits = 0
    for kibibytes in range(1900, 4300, 200):
        devices = CARDS.replace("cuda:0: {memory: 1400KiB}", f"cuda:0: {{memory: {kibibytes}KiB}}")
        write_profile("wide", devices=devices, placement=f"{{strategy: {strategy}}}")
        compilation = run_pipeline(Request(path=Path("profile.yaml")))
        if (plan := getattr(compilation, "plan", None)) is not None:
            fits += 1
            assert not plan.draft_missing_bytes
            use = next(use for use in plan.devices if use.id == plan.draft.device)
            held = use.capacity_bytes - use.free_bytes - use.activation_bytes
            turns = max(use.activation_bytes, plan.draft.activation_bytes)
            assert held + turns + plan.draft.held_bytes <= kibibytes * 1024
    assert fits


def test_the_lock_records_the_draft_and_is_stale_if_it_changes(capsys):
    write_profile()
    assert compiled() == 0
    lock = json.loads(Path("profile.lock.json").read_text())
    assert lock["plan"]["assistant"]["device"] == "cpu"
    assert devmap("check", "profile.yaml") == 0
    save({**SMALL, "num_hidden_layers": 3}, "draft")
    capsys.readouterr()
    assert devmap("check", "profile.yaml") == 3
    assert "the draft model changed" in capsys.readouterr().err


def test_compile_checks_the_checkpoint_of_the_draft():
    write_profile()
    config = json.loads(Path("draft/config.json").read_text())
    Path("draft/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    [finding] = run_pipeline(Request(path=Path("profile.yaml"), checks_checkpoint=True)).diagnostics
    assert (finding.code, finding.span.line) == ("wrong-checkpoint", 2)
    assert finding.message.startswith("of the draft model: the checkpoint does not hold this LlamaForCausalLM")


def test_a_damaged_draft_checkpoint_is_an_error_when_loading():
    write_profile()
    assert compiled() == 0
    file = Path("draft/model.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(RunnerError) as caught:
        load_model("profile.yaml")
    assert caught.value.code == "unreadable-checkpoint"


def test_run_with_random_weights_uses_the_draft(proposals):
    write_profile()
    assert compiled() == 0
    done = CliRunner().invoke(run_model, ["profile.yaml", "--random-weights"])
    assert done.exit_code == 0, done.output
    assert proposals == [SMALL["hidden_size"]]


def test_the_shipped_profile_with_a_draft_writes_its_sentence(proposals):
    profile = str(REPOSITORY / "profiles/quickstart-draft.yaml")
    done = CliRunner().invoke(run_model, [profile, "--prompt", "Two tensors", "--no-probe"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == "Two tensors that are tied share one memory and must never be parted"
    assert proposals


def test_output_says_that_predictions_exclude_the_draft(capsys):
    cards = "{cuda:0: rtx-4090}"
    write_profile(devices=cards)
    assert devmap("compile", "profile.yaml") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "beside it the draft model, LlamaForCausalLM in float32, is on cuda:0: weights" in said
    assert "times are those without it, which takes" in said
    assert "no longest context is predicted: the draft model's cache grows with it" in said
    assert json.loads(Path("profile.lock.json").read_text())["plan"]["prediction"]["longest_context"] is None


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ({"workload": "context_length: 64, batch_size: 2"}, "unfit-assistant", "one sequence at a time"),
        ({"workload": "context_length: 64, cache: static"}, "unfit-assistant", "with a static cache"),
        ({"placement": "{strategy: longest-context}"}, "unfit-assistant", "does not count the draft"),
        ({"assistant": "someone/llama-draft"}, "unfit-assistant", "its commit is not named"),
        ({"assistant": "missing/of/three"}, "model-not-found", "of the draft model: there is no"),
        ({"assistant": "other"}, "unfit-assistant", "its vocabulary has 300 words, and the model's 256"),
        ({"assistant": "{source: draft, device: cuda:7}"}, "unknown-device", "of the draft model: cuda:7 is not"),
        ({"devices": "{cpu: {memory: 100KiB}}"}, "over-capacity", "of the draft model: "),
        (
            {"devices": CARDS, "placement": "{pins: [{match: model.embed_tokens, device: cpu}]}"},
            "unfit-assistant",
            "`model.embed_tokens` is copied to where it runs at every forward",
        ),
    ],
)
def test_an_unsuitable_draft_is_an_error_with_the_reason(options, code, told):
    save({**SMALL, "vocab_size": 300}, "other")
    write_profile(**options)
    found = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    errors = [each for each in found if each.is_error]
    assert [each.code for each in errors] == [code], errors
    assert told in errors[0].message
    assert replace(errors[0]).help
