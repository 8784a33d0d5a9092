"""Errors in a tokenizer's files are reported, and nothing else fails because of them."""

from __future__ import annotations

import json

import pytest
from conftest import write_models
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaForCausalLM

from devmap_config.diagnostics.diagnostic import Sink
from devmap_config.runner.inputs import UserInput, text_inputs
from devmap_config.runner.loading import LoadRequest, RunnerError
from devmap_config.runner.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    write_models(tmp_path)
    Tokenizer(WordLevel({"a": 0, "b": 1})).save(str(tmp_path / "llama" / "tokenizer.json"))
    return tmp_path / "llama"


@pytest.mark.parametrize("text", ["[1]", "null", "5"])
def test_an_invalid_tokenizer_config_leaves_the_model_without_tokenizer(folder, text):
    (folder / "tokenizer_config.json").write_text(text)
    assert (
        load_tokenizer(LoadRequest(weights=str(folder), class_name="", dtype="float32", attention=None), Sink()) is None
    )


def test_an_invalid_maximum_length_is_reported_when_text_is_read(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": "x"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(RunnerError, match="the tokenizer takes no text: TypeError: '>' not supported"):
        text_inputs(LlamaForCausalLM, tokenizer, UserInput(prompt="a"))
