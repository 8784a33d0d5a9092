"""`devmap serve` answers OpenAI's client as transformers does, serves many at once, and refuses invalid requests."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from click.testing import CliRunner
from conftest import REPOSITORY
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from devmap_config.cli.compile import compile_command
from devmap_config.cli.serve import serve

QUICKSTART = REPOSITORY / "profiles" / "models" / "quickstart"
TOKENIZER = AutoTokenizer.from_pretrained(QUICKSTART)
TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} {% endfor %}model:"
CONTEXT = 20_000
LONG = 15_000
"""Tokens that take longer to write than any test may wait."""

PROMPT = "Two tensors that"
CHAT = [{"role": "user", "content": PROMPT}]


def write_profile(folder, more=""):
    profile = folder / "profile.yaml"
    profile.write_text(
        f"version: 1\nname: tiny\nmodel: {{source: model}}\n{more}hardware: {{devices: {{cpu: {{memory: 4GiB}}}}}}\n"
    )
    assert compile_command.main([str(profile), "-q"], standalone_mode=False) == 0


def random_model():
    """A model that goes on and on, of random weights with which it does not repeat one word."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(TOKENIZER), max_position_embeddings=CONTEXT, eos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@contextmanager
def served(folder, *options):
    """A process that serves a folder's profile, and the object that it prints once it does."""
    command = "from devmap_config.cli import main; main()"
    arguments = ["serve", str(folder / "profile.yaml"), "--port", "0", "--format", "json", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not lines or lines[-1] not in ("}\n", ""):
            lines.append(process.stdout.readline())
        yield process, json.loads("".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model that is served, in the folder that it is served from."""
    folder = tmp_path_factory.mktemp("served")
    found = random_model()
    found.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    write_profile(folder, f"workload: {{context_length: {CONTEXT}}}\n")
    found.folder = folder
    return found


@pytest.fixture(scope="module")
def url(model):
    with served(model.folder, "--queue", "6") as (_, printed):
        assert (printed["verified"], printed["model"]) == (True, "tiny")
        yield printed["url"]


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def written(model, text, count, **options):
    """Return what plain transformers writes after a text."""
    inputs = TOKENIZER(text, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=count, **{"do_sample": False, **options})[0]
    prompt = inputs["input_ids"].shape[1]
    before, whole = (TOKENIZER.decode(each, skip_special_tokens=True) for each in (tokens[:prompt], tokens))
    return prompt, whole[len(before) :], TOKENIZER.decode(tokens[prompt:], skip_special_tokens=True)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_completion_is_what_transformers_writes_at_once_and_in_a_stream(client, model):
    prompt, expected, _ = written(model, PROMPT, 24)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    found = client.completions.create(**asked)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "length")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, 24)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected
    assert (parts[-1].choices, parts[-1].usage) == ([], found.usage)
    assert [part.choices[0].finish_reason for part in parts[-3:-1]] == [None, "length"]
    assert len(parts) > 12


def test_a_chat_is_what_transformers_answers_at_once_and_in_a_stream(client, model):
    prompt, _, expected = written(model, f"user: {PROMPT} model:", 24)
    asked = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 24, "temperature": 0}
    found = client.chat.completions.create(**asked)
    [choice] = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "length")
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (prompt, prompt + 24)
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert parts[0].choices[0].delta.role == "assistant"
    assert (parts[-1].choices[0].finish_reason, parts[-1].usage) == ("length", None)
    text = [{"type": "text", "text": PROMPT[:6]}, {"type": "text", "text": PROMPT[6:]}]
    again = client.chat.completions.create(**asked | {"messages": [{"role": "user", "content": text}]})
    assert again.choices[0].message.content == expected


def test_a_text_ends_before_its_stop_word(client, model):
    _, expected, _ = written(model, PROMPT, 40)
    stop = expected[20:29]
    before = expected[: expected.index(stop)]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": ["no such word", stop]}
    found = client.completions.create(**asked)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (before, "stop")
    needed = found.usage.completion_tokens
    assert needed < 40
    assert client.completions.create(**asked | {"max_tokens": needed}).choices[0].finish_reason == "stop"
    parts = list(client.completions.create(**asked, stream=True))
    assert ("".join(part.choices[0].text for part in parts), parts[-1].choices[0].finish_reason) == (before, "stop")


def test_sampling_depends_on_the_seed(client, model):
    def drawn(**options):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, **options}
        return client.completions.create(**asked).choices[0].text

    first = drawn(temperature=1, seed=1)
    torch.manual_seed(1)
    assert written(model, PROMPT, 12, do_sample=True, top_k=0)[1] == drawn(temperature=1, seed=1) == first
    assert len({first, drawn(temperature=1, seed=2), drawn(temperature=1), drawn(temperature=1)}) == 4
    greedy = written(model, PROMPT, 12)[1]
    assert drawn() == drawn(temperature=0, seed=3) == drawn(temperature=1, top_p=1e-9) == greedy


def test_the_served_model_is_listed(client, url):
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx2.get(f"{url[:-3]}/health").json() == {"status": "ok", "waiting": 0}


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = [
    ({"n": 2}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"extra_body": {"min_p": 0.1}}, "min_p"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stream_options": {"more": True}}, "stream_options.more"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name"),
]


@pytest.mark.parametrize(("field", "param"), REFUSED, ids=[str(field)[:40] for field, _ in REFUSED])
def test_unsupported_parameters_are_refused_by_name(client, field, param):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**{"model": "tiny", "messages": CHAT, "max_tokens": 1, **field})
    assert refusal.value.body["type"] == "invalid_request_error"
    assert (refusal.value.param, f"`{param}`" in refusal.value.message) == (param, True)


def test_parameters_with_neutral_values_are_accepted(client):
    nothing = {"n": 1, "logprobs": False, "presence_penalty": 0, "tool_choice": "none", "user": "alice"}
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None}
    asked = {"model": "tiny", "messages": [*CHAT, answer, *CHAT], "max_tokens": 1, **nothing}
    assert client.chat.completions.create(**asked).usage.completion_tokens == 1


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model `gpt-4` here, but `tiny`") as refusal:
        client.completions.create(model="gpt-4", prompt="a")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_requests_beyond_the_planned_context_are_refused(client):
    for prompt, count in (("tied " * (CONTEXT // 2), 1), (PROMPT, CONTEXT)):
        with pytest.raises(openai.BadRequestError) as refusal:
            client.completions.create(model="tiny", prompt=prompt, max_tokens=count)
        assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="20,000"):
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=CONTEXT)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "is not JSON at line 1"),
        (b"[]", 400, "not a JSON object"),
        (b"\xff", 400, "not UTF-8"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "no Unicode"),
        (b'{"model": "tiny", "prompt": ["a", "b"]}', 400, "one text"),
        (b'{"model": "tiny", "prompt": NaN}', 400, "`prompt`"),
        (b" " * 4_000_001, 413, "4,000,000 bytes"),
    ],
)
def test_an_invalid_body_is_refused(url, body, status, said):
    found = httpx2.post(f"{url}/completions", content=body, headers={"content-type": "application/json"})
    assert (found.status_code, said in found.json()["error"]["message"]) == (status, True)


def test_requests_of_web_pages_are_refused(url):
    body = b'{"model": "tiny", "prompt": "a"}'
    as_form = httpx2.post(f"{url}/completions", content=body, headers={"content-type": "text/plain"})
    assert (as_form.status_code, "application/json" in as_form.json()["error"]["message"]) == (415, True)
    for host, status in (("rebound.example:80", 403), ("", 403), ("localhost:1", 200), ("[::1]", 200)):
        found = httpx2.get(f"{url}/models", headers={"host": host, "origin": "http://rebound.example"})
        assert found.status_code == status
        assert not any(name.startswith("access-control") for name in found.headers)
    asked_before = httpx2.options(f"{url}/completions", headers={"origin": "http://a", "host": "localhost"})
    assert (asked_before.status_code, asked_before.json()["error"]["type"]) == (405, "invalid_request_error")
    assert httpx2.get(f"{url}/nothing").json()["error"]["message"] == "Not Found"


# -- many at once ------------------------------------------------------------------------------------------------------


def test_of_forty_requests_at_once_some_are_answered_and_others_told_to_retry(client, model):
    _, expected, _ = written(model, PROMPT, 150)
    together = threading.Barrier(40)

    def ask(number):
        together.wait()
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 150, "temperature": 0}
        try:
            if number % 2:
                found = "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True))
            else:
                found = client.completions.create(**asked).choices[0].text
        except openai.RateLimitError as error:
            assert (error.type, error.code) == ("rate_limit_error", "rate_limit_exceeded")
            return f"again after {int(error.response.headers['retry-after']) > 0}"
        return found

    with ThreadPoolExecutor(40) as clients:
        found = Counter(clients.map(ask, range(40)))
    assert set(found) == {expected, "again after True"}
    assert found[expected] >= 7  # one that is answered and six that wait
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).usage.completion_tokens == 1


def test_generation_ends_if_the_client_disconnects(client, url):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": LONG, "temperature": 0}
    streams = []
    for _ in range(3):  # one is being written and two wait
        stream = client.completions.create(**asked, stream=True)
        streams.append(stream)
    next(iter(streams[0]))
    port = int(url.rsplit(":", 1)[1].partition("/")[0])
    body = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    for connection in waiting:
        connection.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
    wait_until(lambda: httpx2.get(f"{url[:-3]}/health").json()["waiting"] == 4)
    for each in (*streams[1:], *waiting):
        each.close()
    wait_until(lambda: httpx2.get(f"{url[:-3]}/health").json()["waiting"] == 0)
    streams[0].close()
    start_seconds = time.perf_counter()
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).usage.completion_tokens == 1
    assert time.perf_counter() - start_seconds < 5


def wait_until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it does not come")


# -- beginning and ending ----------------------------------------------------------------------------------------------


def test_random_weights_are_served_until_the_process_is_told_to_end(tmp_path):
    """What has come is finished, unless that is said again; no more is taken, and the exit code is that of success."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, tmp_path / "model" / name)
    write_profile(tmp_path)
    with served(tmp_path, "--random-weights") as (process, printed):
        assert (printed["verified"], printed["unchecked"]) == (False, "the weights are random")
        client = openai.OpenAI(base_url=printed["url"], api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template") as refusal:
            client.chat.completions.create(model="tiny", messages=CHAT)
        assert refusal.value.code == "no-chat-template"
        end = json.loads((QUICKSTART / "config.json").read_text())["max_position_embeddings"]
        with pytest.raises(openai.BadRequestError, match=f"more than the context holds, {end:,}"):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=end)
        parts = iter(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=200, stream=True))
        first = next(parts)
        with ThreadPoolExecutor(1) as another:
            waits = another.submit(client.completions.create, model="tiny", prompt=PROMPT, max_tokens=end - 20)
            wait_until(lambda: httpx2.get(f"{printed['url'][:-3]}/health").json()["waiting"] == 1)
            process.send_signal(signal.SIGTERM)
            rest = list(parts)
            assert (first.choices[0].finish_reason, rest[-1].choices[0].finish_reason) == (None, "length")
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.InternalServerError, match="the server was told to stop") as refusal:
                waits.result()
        assert (refusal.value.status_code, process.wait(timeout=20)) == (503, 0)


def refused(*options):
    done = CliRunner().invoke(serve, ["profile.yaml", "--port", "0", *options], standalone_mode=False)
    return done.return_value, done.stderr


def test_a_missing_library_is_an_error_with_the_install_command(workspace, monkeypatch):
    Path("profile.yaml").write_text("version: 1\n")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, said = refused()
    assert (code, "error[server-missing]: serving needs uvicorn, which is not installed" in said) == (1, True)
    assert "pip install 'devmap-config[serve]'" in said


def test_an_unavailable_address_is_an_error_before_loading(workspace):
    Path("profile.yaml").write_text("version: 1\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, place in ((("--port", port), f"`127.0.0.1`, port {port}"), (("--host", "no host"), "`no host`")):
            done = CliRunner().invoke(serve, ["profile.yaml", "--port", "0", *options])
            assert (done.exit_code, f"cannot listen at {place}" in done.stderr) == (2, True)


def test_a_model_that_writes_no_text_is_not_served(workspace):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=len(TOKENIZER))).save_pretrained("model")
    write_profile(Path())
    code, said = refused()
    assert (code, "error[unfit-input]: BertForMaskedLM writes no text to serve" in said) == (1, True)
    random_model().save_pretrained("model")
    write_profile(Path())
    code, said = refused()
    assert (code, "error[no-tokenizer]: there is no tokenizer" in said) == (1, True)
