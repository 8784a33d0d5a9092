"""The package as Python code uses it: arguments of `load_model`, exceptions, warnings, and the examples of its docs."""

from __future__ import annotations

import doctest
import inspect
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, REPOSITORY
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import devmap_config
from devmap_config import (
    ArgumentError,
    DevmapError,
    DevmapWarning,
    NotADeviceMapError,
    ProfileError,
    RunnerError,
    UnfitMachineError,
    compile_profile,
    load_model,
)
from devmap_config.cli.compile import compile_command
from devmap_config.graph.source import HubAccess
from devmap_config.plan.lock import LockError
from devmap_config.runner.arguments import DECIDED, PASSED_ON, RULED_OUT

PROFILE = "version: 1\nmodel: {source: random}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n"

COMMIT = "0123456789" * 4


def compiled(text):
    Path("profile.yaml").write_text(text)
    assert compile_command.main(["profile.yaml", "-q"], standalone_mode=False) == 0


def save_llama(folder):
    torch.manual_seed(0)
    config = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype")}
    LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture
def llama(workspace):
    save_llama(workspace / "random")
    compiled(PROFILE)
    return workspace / "random"


@pytest.fixture
def passed(monkeypatch):
    """Record the arguments that `from_pretrained` is given."""
    given = {}
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **options):
        given.update(options)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return given


def test_arguments_of_from_pretrained_are_passed_on(llama, passed):
    load_model("profile.yaml", local_files_only=True, token=False, use_safetensors=True, low_cpu_mem_usage=True)
    assert (passed["local_files_only"], passed["token"], passed["low_cpu_mem_usage"]) == (True, False, True)
    assert (passed["use_safetensors"], passed["dtype"]) == (True, "bfloat16")


def test_classes_whose_from_pretrained_changes_the_loaded_model_work(llama, monkeypatch):
    """Some classes set attributes on the model that they have loaded."""
    original = LlamaForCausalLM.from_pretrained.__func__

    def marking(cls, *arguments, **options):
        model = original(cls, *arguments, **options)
        model.is_marked = True
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(marking))
    assert load_model("profile.yaml").is_marked


def test_every_argument_of_from_pretrained_is_passed_on_or_refused():
    """A new argument fails this test until someone decides about it."""
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    popped = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', source))
    named = {name for name, each in inspect.signature(PreTrainedModel.from_pretrained).parameters.items()}
    ours = {"trust_remote_code", "model_args", "kwargs", "cls"}
    known = {*DECIDED, *PASSED_ON, *RULED_OUT}
    assert {name for name in popped | named if not name.startswith("_")} - ours <= known


@pytest.mark.parametrize("name", [*DECIDED, *RULED_OUT])
def test_arguments_that_the_profile_decides_are_refused(workspace, name):
    with pytest.raises(ArgumentError, match=f"`{name}`") as error:
        load_model("profile.yaml", **{name: "x"})  # it is refused before the profile is looked for
    assert error.value.code == "decided-argument"
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize("name", DECIDED)
def test_the_refusal_names_the_key_of_the_profile(workspace, name):
    key = DECIDED[name].partition("`")[0]
    holder = devmap_config.profile.schema.Profile
    for step in key.split("."):
        holder = holder.model_fields[step].annotation
    with pytest.raises(ArgumentError) as error:
        load_model("profile.yaml", **{name: "x"})
    assert f"the profile's `{key}" in str(error.value)


def test_an_unknown_argument_is_an_error_with_a_suggestion(workspace):
    with pytest.raises(ArgumentError, match="did you mean `local_files_only`") as error:
        load_model("profile.yaml", local_file_only=True)
    assert error.value.code == "unknown-argument"
    with pytest.raises(ArgumentError, match=r"the config of `model\.source`"):
        load_model("profile.yaml", num_hidden_layers=2)


@pytest.fixture
def cached(workspace):
    """A hub cache of its own, with a model in it."""
    repository = workspace / "cache" / "models--people--llama"
    save_llama(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    with HubAccess(cache_dir="cache").used():
        compiled(PROFILE.replace("random", "people/llama"))
    return "cache"


def test_config_and_weights_are_read_from_the_given_cache_dir(cached, passed):
    with pytest.raises(ProfileError, match="model-not-found"):
        load_model("profile.yaml", local_files_only=True)
    model = load_model("profile.yaml", cache_dir=cached, local_files_only=True)
    assert (passed["cache_dir"], passed["revision"]) == ("cache", COMMIT)
    plain = LlamaForCausalLM.from_pretrained(f"cache/models--people--llama/snapshots/{COMMIT}")
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_all_exceptions_have_one_base_class():
    raised = (ArgumentError, LockError, NotADeviceMapError, ProfileError, RunnerError, UnfitMachineError)
    assert all(issubclass(each, DevmapError) for each in raised)
    assert {each.__name__ for each in raised} <= set(devmap_config.__all__)


def test_exceptions_carry_diagnostics(llama):
    Path("profile.lock.json").unlink()
    with pytest.raises(RunnerError) as error:
        load_model("profile.yaml")
    assert [(each.code, each.message, each.help) for each in error.value.diagnostics] == [
        ("missing-lock", "`profile.lock.json` does not exist", "run `devmap compile profile.yaml` and commit the lock")
    ]
    plan = compile_profile("profile.yaml")
    Path("profile.yaml").write_text(
        PROFILE.replace("{cpu:", "{cuda:0: {memory: 1GiB}, cpu:")
        + "placement: {pins: [{match: lm_head, device: cpu, compute: cpu}]}\n"
    )
    with pytest.raises(NotADeviceMapError) as not_a_map:
        _ = compile_profile("profile.yaml").device_map
    assert [each.code for each in not_a_map.value.diagnostics] == ["not-a-device-map"]
    assert plan.diagnostics == ()


def test_a_plan_carries_its_warnings(llama):
    Path("profile.yaml").write_text(PROFILE + 'placement: {pins: [{match: "nothing", device: cpu, optional: true}]}\n')
    plain = compile_profile("profile.yaml")
    Path("profile.yaml").write_text(PROFILE.replace("}}}", "}, disk: {memory: 1GiB}}}"))
    warned = compile_profile("profile.yaml")
    assert [(each.severity, each.code) for each in warned.diagnostics] == [("warning", "missing-offload-folder")]
    assert plain.device_map == warned.device_map


def test_load_model_issues_warnings(llama):
    file = llama / "model.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DevmapWarning)
        load_model("profile.yaml")
    save_file({**load_file(file), "model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    compiled(PROFILE)
    with pytest.warns(DevmapWarning, match=r"^the checkpoint holds more .*up_proj.* \[unexpected-tensors\]$") as warned:
        load_model("profile.yaml")
    assert warned[0].filename == __file__


def test_every_public_name_is_documented_and_imports_no_torch():
    for name in devmap_config.__all__:
        assert getattr(devmap_config, name).__doc__, name  # its own, and not that of a base
    assert dir(devmap_config) == sorted(devmap_config.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = devmap_config.nothing
    code = (
        "import sys, devmap_config; [getattr(devmap_config, name) for name in devmap_config.__all__];"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A copy of the quickstart profile with a new lock; the working directory is the one around it."""
    monkeypatch.chdir(tmp_path)
    Path(".git").mkdir()
    Path("profiles/models").mkdir(parents=True)
    shutil.copy(REPOSITORY / "profiles" / "quickstart.yaml", "profiles")
    shutil.copytree(REPOSITORY / "profiles" / "models" / "quickstart", "profiles/models/quickstart")
    assert compile_command.main(["profiles/quickstart.yaml", "-q"], standalone_mode=False) == 0


def test_the_example_in_the_python_page_runs(quickstart, capsys):
    text = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    [block] = re.findall(r"From Python:\n\n```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(block, names)  # noqa: S102  the text of our own page
    assert capsys.readouterr().out == ""
    assert names["plan"].device_map["model.embed_tokens"] == "cpu"
    assert type(names["model"]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("function", [compile_profile, load_model])
def test_the_docstring_examples_run(quickstart, function):
    [test] = doctest.DocTestFinder(recurse=False).find(function, globs={function.__name__: function})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0
