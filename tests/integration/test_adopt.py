"""`devmap adopt` reads device maps in the forms that people have, and reports keys and modules that do not match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import LLAMA

from devmap_config.cli import devmap

WHOLE = {
    "model.embed_tokens": 0,
    **{f"model.layers.{index}": 0 if index < 6 else 1 for index in range(12)},
    "model.norm": 1,
    "model.rotary_emb": 0,
    "lm_head": 1,
}
"""A map of twelve layers that leaves nothing out."""


@pytest.fixture(autouse=True)
def models(workspace):
    for name, values in {"deep": {"num_hidden_layers": 12}, "tied-deep": {"tie_word_embeddings": True}}.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 12, **values}))


def adopt(text, *options, model="deep", stdin=None):
    """Adopt the text of a map, and return the profile and the findings by code."""
    Path("map").write_text(text)
    source = "map" if stdin is None else "-"
    arguments = ["adopt", source, "--model", model, "--format", "json", *options]
    done = CliRunner().invoke(devmap, arguments, standalone_mode=False, input=stdin)
    value = json.loads(done.stdout)
    return value["profile"], {each["code"]: each for each in value["diagnostics"]}


def plan_of(profile):
    Path("adopted.yaml").write_text(profile)
    arguments = ["compile", "adopted.yaml", "--no-simulate", "--format", "json"]
    return json.loads(CliRunner().invoke(devmap, arguments, standalone_mode=False).stdout)["plan"]


def without(*keys):
    return {key: device for key, device in WHOLE.items() if key not in keys}


PRINTED = str(WHOLE).replace(": 0", ": device(type='cuda', index=0)").replace("'lm_head': 1", "'lm_head': \"cuda:1\"")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(WHOLE),
        str(WHOLE),
        PRINTED,
        f"device_map = {WHOLE}",
        f"OrderedDict({list(WHOLE.items())})",
        f"# by hand\n{str(WHOLE)[:-1]},  # the head\n}}\n",
    ],
    ids=["JSON", "a dict", "torch.device", "a statement", "OrderedDict", "comments"],
)
def test_a_map_is_adopted_in_every_notation(text):
    profile, found = adopt(text)
    assert found == {}
    assert plan_of(profile)["device_map"] == WHOLE
    assert adopt("", stdin=text) == (profile.replace("Adopted from map:", "Adopted from stdin:"), {})


def test_unknown_keys_are_named_with_the_nearest_module():
    profile, found = adopt(json.dumps({**WHOLE, "model.layers.12": 1, "model.layers.13": 1, "lm_haed": 1}))
    assert set(found) == {"ignored-key"}
    Path("map").write_text(json.dumps({**WHOLE, "model.layers.12": 1, "model.layers.13": 1, "lm_haed": 1}, indent=1))
    shown = CliRunner().invoke(devmap, ["adopt", "map", "--model", "deep"], standalone_mode=False)
    words = " ".join(shown.stderr.split())
    assert "has no `model.layers.[12-13]`: transformers ignores such keys --> map:18:2" in words
    assert "`model.layers` (12 layers) ends at 11" in words
    assert "nearest: `lm_head`" in words
    assert (shown.return_value, plan_of(profile)["device_map"]) == (0, WHOLE)


@pytest.mark.parametrize("key", ["{a,b}" * 10, "model.layers.{0,", "re:(", "class:", "**." * 9 + "x", "[0-9]"])
def test_keys_that_are_patterns_are_left_out(key):
    profile, found = adopt(json.dumps({**WHOLE, key: 1}))
    assert profile is None or plan_of(profile)["device_map"] == WHOLE
    assert set(found) & {"ignored-key", "misread-map"}


def test_a_missing_layer_is_an_error_as_in_transformers():
    profile, found = adopt(json.dumps(without("model.layers.11")))
    assert profile is None
    assert found["uncovered-tensor"]["severity"] == "error"
    assert "no key names `model.layers.11`: transformers refuses" in found["uncovered-tensor"]["message"]
    assert "`model.layers.1` takes it" in found["uncovered-tensor"]["message"]


def test_a_map_that_transformers_refuses_writes_nothing_and_says_so():
    Path("map").write_text(json.dumps(without("model.layers.11")))
    arguments = ["adopt", "map", "--model", "deep", "-o", "adopted.yaml"]
    done = CliRunner().invoke(devmap, arguments, standalone_mode=False)
    assert "`adopted.yaml` is not written, because of errors" in done.stderr
    assert not Path("adopted.yaml").exists()


def test_missing_buffers_are_placed_where_they_are_used():
    profile, found = adopt(json.dumps(without("model.rotary_emb")))
    assert found["uncovered-tensor"]["severity"] == "warning"
    assert "no key names `model.rotary_emb`, which no checkpoint holds" in found["uncovered-tensor"]["message"]
    assert 'add `"model.rotary_emb": 0`' in found["uncovered-tensor"]["help"]
    assert plan_of(profile)["device_map"] == WHOLE


def test_modules_missing_from_a_map_of_one_device_stay_on_the_cpu():
    profile, found = adopt(json.dumps({"model": 0}))
    assert "no key names `lm_head`: transformers leaves it on the CPU" in found["uncovered-tensor"]["message"]
    assert plan_of(profile)["device_map"] == {"": 0}
    assert adopt(json.dumps({"model": 0}), model="tied-deep")[1] == {}  # the head is the embedding
    assert adopt(json.dumps({"model": "cpu"}))[1] == {}
    _, found = adopt(json.dumps(dict.fromkeys(without("model.layers.11"), 0)))
    assert "transformers puts it where `model.layers.1` is" in found["uncovered-tensor"]["message"]


def test_a_map_that_separates_tied_tensors_is_reported():
    profile, found = adopt(json.dumps(WHOLE), model="tied-deep")
    assert "they are one tensor: plain transformers fails at the forward" in found["split-tie"]["message"]
    assert plan_of(profile)["device_map"]["lm_head"] == 0
    _, found = adopt(json.dumps({**WHOLE, "lm_head": "cpu"}), model="tied-deep")
    assert "transformers has both on cuda:0" in found["split-tie"]["message"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("[]", "wrong-type", "this is not a device_map"),
        ('"auto"', "wrong-type", "this is not a device_map"),
        ("{}", "wrong-type", "the device_map is empty"),
        ("{", "syntax", "cannot be read here"),
        ('{"model": {"layers": 0}}', "syntax", "cannot be read here"),
        ('{f"model.layers.{i}": 0 for i in range(12)}', "syntax", "cannot be read here"),
        ('{"model": "gpu"}', "bad-device-name", "`gpu` is not a device"),
        ('{"model": "cuda:[0-1]"}', "bad-device-name", "is several devices"),
        ('{"model": -1}', "bad-device-name", "`-1` is not a device"),
        ('{"model": 0, "model.layers.[0-5]": 1}', "misread-map", "reads as a regular expression"),
        ('{"model": 0, "model.(": 1}', "misread-map", "reads as a regular expression"),
    ],
)
def test_text_that_is_no_device_map_is_an_error(text, code, message):
    profile, found = adopt(text)
    assert profile is None
    assert set(found) == {code}
    assert message in found[code]["message"]
    assert found[code]["help"]


def test_help_depends_on_the_pasted_text():
    assert "devmap init MODEL --strategy auto" in adopt('"auto"')[1]["wrong-type"]["help"]
    assert "no code is run" in adopt('{f"model.layers.{i}": 0 for i in range(12)}')[1]["syntax"]["help"]


def test_a_map_with_devices_that_the_machine_lacks_is_an_error():
    _, found = adopt(json.dumps(WHOLE), "--on", "rtx-4090")
    assert "the map uses cuda:1, and `rtx-4090` has no such device" in found["unknown-device"]["message"]
    profile, found = adopt(json.dumps({**WHOLE, "lm_head": "cpu"}), "--on", "2xrtx-4090")
    assert found == {}
    assert "    cpu: {memory: 32KiB}   # just what the map needs\n" in profile


def test_a_map_that_the_compiler_refuses_is_adopted_with_the_reason():
    Path("map").write_text(json.dumps({"": 0}))
    done = CliRunner().invoke(devmap, ["adopt", "map", "--model", "llama", "--on", "t4"], standalone_mode=False)
    assert done.return_value == 1
    assert "source: ./llama" in done.stdout
    assert "as it is, the profile does not compile: a t4 (cuda:0) does not compute in bfloat16" in done.stderr
