"""A chat template is a stranger's program: whatever it does, the result comes soon and in bounded memory."""

from __future__ import annotations

import sys
import threading
import time

import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from devmap_config.runner import chat_templates
from devmap_config.runner.chat_templates import TemplateFailedError, chat_text

CHAT = [{"role": "user", "content": "a b"}]


def tokenizer(template):
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message.content }}{% endfor %}",
        "{% if add_generation_prompt %}{{ 'x' * 100000 }}\ud800é{% endif %}",
        "",
    ],
)
def test_a_chat_is_rendered_as_by_transformers(template):
    writer = tokenizer(template)
    assert chat_text(writer, CHAT) == writer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** (9 ** 9) }}",  # in C, where no signal of Python's comes through
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('a' * 10 ** 10) | length }}",
        "{{ 'a' | center(10 ** 9) | length }}",
        "{% set x = namespace(a='a' * 999) %}{% for a in range(99) %}{% set x.a = x.a ~ x.a %}{% endfor %}",
        "{{ 'a' * 10 ** 7 }}",
    ],
)
def test_a_template_that_takes_too_much_time_or_memory_is_ended(template, monkeypatch):
    monkeypatch.setattr(chat_templates, "MAX_CPU_SECONDS", 1)
    began, held, children = time.process_time(), psutil.Process().memory_info().rss, psutil.Process().children()
    with pytest.raises(TemplateFailedError, match="it takes more than"):
        chat_text(tokenizer(template), CHAT)
    assert time.process_time() - began < 1
    assert psutil.Process().memory_info().rss - held < 2**28
    assert psutil.Process().children() == children


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is written in this process")
def test_a_template_process_that_hangs_is_ended(monkeypatch):
    """A process forked while another thread holds a lock finds it held for ever."""
    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 1)

    class Waiting:
        def apply_chat_template(self, *arguments, **options):
            threading.Event().wait()

    with pytest.raises(TemplateFailedError, match="it takes more than"):
        chat_text(Waiting(), CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "TemplateError: no system here"),
        ("{{ messages[7].content }}", "UndefinedError: list object has no element 7"),
        ("{% for", "TemplateSyntaxError: "),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: "),
    ],
)
def test_errors_of_a_template_are_reported(template, reason):
    with pytest.raises(TemplateFailedError, match=reason):
        chat_text(tokenizer(template), CHAT)
