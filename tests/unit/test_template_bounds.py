"""Templates of strangers are rendered or refused quickly and in little memory."""

import tracemalloc

import pytest

from devmap_config.profile.template import TemplateRefusedError, render

MOST_BYTES = 20 * 2**20

DOUBLED = "{% set a = [1, 1] %}" + "{% set a = [a, a] %}" * 60
BOMBS = {
    "a wide indent": "{{ [[1]]|tojson(indent=300000000) }}",
    "a width by its place": "{{ [[1]]|tojson(300000000) }}",
    "a fine rounding": "{{ 1.5|round(300000000, 'ceil') }}",
    "lists doubled, compared": DOUBLED + DOUBLED.replace("a", "b") + "{{ a == b }}",
    "lists doubled, searched": DOUBLED + "{{ 1 in a }}",
    "tuples doubled": (DOUBLED + "{{ a < a }}").replace("[a, a]", "(a, a)"),
    "mappings doubled": DOUBLED.replace("[a, a]", "{1: a, 2: a}") + "{{ a == a }}",
    "a long text kept": "{% set y %}{% for i in range(15000) %}"
    + "x" * 3000
    + "{% endfor %}{% endset %}{{ y|length }}",
    "a long text by a macro": (
        "{% macro m() %}" + "x" * 5000 + "{% endmacro %}{% for i in range(10000) %}{% set y = m() %}{% endfor %}"
    ),
    "a long text filtered": "{% filter upper %}{% for i in range(9000) %}" + "y" * 900 + "{% endfor %}{% endfilter %}",
    "loops in loops": "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a text many times": "{{ 'x' * 1000000000 }}",
    "a wide format": "{{ '%999999999d' % 3 }}",
    "a text in between": "{{ ('a' ~ 'b') | replace('', 'c' | list | join) | replace('', 'd' ~ 'e') }}" * 400,
    "a template that is long itself": "{{ 1 }}" + "x" * 20_000,
}


def test_a_lone_surrogate_is_refused():
    with pytest.raises(TemplateRefusedError, match=r"the template fails: .*surrogates not allowed"):
        render(r"{{ 'caf\udce9' }}", {})


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS.keys())
def test_a_template_bomb_is_refused_in_little_memory(template):
    tracemalloc.start()
    try:
        with pytest.raises(TemplateRefusedError):
            render(template, {})
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ [1, 2]|tojson(indent=2) }}", "[\n  1,\n  2\n]"),
        ("{{ 1.26|round(1) }}", "1.3"),
        ("{{ 0|default(300000000) + 300000000 }}", "300000000"),
        ("{% for name, size in {'a': 1, 'b': 2}.items() %}{{ name }}{{ size }}{% endfor %}", "a1b2"),
        ("{% set first, second = (1, [2, 3]) %}{{ first + second[1] }}", "4"),
        ("{% for i in range(1000) %}{{ i % 10 }}{% endfor %}", "0123456789" * 100),
    ],
)
def test_usual_templates_are_rendered(template, text):
    assert render(template, {}) == text


@pytest.mark.parametrize("text", ["{{ 'a'[1, 2:] }}", "{% for i in [1] %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_jinja2_cannot_compile_is_an_error(text):
    with pytest.raises(TemplateRefusedError, match="the template cannot be read"):
        render(text, {})
