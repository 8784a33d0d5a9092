"""If any private part of a library is missing, every command reports it or works without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import LLAMA, MIXTURE
from libraries_page import privates
from transformers import LlamaConfig, LlamaForCausalLM

from devmap_config import cli, compile_profile
from devmap_config.libraries.private import Private

EVERY = sorted({private.name for named in privates().values() for private in named.values()})

LOOKED_UP_WHEN_IMPORTED = (
    "devmap_config.graph.recording",
    "devmap_config.graph.repetition",
    "devmap_config.graph.measurement",
    "devmap_config.simulate.devices",
    "devmap_config.simulate.hooks",
    "devmap_config.simulate.dry_run",
)
"""Modules that need something of a library to be imported at all, and what imports them."""

CONVERSIONS = "transformers.conversion_mapping.get_model_conversion_mapping"


def write(name, config):
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(config))
    write_profile(name)


def write_profile(name):
    profile = {
        "version": 1,
        "model": {"source": name},
        "workload": {"context_length": 16},
        "hardware": {"devices": {"cpu": {"memory": "1GiB"}}},
    }
    Path(f"{name}.yaml").write_text(yaml.safe_dump(profile))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    """A profile of a small model with weights, and its lock."""
    values = {key: value for key, value in LLAMA.items() if key not in ("architectures", "dtype", "model_type")}
    LlamaForCausalLM(LlamaConfig(**values | {"num_hidden_layers": 2})).save_pretrained("llama")
    write_profile("llama")
    compile_profile("llama.yaml")


@pytest.fixture
def own_modules():
    """Restore our modules afterwards, since those imported while a name is missing must not reach other tests."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "devmap_config"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "devmap_config"]:
        del sys.modules[name]
    sys.modules.update(before)
    for name, module in before.items():
        package, _, last = name.rpartition(".")
        if package in before:
            setattr(before[package], last, module)


@pytest.fixture
def hide(own_modules, monkeypatch):
    """Make a name of a library missing from now on."""

    def hidden(name):
        find, of = Private.find, Private.of
        monkeypatch.setattr(Private, "find", lambda self: _raise(self) if self.name == name else find(self))
        monkeypatch.setattr(Private, "of", lambda self, owner: _raise(self) if self.name == name else of(self, owner))
        for module in LOOKED_UP_WHEN_IMPORTED:
            monkeypatch.delitem(sys.modules, module, raising=False)

    def _raise(private):
        raise private.changed()

    return hidden


@pytest.fixture
def devmap(monkeypatch, capsys):
    """Run a command; return the exit code and the output with single spaces."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["devmap", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, " ".join(f"{printed.out} {printed.err}".split())

    return run


@pytest.mark.zoo
@pytest.mark.parametrize("name", EVERY)
def test_a_missing_private_name_is_reported_or_not_needed(name, checkpoint, folder, hide, devmap, monkeypatch):
    assert devmap("compile", "llama.yaml")[0] == 0
    lock = Path("llama.lock.json").read_text()
    hide(name)
    for number, command in enumerate(
        (
            ("check", "llama.yaml"),
            ("run", "llama.yaml", "--max-new-tokens", "1"),
            ("compile", "llama.yaml"),
            ("compile", "llama.yaml", "--allow-unmeasured"),
        )
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / f"cache{number}"))  # nothing is remembered
        code, said = devmap(*command)
        assert "Traceback" not in said, (command, said)
        if code != 0:
            assert code in (1, 4), (command, said)
            assert "error[library-changed]" in said, (command, said)
            assert f"`{name}` is not there" in said, (command, said)
        if "library-changed" not in said:  # then it was not missed
            assert Path("llama.lock.json").read_text() == lock, command
        if "--allow-unmeasured" in command:
            assert "pass `--allow-unmeasured`" not in said


@pytest.mark.parametrize("name", ["torch.utils.flop_counter.flop_registry", "torch.utils._pytree.tree_leaves"])
def test_names_needed_to_measure_are_not_needed_to_read_a_model(name, folder, hide, devmap):
    write("llama", LLAMA)
    hide(name)
    code, said = devmap("compile", "llama.yaml")
    assert (code, "error[library-changed]" in said, f"`{name}` is not there" in said) == (1, True, True)
    code, said = devmap("compile", "llama.yaml", "--allow-unmeasured")
    assert (code, "warning[library-changed]" in said) == (0, True)


def test_a_missing_conversion_mapping_is_an_error_for_models_of_experts_only(folder, hide, devmap):
    write("llama", LLAMA)
    write("mixture", MIXTURE)
    hide(CONVERSIONS)
    code, said = devmap("compile", "llama.yaml")
    assert (code, "warning[library-changed]" in said, "error" in said) == (0, True, False)
    code, said = devmap("compile", "mixture.yaml")
    assert (code, "error[library-changed]" in said, "pass `--allow-unmeasured`" in said) == (1, True, True)
    code, said = devmap("compile", "mixture.yaml", "--allow-unmeasured")
    assert (code, "warning[library-changed]" in said, "pass `--allow-unmeasured`" in said) == (0, True, False)


def test_graphs_made_with_a_missing_name_are_not_cached(folder, hide, devmap, monkeypatch):
    write("mixture", MIXTURE)
    with monkeypatch.context() as context:
        find = Private.find
        gone = Private.changed
        context.setattr(
            Private, "find", lambda self: (_ for _ in ()).throw(gone(self)) if self.name == CONVERSIONS else find(self)
        )
        assert devmap("compile", "mixture.yaml", "--allow-unmeasured")[0] == 0
    code, said = devmap("compile", "mixture.yaml")
    assert (code, "library-changed" in said) == (0, False)


def test_allow_unmeasured_is_not_advised_if_it_does_not_help(folder, hide, devmap):
    write("llama", LLAMA)
    hide("transformers.PreTrainedModel._get_dtype_plan")
    for arguments in ((), ("--allow-unmeasured",)):
        code, said = devmap("compile", "llama.yaml", *arguments)
        assert (code, "error[library-changed]" in said, "--allow-unmeasured" in said) == (1, True, False)


def test_variable_names_must_be_text(folder):
    write("llama", LLAMA)
    with pytest.raises(TypeError, match="the names of variables are text, and 1 is none"):
        compile_profile("llama.yaml", variables={1: 1})
