"""Random weights replace missing ones, so that a plan can be run before there is a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import click
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from conftest import LLAMA, MIXTURE
from safetensors import safe_open
from small_media_models import IMAGE_MODELS, SOUND_MODELS
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from devmap_config.cli.calibrate import calibrate
from devmap_config.cli.compile import compile_command
from devmap_config.cli.receipts import receipts
from devmap_config.cli.run import run as run_model
from devmap_config.graph.introspection import meta_model
from devmap_config.runner import random_weights
from devmap_config.runner.random_weights import shards_of


@pytest.fixture(autouse=True)
def temporary(workspace, monkeypatch):
    """A directory for temporary files, which must be empty at the end."""
    folder = workspace / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def write_profile(source, more="", devices="cpu: {memory: 1GiB}"):
    Path("profile.yaml").write_text(
        f"version: 1\nmodel: {{source: {source}}}\nhardware: {{devices: {{{devices}}}}}\n{more}"
    )
    assert compile_command.main(["profile.yaml", "-q", "--no-simulate"], standalone_mode=False) == 0


def run(*arguments):
    command = ["profile.yaml", "--random-weights", *arguments]
    return CliRunner().invoke(run_model, command, standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize("source", ["llama/config.json", "tied", "mixture"])
def test_a_config_without_weights_is_loaded_and_runs_for_the_planned_context(source, temporary):
    write_profile(source, "workload: {context_length: 64, batch_size: 2}\n")
    done = run("--format", "json", "--max-new-tokens", "4")
    found = json.loads(done.stdout)
    assert (done.return_value, found["diagnostics"]) == (0, [])
    assert (found["prompt_tokens"], found["tokens"]) == (2 * (64 - 4), 2 * 4)
    assert (found["verified"], found["unchecked"], found["output"]) == (False, "the weights are random", None)
    assert found["memory"][0]["device"] == "cpu"


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("llava", "{images: 2}"),
        ("blip-2", "{images: 1}"),
        ("whisper", "{audio_seconds: 1}"),
        ("qwen2_5_omni_thinker", "{images: 1, image_size: [112, 56], audio_seconds: 1}"),
    ],
)
def test_random_images_and_sound_have_the_planned_sizes(model, inputs, temporary, monkeypatch):
    Path("small").mkdir()
    config = {**{**IMAGE_MODELS, **SOUND_MODELS}[model], "dtype": "float32"}
    Path("small/config.json").write_text(json.dumps(config))
    given, model_class = {}, getattr(transformers, config["architectures"][0])
    generate = model_class.generate

    def noting(self, *arguments, **options):
        given.update(options)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(model_class, "generate", noting)
    write_profile("small", f"workload: {{context_length: 128, batch_size: 2, inputs: {inputs}}}\n")
    done = run("--format", "json", "--max-new-tokens", "4")
    found = json.loads(done.stdout)
    assert (done.return_value, found["tokens"], found["verified"]) == (0, 2 * 4, False), found["diagnostics"]
    for name in ("pixel_values", "input_features"):
        wanted = "images" in inputs if name == "pixel_values" else "audio" in inputs
        assert (name in given) == wanted
        assert not wanted or given[name].std() > 0


def test_a_prompt_with_images_must_leave_room_for_new_tokens(temporary):
    Path("small").mkdir()
    Path("small/config.json").write_text(json.dumps({**IMAGE_MODELS["llava"], "dtype": "float32"}))
    write_profile("small", "workload: {context_length: 40, inputs: {images: 2}}\n")
    done = run("--max-new-tokens", "10")
    assert "error[prompt-too-short]" in done.stderr
    assert "images and sound take 32 tokens, and 10 are to follow a prompt of 30" in " ".join(done.stderr.split())


def test_a_receipt_is_measured_with_the_planned_images(temporary, monkeypatch):
    Path("small").mkdir()
    Path("small/config.json").write_text(json.dumps({**IMAGE_MODELS["llava"], "dtype": "float32"}))
    write_profile("small", "workload: {context_length: 40, inputs: {images: 1}}\n")
    towers = []
    looks = CLIPVisionModel.forward
    monkeypatch.setattr(
        CLIPVisionModel, "forward", lambda self, *given, **more: towers.append(self) or looks(self, *given, **more)
    )
    assert run("--receipt", "receipt.json", "--max-new-tokens", "4").return_value == 0
    [case] = json.loads(Path("receipt.json").read_text())["cases"]
    assert (case["inputs"], case["generation"]["prompt_tokens"]) == ({"images": 1}, 36)
    assert len(towers) > 3  # in each measured round, and while it was shown


def test_output_does_not_call_random_weights_the_checkpoint(temporary):
    write_profile("llama")
    done = run()
    assert (done.return_value, done.stdout) == (0, "")
    assert re.match(r"loaded random weights: 59 tensors where the lock says \(cpu .*\); it took", done.stderr)
    assert "24 tokens after a prompt of 8" in done.stderr
    assert "checkpoint" not in done.stderr


def test_random_weights_on_disk_leave_the_offload_folder_unchanged(temporary):
    write_profile(
        "mixture",
        'placement: {strategy: sequential, offload: {folder: offload}, pins: [{match: "**.layers.1", device: disk}]}\n',
        devices="cpu: {memory: 1GiB}, disk: {memory: 1GiB}",
    )
    done = run("--max-new-tokens", "2")
    assert (done.return_value, "disk" in done.stderr) == (0, True), done.stderr
    assert not Path("offload").exists()


@pytest.mark.parametrize(
    ("config_class", "model_class", "config"),
    [
        (LlamaConfig, LlamaForCausalLM, {**LLAMA, "tie_word_embeddings": True}),
        (Qwen3MoeConfig, Qwen3MoeForCausalLM, MIXTURE),
    ],
)
def test_random_tensors_are_those_that_transformers_saves(workspace, temporary, config_class, model_class, config):
    """Each expert is a tensor, and of tied weights only one is written."""
    values = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "model_type")}
    model = model_class(config_class(**values)).to(torch.bfloat16)
    model.save_pretrained(workspace / "saved")
    with safe_open(workspace / "saved" / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    built = meta_model(workspace / "saved", class_name=model_class.__name__, dtype="bfloat16", attention=None)
    [shard] = shards_of(built)
    assert {name: shape for name, (shape, _) in shard.tensors.items()} == saved
    assert {dtype for _, dtype in shard.tensors.values()} == {torch.bfloat16}


def test_random_weights_are_distributed_as_initialised_ones(monkeypatch, temporary):
    monkeypatch.setattr(random_weights, "SHARD_BYTES", 50_000)
    built = meta_model(Path("llama"), class_name="LlamaForCausalLM", dtype="bfloat16", attention=None)
    shards = shards_of(built)
    assert len(shards) > 3
    assert all(shard.size_bytes <= 50_000 for shard in shards)
    weights, kinds = [], set()
    for seed, shard in enumerate(shards):
        shard.write(temporary, seed)
        with safe_open(temporary / shard.name, "pt") as file:
            for name in shard.tensors:
                tensor = file.get_tensor(name)
                kinds.add((tensor.dim(), tensor.dim() > 1 or bool((tensor == 1).all())))
                weights += [tensor.float().flatten()] if tensor.dim() > 1 else []
        (temporary / shard.name).unlink()
    spread = torch.cat(weights).std().item()
    assert (kinds, spread) == ({(1, True), (2, True)}, pytest.approx(0.02, rel=0.02))
    assert len({round(weight.sum().item(), 6) for weight in weights}) == len(weights)


def test_tensors_of_a_shard_have_storages_of_their_own_size(monkeypatch, tmp_path):
    monkeypatch.setattr(random_weights, "ROW", 4096)
    written = {}
    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, *_path, **_metadata: written.update(tensors))
    shapes = {"small": (8, 4), "large": (128, 64)}
    random_weights.Shard("x", {name: (shape, torch.bfloat16) for name, shape in shapes.items()}).write(tmp_path)
    assert {name: tensor.untyped_storage().nbytes() for name, tensor in written.items()} == {
        "small": 2 * 8 * 4,
        "large": 2 * 128 * 64,
    }


def test_too_little_disk_is_reported_before_writing(monkeypatch, temporary):
    write_profile("llama")
    full = shutil.disk_usage(".")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    monkeypatch.setattr(random_weights.Shard, "write", lambda *arguments: pytest.fail("it was written"))
    done = run("--no-probe")
    assert (done.return_value, "error[too-little-disk]: random weights take " in done.stderr) == (4, True)
    assert "`TMPDIR`" in done.stderr


def test_an_unfit_machine_is_reported_before_writing(monkeypatch, temporary):
    write_profile("llama", devices="npu:7: {memory: 1GiB}")
    monkeypatch.setattr(random_weights.Shard, "write", lambda *arguments: pytest.fail("it was written"))
    done = run()
    assert (done.return_value, "error[device-missing]" in done.stderr) == (4, True)


def test_random_weights_of_a_quantised_checkpoint_are_refused(temporary):
    write_profile("quantized", devices="cuda:0: {memory: 1GiB}")
    done = run("--no-probe")
    assert (done.return_value, "error[no-weights]" in done.stderr, "gptq" in done.stderr) == (1, True, True)


def test_a_failed_run_leaves_no_random_weights(temporary, monkeypatch):
    write_profile("llama")
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(lambda *arguments, **options: 1 / 0))
    done = run()
    assert (done.return_value, "error[load-failed]" in done.stderr) == (4, True)


def test_a_prompt_for_random_weights_is_refused(temporary):
    write_profile("llama")
    with pytest.raises(click.UsageError, match="random weights take no input"):
        run("--prompt", "hello")


def test_a_receipt_has_predicted_and_measured_values(temporary):
    write_profile(
        "mixture",
        "workload: {context_length: 64, batch_size: 2}\n",
        devices="cpu: {memory: 1GiB, bandwidth: 10GB/s, flops: 100GFLOP/s}",
    )
    done = run("--max-new-tokens", "4", "--receipt", "mine.json")
    assert (done.return_value, done.stderr.splitlines()[-1]) == (0, "wrote mine.json")
    receipt = json.loads(Path("mine.json").read_text())
    [case] = receipt["cases"]
    [use] = case["predicted"]["devices"]
    seen, generation = case["seen"]["cpu"], case["generation"]
    command = "devmap run profile.yaml --receipt mine.json --random-weights --max-new-tokens 4"
    assert receipt["command"] == command
    assert (receipt["weights"], case["executor"], case["batch_size"]) == ("random", "accelerate", 2)
    assert seen["weights_bytes"] == use["weights_bytes"] == receipt["weights_bytes"]
    # The last token is written and not kept.
    assert seen["kv_cache_bytes"] * 64 == use["kv_cache_bytes"] * 63
    assert 50_000_000 < seen["process_bytes"] <= seen["loading_peak_bytes"] <= seen["peak_bytes"]
    assert (generation["prompt_tokens"], generation["new_tokens"]) == (60, 4)
    assert len(generation["prefill_seconds_each"]) == len(generation["decode_seconds_each"]) == 3
    assert case["predicted"]["prediction"]["decode_nanoseconds_per_token"] > 0
    assert set(receipt["versions"]) == {"devmap-config", "torch", "transformers", "accelerate"}
    assert receipt["machine"]["threads"] == torch.get_num_threads()
    shown = CliRunner().invoke(receipts, ["mine.json"], standalone_mode=False, catch_exceptions=False)
    assert shown.stdout.splitlines()[0] == "mine: predicted by stated rates → seen"
    assert shown.stdout.splitlines()[3].startswith("profile   cpu")
    fitted = CliRunner().invoke(calibrate, ["mine.json"], standalone_mode=False, catch_exceptions=False)
    assert fitted.return_value == 0
    assert set(yaml.safe_load(fitted.stdout)["hardware"]) <= {"devices", "host"}


def test_a_receipt_of_loading_alone_has_no_generation(temporary):
    write_profile("llama")
    assert run("--no-generate", "--receipt", "mine.json").return_value == 0
    [case] = json.loads(Path("mine.json").read_text())["cases"]
    assert (case["generation"], case["load_seconds"] > 0, "kv_cache_bytes" in case["seen"]["cpu"]) == (
        None,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere/mine.json", "there is no folder `nowhere`"), ("temporary", "is a folder")]
)
def test_an_unwritable_receipt_is_an_error_before_loading(temporary, name, message):
    write_profile("llama")
    with pytest.raises(click.UsageError, match=message):
        run("--receipt", name)


def test_a_receipt_is_written_whole_or_not_at_all(temporary, monkeypatch):
    write_profile("llama")
    Path("mine.json").write_text("an older one")
    monkeypatch.setattr(Path, "replace", lambda *arguments: pytest.fail("the disk is full"))
    with pytest.raises(pytest.fail.Exception):
        run("--receipt", "mine.json", "--max-new-tokens", "2")
    assert Path("mine.json").read_text() == "an older one"
    assert not [path for path in Path().iterdir() if path.suffix == ".tmp"]
