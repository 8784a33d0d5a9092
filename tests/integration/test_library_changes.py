"""A change of a library is an error that names it, unless the user allows formulas instead of a measurement.

The tests change libraries as versions do: an argument or output has another name, or something is missing.
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
    """A profile with a cache of its own, so that measurements of other tests are not found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    Path("profile.yaml").write_text(yaml.safe_dump(PROFILE))


@pytest.fixture
def newer(monkeypatch):
    """Make the installed transformers newer than the newest tried version, here `5.19.0`."""
    monkeypatch.setitem(versions.TRIED, "transformers", ("5.19.0",))
    return f"transformers 5.19.0 → {versions.installed('transformers')}"


def run_command(*arguments):
    done = CliRunner().invoke(devmap, list(arguments), standalone_mode=False)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def compiled(*arguments):
    """Return the exit code, the findings by code, and the JSON of `devmap compile`."""
    done = run_command("compile", "profile.yaml", "--format", "json", *arguments)
    value = json.loads(done.stdout)
    return (
        done.return_value,
        {each["code"]: (each["severity"], each["message"]) for each in value["diagnostics"]},
        value,
    )


def with_tokens_instead(monkeypatch):
    """Give the prompt's argument another name."""

    def forward(self, tokens=None, attention_mask=None, use_cache=None, logits_to_keep=0):
        raise AssertionError("it is not to be called")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return "takes no `input_ids`"


def with_state_returned(monkeypatch):
    """Return the cache under another name."""
    forward = LlamaForCausalLM.forward

    def returning(self, input_ids=None, **options):
        output = forward(self, input_ids=input_ids, **options)
        return {"logits": output.logits, "state": output[1]}

    monkeypatch.setattr(LlamaForCausalLM, "forward", returning)
    return "returns its cache as `state`"


def with_state_taken(monkeypatch):
    """Take the cache under another name."""
    forward = LlamaForCausalLM.forward

    def taking(self, input_ids=None, state=None, use_cache=None, logits_to_keep=0):
        return forward(self, input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(LlamaForCausalLM, "forward", taking)
    return "takes its cache by none of the names"


def without_fake_tensors(monkeypatch):
    """Remove a private part of torch."""
    gone = Private("torch._subclasses.fake_tensor.NoSuchMode", "nothing")
    monkeypatch.setattr(torch_adapter, "FAKE_TENSOR_MODE", gone)
    return "`torch._subclasses.fake_tensor.NoSuchMode` is not there"


CHANGES = [with_tokens_instead, with_state_returned, with_state_taken, without_fake_tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_library_is_an_error_that_names_the_change(change, monkeypatch):
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
def test_with_allow_unmeasured_formulas_replace_the_measurement(change, monkeypatch):
    what = change(monkeypatch)
    code, found, value = compiled("--allow-unmeasured")
    assert code == 0
    assert value["plan"]["measured"] is False
    assert found["library-changed"][0] == "warning"
    assert what in found["library-changed"][1]


def test_the_error_names_the_tried_and_the_installed_version(newer, monkeypatch):
    with_state_returned(monkeypatch)
    _, found, _ = compiled()
    message = f"{newer}: `LlamaForCausalLM.forward` returns its cache as `state`: the model is not measured"
    assert found["library-changed"] == ("error", message)


def test_formulas_are_not_cached_as_a_measurement(monkeypatch):
    with monkeypatch.context() as context:
        with_state_returned(context)
        assert compiled("--allow-unmeasured")[0] == 0
    _, found, value = compiled()
    assert (value["plan"]["measured"], found) == (True, {})


def test_a_vendored_graph_without_measurement_needs_allow_unmeasured_again(monkeypatch):
    with monkeypatch.context() as context:
        with_state_returned(context)
        assert compiled("--allow-unmeasured", "--vendor")[0] == 0
    assert compiled()[1]["library-changed"][0] == "error"
    checked = run_command("check", "profile.yaml", "--format", "json")
    assert checked.return_value == 1
    allowed = run_command("check", "profile.yaml", "--allow-unmeasured", "--format", "json")
    assert (allowed.return_value, "library-changed" in allowed.stdout) == (0, True)


@pytest.mark.parametrize("command", [("simulate",), ("explain",), ("fit", "--on", "2x24GiB"), ("run",), ("check",)])
def test_every_command_that_needs_the_measurement_reports_the_change(command, monkeypatch):
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("empty").absolute()))
    what = with_state_returned(monkeypatch)
    name, *rest = command
    done = run_command(name, "profile.yaml", *rest)
    assert done.return_value == 1
    said = " ".join(f"{done.stdout} {done.stderr}".split())
    assert what in said
    assert "error[library-changed]" in said


def test_tree_shows_formulas_only_with_allow_unmeasured(monkeypatch):
    what = with_state_returned(monkeypatch)
    refused = run_command("tree", "llama", "--measure")
    assert (refused.return_value, what in " ".join(refused.stderr.split())) == (1, True)
    allowed = run_command("tree", "llama", "--measure", "--allow-unmeasured")
    assert allowed.return_value == 0
    assert f"by formulas: transformers {versions.installed('transformers')}: " in " ".join(allowed.stdout.split())


def test_compile_profile_raises_the_change(monkeypatch):
    with_state_returned(monkeypatch)
    with pytest.raises(ProfileError, match="returns its cache as `state`"):
        compile_profile("profile.yaml")
    assert not compile_profile("profile.yaml", allow_unmeasured=True).measured


def test_load_model_raises_the_change(monkeypatch):
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("empty").absolute()))
    with_state_returned(monkeypatch)
    with pytest.raises(ProfileError, match="returns its cache as `state`"):
        load_model("profile.yaml")


def test_a_change_that_stops_the_dry_run_is_an_error(newer, monkeypatch):
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


def test_a_change_that_stops_reading_the_model_is_an_error_even_with_allow_unmeasured(monkeypatch):
    gone = Private("transformers.PreTrainedModel.no_such_plan", "nothing")
    monkeypatch.setattr(transformers_adapter, "DTYPE_PLAN", gone)
    for arguments in ((), ("--allow-unmeasured",)):
        code, found, _ = compiled(*arguments)
        assert (code, found["library-changed"][0]) == (1, "error")
        assert "`transformers.PreTrainedModel.no_such_plan` is not there" in found["library-changed"][1]


def test_a_bug_of_ours_is_reported_as_one(monkeypatch):
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


def test_a_need_for_data_is_attributed_to_the_model_under_any_version(newer):
    assert raised(data_needed).cause == "model"


def test_an_error_in_a_models_code_is_attributed_to_the_model_under_a_tried_version():
    assert raised(in_the_model).cause == "model"


def test_an_error_in_a_models_code_is_attributed_to_an_untried_version(newer):
    failure = raised(in_the_model)
    assert failure.cause == "library"
    assert failure.reason.startswith(f"{newer}: ")


def test_an_error_in_our_code_is_attributed_to_us_or_to_an_untried_version(monkeypatch):
    def own():
        Forwards(None, None).prefill_inputs(1)

    assert raised(own).cause == "own"
    assert "(devmap_config/graph/forwards.py:" in raised(own).reason
    monkeypatch.setitem(versions.TRIED, "transformers", ("5.19.0",))
    failure = raised(own)
    assert failure.cause == "library"
    assert "(devmap_config/graph/forwards.py:" in failure.reason


def test_an_error_of_torch_in_a_models_call_is_attributed_to_the_model():
    """Although a method of ours passes the call on."""

    def handed_on():
        traffic = Traffic(blocks={}, skipped=frozenset())
        with SimulatedDevices((), {}, (), {}, traffic).watching(torch.nn.Identity()):
            torch.ones(2, 3) @ torch.ones(2, 3)

    assert raised(handed_on).cause == "model"


def with_pixels(self, pixel_values):
    raise AssertionError("it is not to be called")


@pytest.mark.parametrize("forward", [with_pixels, torch.nn.Module.forward])
def test_a_model_without_text_input_is_not_taken_for_a_change(forward, monkeypatch):
    """Its class may still name `input_ids`, as every class does by default."""
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    code, found, _ = compiled()
    assert code == 0
    assert "library-changed" not in found
    severity, message = found["not-simulated"]
    assert severity == "warning"
    assert ("pixel_values" in message) == (forward is with_pixels)


def test_a_change_is_found_as_the_cause_of_another_error():
    def wrapped():
        try:
            Private("torch.nothing", "nothing").find()
        except LibraryChangedError as error:
            raise ValueError("something else") from error

    assert raised(wrapped) == MeasurementFailure(
        "library", f"torch {versions.installed('torch')}: `torch.nothing` is not there"
    )


# -- versions ----------------------------------------------------------------------------------------------------------


def test_an_untried_version_is_reported_once_in_one_line(newer):
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


def test_tried_versions_are_not_reported():
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
def test_a_version_change_is_stated_from_the_nearest_tried_version(installed, told, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda _library: installed)
    assert versions.moved("transformers") == told
