"""The server reports failures to both sides, ends texts at stop words, and enforces the planned context."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest
import torch
from conftest import REPOSITORY
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from devmap_config.runner.context import PlannedContext
from devmap_config.runner.loading import RunnerError
from devmap_config.server.application import Service
from devmap_config.server.generation import UntilStop, Writer
from devmap_config.server.media import MediaReader

TOKENIZER = AutoTokenizer.from_pretrained(REPOSITORY / "profiles" / "models" / "quickstart")

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("stops", "pieces", "handed_on"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["END"], ["a E", "N", "D b"], ["a "]),
        (["END"], ["a E", "NT", " b"], ["a ", "ENT", " b"]),
        (["END"], ["a EN"], ["a ", "EN"]),
        (["aab"], ["aaa", "b"], ["a"]),
        (["b", "ab"], ["xab"], ["x"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb"]),
    ],
)
def test_a_text_ends_before_its_first_stop_word(stops, pieces, handed_on):
    found = []
    text = UntilStop(stops, found.append)
    for piece in pieces:
        text.write(piece)
    text.end()
    assert found == handed_on
    assert text.is_over == (bool(stops) and any(stop in "".join(pieces) for stop in stops))


def asking(model, told):
    """Return a function that requests a completion from a model's service; `told` collects the model's failures."""
    writer = Writer(model, TOKENIZER, MediaReader(), PlannedContext(tokens=100, prompt_tokens=100), queue_length=0)
    service = Service(model="tiny", writer=writer, is_local=True, tell=told.append)

    async def answer(fields):
        transport = httpx2.ASGITransport(service.application())
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json={"model": "tiny", "max_tokens": 2, **fields})

    return lambda **fields: asyncio.run(answer(fields))


class FailsTwice(LlamaForCausalLM):
    """A model that runs out of memory twice."""

    failures = 2

    def generate(self, *arguments, **options):
        if self.failures:
            self.failures -= 1
            raise MemoryError("out of memory\nat 0x7f")
        return super().generate(*arguments, **options)


def test_a_failure_is_reported_to_both_sides_and_the_next_request_is_served():
    told = []
    model = FailsTwice(LlamaConfig(**SIZES, vocab_size=len(TOKENIZER), eos_token_id=None))
    ask = asking(model, told)
    found = ask(prompt="a")
    message = "the model does not run: MemoryError: out of memory"
    assert (found.status_code, found.json()["error"]) == (
        500,
        {"message": message, "type": "server_error", "param": None, "code": None},
    )
    found = ask(prompt="a", stream=True)
    events = [json.loads(line.removeprefix("data: ")) for line in found.text.splitlines() if line]
    assert (found.status_code, events[-1]["error"]["message"]) == (200, message)
    assert told == [message] * 2
    assert ask(prompt="a").json()["usage"]["completion_tokens"] == 2


def test_finish_reason_is_stop_at_the_end_and_length_if_cut_off():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(TOKENIZER), eos_token_id=None))
    written = model.generate(TOKENIZER("a", return_tensors="pt")["input_ids"], max_new_tokens=20)[0, 1:].tolist()
    count = next(place for place in range(3, 20) if written[place] not in written[:place]) + 1
    model.generation_config.eos_token_id = written[count - 1]
    for most, told in ((count + 5, "stop"), (count, "stop"), (count - 1, "length")):
        found = asking(model, [])(prompt="a", max_tokens=most, temperature=0).json()
        assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == (told, min(most, count))
    model.generation_config.eos_token_id = None
    words = [TOKENIZER.decode(token) for token in written]
    place, word = next((place, word) for place, word in enumerate(words) if word.isascii() and word.strip(" a"))
    model.generation_config.stop_strings = [word]
    found = asking(model, [])(prompt="a", max_tokens=20, temperature=0).json()
    assert (found["choices"][0]["finish_reason"], found["usage"]["completion_tokens"]) == ("stop", place + 1)


def test_prompts_and_new_tokens_beyond_the_planned_context_are_refused():
    context = PlannedContext(tokens=100, prompt_tokens=50)
    assert context.new_tokens(50, wanted=50, default=24) == 50
    assert context.new_tokens(50, wanted=None, default=24) == 24
    assert PlannedContext().new_tokens(10**6, wanted=None, default=24) == 24
    with pytest.raises(RunnerError, match="the prompt has 51 tokens, and the plan room for 50") as refusal:
        context.new_tokens(51, wanted=1, default=24)
    assert "workload.prompt_length" in refusal.value.help
    with pytest.raises(RunnerError, match="of 50 tokens and 51 to be written are more than the context holds, 100"):
        context.new_tokens(50, wanted=51, default=24)
