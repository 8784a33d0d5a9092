"""A hub id is read from the hub's cache without a network, and the resolved commit is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import LLAMA
from huggingface_hub import constants

from devmap_config.compiler import Compiled, Request, run_pipeline
from devmap_config.graph.source import ModelNotFoundError, hub_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache in the layout of `huggingface_hub`, with one model."""
    repository = tmp_path / "hub" / "models--people--llama"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_model_is_found_offline(hub_cache, revision):
    source = hub_source("people/llama", revision)
    assert source.class_name == "LlamaForCausalLM"
    assert source.commit == COMMIT
    assert source.weights == "people/llama"


def test_a_model_that_is_not_cached_is_an_error(hub_cache):
    with pytest.raises(ModelNotFoundError, match="not in the hub's cache"):
        hub_source("people/other", None)


def test_the_commit_is_one_of_the_locks_inputs(hub_cache, workspace):
    Path("profile.yaml").write_text(
        "version: 1\nmodel: {source: people/llama}\nhardware: {devices: {cpu: {memory: 1GiB}}}\n"
    )
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    assert isinstance(compilation, Compiled), compilation.diagnostics
    assert compilation.inputs.commit == COMMIT
