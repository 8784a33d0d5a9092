"""Text is streamed as tokens are generated, and the parts add up to the decoded whole."""

from __future__ import annotations

import pytest
import torch
from conftest import REPOSITORY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from devmap_config.runner.text_stream import Speed, TextStream

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "profiles" / "models" / "quickstart")


def streamed(tokens, *, prompt_tokens=2, shows_prompt=True, tokenizer=TOKENIZER):
    """Return the streamed text, part by part."""
    parts = []
    stream = TextStream(tokenizer, parts.append, shows_prompt=shows_prompt)
    stream.put(torch.tensor([tokens[:prompt_tokens]]))
    for token in tokens[prompt_tokens:]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == "".join(parts)
    return parts


@pytest.mark.parametrize("text", ["A model is placed before it is loaded.", "größer 語 🙂🙂 naïve", "a\n\n b  c \n"])
def test_streamed_parts_add_up_to_the_text(text):
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    parts = streamed(tokens)
    assert ("".join(parts), len(parts) > 3) == (text, True)
    assert not any("\ufffd" in part for part in parts)
    assert "".join(streamed(tokens, shows_prompt=False)) == TOKENIZER.decode(tokens[2:])


def test_special_tokens_are_not_shown():
    tokens = TOKENIZER("tied")["input_ids"]
    end = TOKENIZER.eos_token_id
    assert "".join(streamed([end, *tokens, end, *tokens, end])) == "tiedtied"


def test_an_incomplete_character_is_shown_at_the_end():
    tokens = TOKENIZER("ab🙂", add_special_tokens=False)["input_ids"][:-1]
    assert streamed(tokens)[-1].endswith("\ufffd")


def test_output_without_a_tokenizer_is_shown_as_tokens():
    assert streamed([5, 6, 7], tokenizer=None) == ["tokens [5, 6, 7]"]
    end = TOKENIZER.eos_token_id
    assert streamed([end] * 4) == [f"tokens {[end] * 4}"]
    assert streamed([end] * 4, shows_prompt=False) == [f"tokens {[end] * 2}"]


def test_a_continuation_begins_with_its_space():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "▁a": 1, "▁model": 2}, "[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for goes_on, text in ((True, " model a"), (False, "model a")):
        parts = []
        stream = TextStream(tokenizer, parts.append, shows_prompt=False, goes_on=goes_on)
        for tokens in ([1] * 9, [2], [1]):
            stream.put(torch.tensor(tokens))
        stream.end()
        assert "".join(parts) == text


def test_tokens_per_second_exclude_the_first_token():
    speed = Speed(prompt_tokens=9, tokens=5, seconds=3.0, first_token_seconds=1.0)
    assert speed.tokens_per_second == 2.0
    assert (speed + speed).tokens_per_second == 2.0
    of_two = Speed(prompt_tokens=18, tokens=10, seconds=3.0, first_token_seconds=1.0, first_tokens=2)
    assert of_two.tokens_per_second == 4.0
    unseen = Speed(prompt_tokens=9, tokens=6, seconds=3.0, first_token_seconds=None)
    assert (unseen.tokens_per_second, (speed + unseen).first_token_seconds) == (2.0, None)
