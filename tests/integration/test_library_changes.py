"""A library that changed under a plan is told as that: an error, unless the user lets formulas stand in.

Changes are made here as versions make them: an argument or an output has another name, a thing is not there any more.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from devmap_config import ProfileError, compile_profile, load_model
from devmap_config.cli import devmap
from devmap_config.graph.failures import MeasurementFailure, failure_of
from devmap_config.graph.forwards import Forwards
from devmap_config.graph.recording import Recorder, Traffic
from devmap_config.libraries import torch as torch_adapter
from devmap_config.libraries import transformers as transformers_adapter
from devmap_config.libraries import versions
from devmap_config.libraries.private import LibraryChangedError, Private
from devmap_config.simulate.devices import SimulatedDevices

PROFILE = {
    "version": 1,
    "model": {"source": "llama"},
    "workload": {"context_length": 64},
    "hardware": {"devices": {"cuda:[0-1]": {"memory": "600KiB"}, "cpu": {"memory": "1GiB"}}},
}


@pytest.fixture(autouse=True)
def profile(workspace, monkeypatch):
    """A profile, with a cache of its own: what another test measured is not at hand."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    Path("profile.yaml").write_text(yaml.safe_dump(PROFILE))


@pytest.fixture
def newer(monkeypatch):
    """The installed transformers is newer than what was tried, of which `5.19.0` stands for the newest."""
    monkeypatch.setitem(versions.TRIED, "transformers", ("5.19.0",))
    return f"transformers 5.19.0 → {versions.installed('transformers')}"


def run_command(*arguments):
    done = CliRunner().invoke(devmap, list(arguments), standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def compiled(*arguments):
    """Exit code, and what was found by code, of `devmap compile`."""
    done = run_command("compile", "profile.yaml", "--format", "json", *arguments)
    value = json.loads(done.stdout)
    return (
        done.return_value,
        {each["code"]: (each["severity"], each["message"]) for each in value["diagnostics"]},
        value,
    )


def with_tokens_instead(monkeypatch):
    """The prompt's argument has another name."""

    def forward(self, tokens=None, attention_mask=None, use_cache=None, logits_to_keep=0):
        raise AssertionError("it is not to be called")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return "takes no `input_ids`"


def with_state_returned(monkeypatch):
    """The cache is returned under another name."""
    forward = LlamaForCausalLM.forward

    def returning(self, input_ids=None, **options):
        output = forward(self, input_ids=input_ids, **options)
        return {"logits": output.logits, "state": output[1]}

    monkeypatch.setattr(LlamaForCausalLM, "forward", returning)
    return "returns its cache as `state`"


def with_state_taken(monkeypatch):
    """The cache is taken under another name."""
    forward = LlamaForCausalLM.forward

    def taking(self, input_ids=None, state=None, use_cache=None, logits_to_keep=0):
        return forward(self, input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(LlamaForCausalLM, "forward", taking)
    return "takes its cache by none of the names"


def without_fake_tensors(monkeypatch):
    """What torch does not promise to keep is gone."""
    gone = Private("torch._subclasses.fake_tensor.NoSuchMode", "nothing")
    monkeypatch.setattr(torch_adapter, "FAKE_TENSOR_MODE", gone)
    return "`torch._subclasses.fake_tensor.NoSuchMode` is not there"


CHANGES = [with_tokens_instead, with_state_returned, with_state_taken, without_fake_tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_an_error_that_names_it(change, monkeypatch):
    what = change(monkeypatch)
    code, found, value = compiled()
    assert code == 1
    assert value["plan"] is None
    severity, message = found["library-changed"]
    assert severity == "error"
    assert what in message
    assert "needs data" not in message
    assert "unmeasured-model" not in found
    assert not Path("profile.lock.json").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_formulas_stand_in_where_the_user_says_so(change, monkeypatch):
    what = change(monkeypatch)
    code, found, value = compiled("--allow-unmeasured")
    assert code == 0
    assert value["plan"]["measured"] is False
    assert found["library-changed"][0] == "warning"
    assert what in found["library-changed"][1]


def test_the_message_names_both_versions(newer, monkeypatch):
    with_state_returned(monkeypatch)
    _, found, _ = compiled()
    message = f"{newer}: `LlamaForCausalLM.forward` returns its cache as `state`: the model is not measured"
    assert found["library-changed"] == ("error", message)


def test_what_a_change_kept_from_being_measured_is_not_remembered(monkeypatch):
    with monkeypatch.context() as context:
        with_state_returned(context)
        assert compiled("--allow-unmeasured")[0] == 0
    _, found, value = compiled()
    assert (value["plan"]["measured"], found) == (True, {})


def test_a_vendored_graph_without_measurement_goes_on_asking(monkeypatch):
    with monkeypatch.context() as context:
        with_state_returned(context)
        assert compiled("--allow-unmeasured", "--vendor")[0] == 0
    assert compiled()[1]["library-changed"][0] == "error"
    checked = run_command("check", "profile.yaml", "--format", "json")
    assert checked.return_value == 1
    allowed = run_command("check", "profile.yaml", "--allow-unmeasured", "--format", "json")
    assert (allowed.return_value, "library-changed" in allowed.stdout) == (0, True)


@pytest.mark.parametrize("command", [("simulate",), ("explain",), ("fit", "--on", "2x24GiB"), ("run",), ("check",)])
def test_every_command_that_needs_the_measurement_says_it(command, monkeypatch):
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("empty").absolute()))
    what = with_state_returned(monkeypatch)
    name, *rest = command
    done = run_command(name, "profile.yaml", *rest)
    assert done.return_value == 1
    said = " ".join(f"{done.stdout} {done.stderr}".split())
    assert what in said
    assert "error[library-changed]" in said


def test_what_a_tree_shows_as_measured_is_measured(monkeypatch):
    what = with_state_returned(monkeypatch)
    refused = run_command("tree", "llama", "--measure")
    assert (refused.return_value, what in " ".join(refused.stderr.split())) == (1, True)
    allowed = run_command("tree", "llama", "--measure", "--allow-unmeasured")
    assert allowed.return_value == 0
    assert f"by formulas: transformers {versions.installed('transformers')}: " in " ".join(allowed.stdout.split())


def test_python_says_it_too(monkeypatch):
    with_state_returned(monkeypatch)
    with pytest.raises(ProfileError, match="returns its cache as `state`"):
        compile_profile("profile.yaml")
    assert not compile_profile("profile.yaml", allow_unmeasured=True).measured


def test_loading_says_it_too(monkeypatch):
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("empty").absolute()))
    with_state_returned(monkeypatch)
    with pytest.raises(ProfileError, match="returns its cache as `state`"):
        load_model("profile.yaml")


def test_a_dry_run_that_a_change_stops_is_an_error(newer, monkeypatch):
    compiled("--no-simulate")  # it is measured, and that is kept

    def gone(*_arguments):
        raise transformers_adapter.SKIP_KEYS.changed()

    monkeypatch.setattr("devmap_config.simulate.hooks.skip_keys", gone)
    code, found, _ = compiled()
    severity, message = found["library-changed"]
    assert (code, severity) == (1, "error")
    assert message.startswith(f"{newer}: `transformers.PreTrainedModel._skip_keys_device_placement` is not there")
    assert message.endswith("the plan could not be dry-run")
    code, found, _ = compiled("--allow-unmeasured")
    assert (code, found["library-changed"][0]) == (0, "warning")


def test_a_model_that_cannot_be_read_any_more_is_an_error_with_and_without(monkeypatch):
    gone = Private("transformers.PreTrainedModel.no_such_plan", "nothing")
    monkeypatch.setattr(transformers_adapter, "DTYPE_PLAN", gone)
    for arguments in ((), ("--allow-unmeasured",)):
        code, found, _ = compiled(*arguments)
        assert (code, found["library-changed"][0]) == (1, "error")
        assert "`transformers.PreTrainedModel.no_such_plan` is not there" in found["library-changed"][1]


def test_a_mistake_of_ours_is_told_as_one(monkeypatch):
    monkeypatch.setattr(Recorder, "note", None)
    code, found, _ = compiled()
    severity, message = found["measuring-failed"]
    assert (code, severity) == (1, "error")
    assert message.startswith("devmap-config made a mistake, TypeError: 'NoneType' object is not callable (")
    code, found, value = compiled("--allow-unmeasured")
    assert (code, value["plan"]["measured"]) == (0, False)


# -- how causes are told apart -----------------------------------------------------------------------------------------


def raised(function):
    try:
        function()
    except Exception as error:
        return failure_of(error)
    raise AssertionError("nothing was raised")


def data_needed():
    with torch_adapter.tensors_without_data():
        torch.ones(3).nonzero()


def in_the_model():
    LlamaModel.forward(None)


def test_what_needs_data_is_the_models_doing_under_every_version(newer):
    assert raised(data_needed).cause == "model"


def test_what_a_models_code_raises_is_its_own_where_the_version_was_tried():
    assert raised(in_the_model).cause == "model"


def test_it_is_the_versions_where_that_was_not(newer):
    failure = raised(in_the_model)
    assert failure.cause == "library"
    assert failure.reason.startswith(f"{newer}: ")


def test_what_our_code_raises_is_ours_or_comes_of_the_version(monkeypatch):
    def own():
        Forwards(None, None).prefill_inputs(1)

    assert raised(own).cause == "own"
    assert "(devmap_config/graph/forwards.py:" in raised(own).reason
    monkeypatch.setitem(versions.TRIED, "transformers", ("5.19.0",))
    failure = raised(own)
    assert failure.cause == "library"
    assert "(devmap_config/graph/forwards.py:" in failure.reason


def test_what_torch_refuses_of_a_models_call_is_the_models_doing():
    """Though it is within a method of ours that the call is handed on."""

    def handed_on():
        traffic = Traffic(blocks={}, skipped=frozenset())
        with SimulatedDevices((), {}, (), {}, traffic).watching(torch.nn.Identity()):
            torch.ones(2, 3) @ torch.ones(2, 3)

    assert raised(handed_on).cause == "model"


def with_pixels(self, pixel_values):
    raise AssertionError("it is not to be called")


@pytest.mark.parametrize("forward", [with_pixels, torch.nn.Module.forward])
def test_a_model_that_takes_no_text_is_no_change(forward, monkeypatch):
    """Its class may still say `input_ids`, which every class says that does not say otherwise."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    code, found, _ = compiled()
    assert code == 0
    assert "library-changed" not in found
    severity, message = found["not-simulated"]
    assert severity == "warning"
    assert ("pixel_values" in message) == (forward is with_pixels)


def test_a_change_is_found_behind_what_was_made_of_it():
    def wrapped():
        try:
            Private("torch.nothing", "nothing").find()
        except LibraryChangedError as error:
            raise ValueError("something else") from error

    assert raised(wrapped) == MeasurementFailure(
        "library", f"torch {versions.installed('torch')}: `torch.nothing` is not there"
    )


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_version_that_was_never_tried_is_said_once_in_one_line(newer):
    installed = versions.installed("transformers")
    line = (
        f"transformers {installed} was never tried with devmap-config 0.2.0 (tried: 5.19.0): install one of these if"
        " something is off"
    )
    assert compiled()[1]["untried-version"] == ("warning", line)
    Path("other.yaml").write_text(Path("profile.yaml").read_text())
    run_command("compile", "-q", "other.yaml")
    checked = run_command("check", "profile.yaml", "other.yaml")
    assert checked.return_value == 0
    assert " ".join(checked.stderr.split()).count(line) == 1
    assert run_command("check", "-q", "profile.yaml", "other.yaml").stderr == ""


def test_versions_that_were_tried_are_passed_over_in_silence():
    assert compiled()[1] == {}


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ("5.24.0", "transformers 5.24.0"),
        ("5.25.0.dev0", "transformers 5.24.0 → 5.25.0.dev0"),
        ("5.22.0", "transformers 5.21.1 → 5.22.0"),
        ("5.9.0", "transformers 5.20.0 → 5.9.0"),
    ],
)
def test_a_move_is_told_from_the_nearest_version_that_was_tried(installed, told, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda _library: installed)
    assert versions.moved("transformers") == told
