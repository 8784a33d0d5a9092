"""`check` of a folder takes files with a profile's keys for profiles, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_files import BAD, put
from click.testing import CliRunner

from devmap_config.cli import devmap
from devmap_config.cli.profiles import profiles_named

GOOD = "version: 1\nmodel: {source: llama}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n"


def found(tmp_path, **files):
    """Return the names of the files that are taken for profiles."""
    for name, text in files.items():
        Path(tmp_path, f"{name}.yaml").write_text(text, encoding="utf-8")
    return [path.stem for path in profiles_named([tmp_path])]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        GOOD.replace("version: 1\n", ""),
        GOOD.replace("version", "verison"),
        GOOD.replace("model", "modle"),
        GOOD.replace("model", "modle").replace("version", "verison").replace("hardware", "hardwear"),
        GOOD.replace("hardware", "machine"),
        "model: {source: x}\n",
        "model: x\n",
        "placement: {strategy: auto}\n",
        "workload: {context_length: 4}\n",
        "version: 1\nhardware: {devices: {}}\n",
        "{model: {source: x}}\n",
        "  version: 1\n  model: {source: x}\n",
        "--- # a comment\nversion: 1\nmodel: {source: x}\n",
        "x-anchors: &a {}\nmodel: *a\n",
        '"model": {source: x}\n',
        "\ufeffmodel: {source: x}\n",
        "extends: nothing.yaml\n",
        "version: 1\nextends: [nothing.yaml]\n",
        # no YAML, with such a key
        "version: 1\nmodel: {source: x\n",
        "model: *nothing\n",
        "model: {source: x}\nmodel: {source: y}\n",
        "<<<<<<< ours\nmodel: {source: x}\n=======\nmodel: {source: y}\n>>>>>>> theirs\n",
        "hardware:\n\tdevices: {}\n",
        "version: 1\nmodel: {source: x}\n---\nversion: 1\nmodel: {source: y}\n",
        "{version: 1, model: {source: x}\n",
        "model: {source: \x00}\n",
    ],
)
def test_a_file_with_a_profiles_key_is_a_profile(tmp_path, text):
    assert found(tmp_path, x=text) == ["x"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "hardware: {devices: {cpu: {memory: 1GiB}}}\n",
        "# a box\nname: box\ndescription: ours\nhardware: {devices: {cpu: {memory: 1GiB}}}\n",
        "name: ci\non: [push]\npermissions: {}\njobs: {test: {runs-on: ubuntu-latest, steps: []}}\n",
        "version: '3'\nname: stack\nservices: {web: {image: x}}\nnetworks: {}\n",
        "services: {web: {image: x}}\nmodels: {llm: {model: ai/smollm2}}\n",
        "repos: [{repo: local, hooks: []}]\n",
        "version: 2\nupdates: []\n",
        "version: 2\nmodels: [{name: x}]\n",
        "name: env\nchannels: [x]\ndependencies: []\nvariables: {A: 1}\n",
        "name: package\nversion: 1.0.0\ndescription: what it is\n",
        "variables: {A: 1}\nstages: [x]\nbuild: {script: x}\n",
        "model: {name: x}\ntrainer: {gpus: 2}\ndata: {path: x}\n",
        "apiVersion: v1\nkind: ConfigMap\n---\napiVersion: v1\nkind: Secret\n",
        "extends: [recommended]\nrules: {}\n",
        "openapi: 3.1.0\ninfo: {version: 1}\npaths: {}\n",
        "name: ci\non: [push\n",
        "description: x\ntargets: [a]\nprompts: [b]\nproviders: [c]\n",
    ],
)
def test_other_yaml_files_are_not_profiles(tmp_path, text):
    assert found(tmp_path, x=text) == []


def test_base_files_and_hardware_files_are_not_profiles(tmp_path):
    files = {
        "base": "version: 1\nmodel: {source: llama}\n",
        "box": "hardware: {devices: {cpu: {memory: 1GiB}}}\n",
        "larger": "extends: box.yaml\nhardware: {devices: {cpu: {memory: 2GiB}}}\n",
        "profile": "extends: [base.yaml, larger.yaml]\n",
        "other": "extends: profile.yaml\nname: other\n",
    }
    assert found(tmp_path, **files) == ["other"]
    Path(tmp_path, "profile.lock.json").write_text("{}")
    assert found(tmp_path) == ["other", "profile"]


def test_a_file_that_extends_itself_is_a_profile(tmp_path):
    files = {
        "a": "extends: b.yaml\nmodel: {source: x}\n",
        "b": "extends: a.yaml\n",
        "c": "extends: c.yaml\nversion: 1\n",
    }
    assert found(tmp_path, **files) == ["a", "b", "c"]


def test_a_file_with_a_lock_is_a_profile_even_if_broken_or_missing(tmp_path):
    for name in ("broken", "gone"):
        Path(tmp_path, f"{name}.lock.json").write_text("{}")
    Path(tmp_path, "gone.yaml").symlink_to("nowhere.yaml")
    assert found(tmp_path, broken="version: [") == ["broken", "gone"]


@pytest.mark.parametrize("is_locked", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_an_unreadable_file_is_ignored_unless_it_has_a_lock(tmp_path, monkeypatch, bad, is_locked):
    (tmp_path / "profiles").mkdir()
    monkeypatch.chdir(tmp_path / "profiles")
    Path("bad.yaml").write_text("- a list\n")
    Path("good.yaml").write_text(GOOD)
    put(bad, Path("bad.yaml"))
    if is_locked:
        Path("bad.lock.json").write_text("{}")
    found = [path.name for path in profiles_named([Path()])]
    assert found == (["bad.yaml", "good.yaml"] if is_locked else ["good.yaml"])


def test_check_of_a_folder_reports_each_profile_whose_version_is_missing_or_misspelt(workspace):
    Path("profiles").mkdir()
    for name, text in (
        ("good", GOOD),
        ("noversion", GOOD.replace("version: 1\n", "")),
        ("typo", GOOD.replace("version", "verison")),
        ("broken", GOOD.replace("}}}", "}")),
    ):
        Path(f"profiles/{name}.yaml").write_text(text.replace("llama", "../llama"))
    Path(".git").mkdir()
    run = CliRunner().invoke
    assert (
        run(devmap, ["compile", "-q", "--no-simulate", "profiles/good.yaml"], standalone_mode=False).return_value == 0
    )
    done = run(devmap, ["check", "profiles", "--format", "json"], standalone_mode=False)
    value = json.loads(done.stdout)
    wrong = {Path(name).stem: state for name, state in value["states"].items()}
    assert (done.return_value, wrong) == (
        1,
        {"broken": "wrong", "good": "fresh", "noversion": "wrong", "typo": "wrong"},
    )
    codes = {(Path(each["file"]).stem, each["code"]) for each in value["diagnostics"]}
    assert codes == {
        ("broken", "syntax"),
        ("noversion", "missing-key"),
        ("typo", "unknown-key"),
    }
