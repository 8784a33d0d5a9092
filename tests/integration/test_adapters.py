"""A profile with an adapter is compiled, locked, loaded by PEFT and verified, on a CPU and a disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import LLAMA, REPOSITORY, devmap
from small_adapters import KINDS, save_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from devmap_config import compile_profile, load_model
from devmap_config.cli.bench import bench
from devmap_config.cli.check import check
from devmap_config.cli.compile import compile_command
from devmap_config.cli.run import run as run_model
from devmap_config.compiler import Request, run_pipeline
from devmap_config.graph.checkpoint import read_header
from devmap_config.runner.loading import RunnerError

TOKENS = torch.tensor([[1, 5, 9, 200, 31, 77]])

IN_MEMORY = "{hardware: {devices: {cpu: {memory: 1GiB}}}}"
PARTLY_ON_DISK = """{
  hardware: {devices: {cpu: {memory: 1GiB}, disk: {memory: 1GiB}}},
  placement: {pins: [{match: "model.layers.[2-5]", device: disk}], offload: {folder: offload}}
}"""


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(".git").mkdir()
    own = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", attention_bias=True, mlp_bias=True, **own))
    model.to(torch.bfloat16).save_pretrained("random")
    return tmp_path


def adapted(**arguments):
    """Return PEFT's model around the plain one; the adapter is saved as well."""
    return save_adapter(AutoModelForCausalLM.from_pretrained("random"), **arguments)


def write_profile(machine, *, model="", workload="context_length: 64"):
    Path("machine.yaml").write_text(machine)
    Path("profile.yaml").write_text(
        f"version: 1\nextends: [machine.yaml]\nmodel: {{source: random, adapter: adapter{model}}}\n"
        f"workload: {{{workload}}}\n"
    )


def compiled():
    return compile_command.main(["profile.yaml", "-q"], standalone_mode=False)


@torch.no_grad()
def assert_same(model, plain):
    assert torch.equal(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    written = {"input_ids": TOKENS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**written), plain.generate(**written))


@pytest.mark.parametrize(
    "machine",
    [pytest.param(IN_MEMORY, marks=pytest.mark.zoo, id="in memory"), pytest.param(PARTLY_ON_DISK, id="partly on disk")],
)
@pytest.mark.parametrize("kind", ["all linear", "an embedding", "the head", "ranks by name", "rank-stabilised"])
def test_a_model_with_an_adapter_gives_pefts_logits(kind, machine):
    plain = adapted(**KINDS[kind])
    write_profile(machine)
    assert compiled() == 0
    assert_same(load_model("profile.yaml"), plain)


@pytest.mark.parametrize("kind", ["DoRA", "a module whole", "with biases", "with a bias of its own"])
def test_adapters_that_read_or_replace_base_weights_work_if_these_are_resident(kind):
    plain = adapted(**KINDS[kind])
    write_profile(IN_MEMORY)
    assert compiled() == 0
    assert_same(load_model("profile.yaml"), plain)


@pytest.mark.parametrize("kind", ["DoRA", "a module whole", "with biases"])
def test_adapters_that_read_or_replace_base_weights_are_refused_if_these_are_on_disk(kind):
    adapted(**KINDS[kind])
    write_profile(PARTLY_ON_DISK.replace("model.layers.[2-5]", "{model.layers.[2-5],model.norm,lm_head}"))
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert (finding.code, finding.span.line) == ("unfit-adapter", 3)
    assert "`{match: " in finding.help


def test_adapter_tensors_are_counted_and_kept_in_memory():
    adapted(target_modules="all-linear")
    write_profile(PARTLY_ON_DISK)
    held_bytes = {use.id.kind: use.weights_bytes for use in compile_profile("profile.yaml").devices}
    Path("profile.yaml").write_text(Path("profile.yaml").read_text().replace(", adapter: adapter", ""))
    before = {use.id.kind: use.weights_bytes for use in compile_profile("profile.yaml").devices}
    saved = read_header(Path("adapter/adapter_model.safetensors"))
    assert held_bytes["cpu"] - before["cpu"] == sum(end - start for _, _, start, end in saved.values())
    assert held_bytes["disk"] == before["disk"]


@pytest.mark.parametrize(
    "quantization",
    [
        "{method: bitsandbytes, load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}",
        "{method: bitsandbytes, load_in_8bit: true}",
        "{method: fp8, weight_block_size: [32, 32]}",
    ],
)
def test_adapted_modules_are_quantised_as_without_the_adapter(quantization):
    adapted(target_modules="all-linear")
    sizes = []
    for named in (", adapter: adapter", ""):
        Path("profile.yaml").write_text(
            f"version: 1\nmodel: {{source: random, quantization: {quantization}{named}}}\n"
            "workload: {context_length: 64}\n"
            "hardware: {devices: {cuda:0: {memory: 1GiB}}}\nplacement: {strategy: single}\n"
        )
        sizes.append(run_pipeline(Request(path=Path("profile.yaml"))).plan.devices[0].weights_bytes)
    saved = read_header(Path("adapter/adapter_model.safetensors"))
    assert sizes[0] - sizes[1] == sum(end - start for _, _, start, end in saved.values())


def test_a_changed_adapter_config_makes_the_lock_stale(capsys):
    adapted(target_modules=["q_proj"])
    write_profile(IN_MEMORY)
    assert compiled() == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    assert devmap("check", "profile.yaml") == 0
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert devmap("check", "profile.yaml") == 3
    assert "the adapter's config changed" in capsys.readouterr().err


def test_targets_that_no_module_has_are_named(capsys):
    adapted(target_modules=["q_proj"])
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    targets = ["q_proj", "k_prj", "self_attn.v_proj", "c_attn"]
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    Path("adapter/adapter_model.safetensors").unlink()
    write_profile(IN_MEMORY)
    assert devmap("compile", "profile.yaml", "--dry-run", "--no-simulate") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "warning[ignored-key]: the adapter's `target_modules` name `c_attn`, `k_prj`, and LlamaForCausalLM has" in told
    )


def test_an_adapter_compiles_without_peft_and_loading_without_it_is_an_error(monkeypatch):
    adapted(target_modules=["q_proj"])
    write_profile(IN_MEMORY)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert compiled() == 0
    with pytest.raises(RunnerError, match="loading an adapter needs peft") as caught:
        load_model("profile.yaml")
    assert caught.value.code == "peft-missing"


def test_adapter_weights_that_differ_from_their_config_are_refused():
    adapted(target_modules=["q_proj"])
    write_profile(IN_MEMORY)
    assert compiled() == 0
    file = Path("adapter/adapter_model.safetensors")
    right = file.read_bytes()
    adapted(target_modules=["q_proj"], r=4)
    other = file.read_bytes()
    adapted(target_modules=["q_proj"])
    for wrong, told in ((other, "has `base_model.* as .* and the model takes"), (right[:-1], "is cut off"), (None, "")):
        file.unlink() if wrong is None else file.write_bytes(wrong)
        found = run_pipeline(Request(path=Path("profile.yaml"), checks_checkpoint=True)).diagnostics
        assert [each.code for each in found] == ([] if wrong is None else ["bad-adapter"])
        with pytest.raises(RunnerError, match=told or "there is no `adapter_model.safetensors`") as caught:
            load_model("profile.yaml")
        assert caught.value.code == "bad-adapter"


def test_run_generates_with_an_adapter_also_with_random_weights():
    adapted(target_modules="all-linear")
    write_profile(PARTLY_ON_DISK)
    assert compiled() == 0
    done = CliRunner().invoke(run_model, ["profile.yaml", "--random-weights"])
    assert done.exit_code == 0, done.output
    assert "loaded random weights" in done.output


def test_the_shipped_profile_with_an_adapter_writes_its_sentence():
    arguments = [str(REPOSITORY / "profiles/quickstart-lora.yaml"), "--prompt", "An adapter", "--max-new-tokens", "48"]
    done = CliRunner().invoke(run_model, [*arguments, "--no-probe"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == (
        "An adapter is a few small matrices beside the large ones, and it is wherever they run."
    )
    assert "from the checkpoint and the adapter" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("missing/folder/of-three", "there is no `missing/folder/of-three`"),
        ("random", "`adapter_config.json` in `random` is not there"),
        ("random/config.json", "`random/config.json` is not a folder"),
        ("../elsewhere", "`../elsewhere` lies outside of the repository"),
        ("someone/lora", "its commit is not named"),
        (f"{{source: someone/lora, revision: {'0' * 40}}}", "is not available from the hub"),
    ],
)
def test_a_missing_adapter_is_an_error(adapter, told, workspace):
    (workspace.parent / "elsewhere").mkdir(exist_ok=True)
    write_profile(IN_MEMORY)
    Path("profile.yaml").write_text(Path("profile.yaml").read_text().replace("adapter: adapter", f"adapter: {adapter}"))
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert (finding.code, finding.span.line) == ("bad-adapter", 3)
    assert told in finding.message
    assert finding.help


def test_an_adapter_of_the_hub_is_read_at_its_commit(monkeypatch, workspace):
    plain = adapted(target_modules=["q_proj"])
    commit = "0123456789" * 4
    folder = workspace / "hub" / "models--someone--lora"
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots").mkdir()
    Path("adapter").rename(folder / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(workspace / "hub"))
    write_profile(IN_MEMORY)
    named = f"adapter: {{source: someone/lora, revision: '{commit}'}}"
    Path("profile.yaml").write_text(Path("profile.yaml").read_text().replace("adapter: adapter", named))
    assert compiled() == 0
    assert_same(load_model("profile.yaml"), plain)


@pytest.mark.parametrize("command", [[run_model, "--receipt", "r.json"], [bench]])
def test_receipts_and_benchmarks_refuse_adapters(command):
    adapted(target_modules=["q_proj"])
    write_profile(IN_MEMORY)
    assert compiled() == 0
    done = CliRunner().invoke(command[0], ["profile.yaml", *command[1:]], standalone_mode=False)
    assert done.return_value == 1
    assert "error[unfit-adapter]" in done.stderr


def test_an_adapter_linked_from_outside_the_repository_is_refused(workspace):
    adapted(target_modules=["q_proj"])
    config = Path("adapter/adapter_config.json")
    (workspace.parent / "secret.json").write_bytes(config.read_bytes())
    config.unlink()
    config.symlink_to(workspace.parent / "secret.json")
    write_profile(IN_MEMORY)
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert "leads out of the repository" in finding.message


def test_a_pin_for_adapter_tensors_alone_is_refused():
    adapted(target_modules=["q_proj"])
    write_profile(
        "{hardware: {devices: {cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}}}, placement: {pins: ["
        '{match: "model.layers.0", device: 0}, {match: "model.layers.0.self_attn.q_proj.lora_A", device: 1}]}}'
    )
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert finding.code == "conflicting-pins"
    assert "an adapter's tensors are on the device of their module" in finding.message


def test_a_vendored_graph_includes_the_adapter():
    adapted(target_modules=["q_proj"])
    write_profile(IN_MEMORY)
    assert devmap("compile", "profile.yaml", "--vendor", "-q") == 0
    assert CliRunner().invoke(check, ["profile.yaml"]).exit_code == 0
    adapted(target_modules=["v_proj", "q_proj"])
    [finding] = run_pipeline(Request(path=Path("profile.yaml"))).diagnostics
    assert (finding.code, "was made from another adapter, and is made anew" in finding.message) == ("stale-graph", True)
