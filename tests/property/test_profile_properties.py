"""Any bytes, any YAML and any change of a valid profile give findings or a plan, never a traceback."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import yaml
from conftest import write_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devmap_config.compiler import Compiled, Rejected, Request, run_pipeline

GOOD = """\
version: 1
name: good
variables: {last: 2, size: 1GiB}
x-pin: &pin {device: cuda:1}
model: {source: llama, dtype: bfloat16}
hardware:
  devices:
    "cuda:[0-1]": {memory: "{{ size }}", reserve: 10%}
    cpu: {memory: 64GiB, bandwidth: 80GB/s}
  links: {host: 25GB/s}
placement:
  strategy: balanced
  max_memory: {0: 500MiB, cpu: 50%}
  pins:
    - {<<: *pin, match: lm_head}
    - {match: "model.layers.[-{{ last }}:]", device: cuda:0}
    - {match: "re:model.norm", not_on: [cuda:1], optional: true}
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("profiles")
    write_models(path)
    before = Path.cwd()
    os.chdir(path)
    compiled = compile_bytes(GOOD.encode())
    assert isinstance(compiled, Compiled), compiled.diagnostics
    yield path
    os.chdir(before)


def compile_bytes(data):
    Path("profile.yaml").write_bytes(data)
    start = time.process_time()
    compilation = run_pipeline(Request(path=Path("profile.yaml")))
    # Far above what it takes: a hang is a failure, a slow machine is not.
    assert time.process_time() - start < 20
    has_errors = any(each.severity == "error" for each in compilation.diagnostics)
    assert isinstance(compilation, Rejected) == has_errors
    text = data.decode(errors="replace")
    assert [each for each in compilation.diagnostics if not lies_within(each.span, text)] == []
    return compilation


def lies_within(span, text):
    """Tell whether a place is within the profile's text, including the end of its last line."""
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)
    is_there = 1 <= span.line <= len(lines) and 1 <= span.column <= len(lines[span.line - 1]) + 1
    return span.file == "profile.yaml" and is_there


relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@relaxed
@given(st.binary(max_size=300))
def test_any_bytes_give_findings_or_a_plan(data):
    compile_bytes(data)
    compile_bytes(GOOD.encode() + data)


@relaxed
@given(st.integers(0, len(GOOD)), st.integers(0, 8), st.text(alphabet="[]{}*&!|>'\"%@`#:-?, \t\nax0é", max_size=5))
def test_any_edit_of_a_valid_profile_gives_findings_or_a_plan(place, removed, inserted):
    text = GOOD[:place] + inserted + GOOD[place + removed :]
    compile_bytes(text.encode())


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**20),
    st.floats(),
    st.sampled_from(["cuda:0", "20GiB", "{{ x }}", "[0-3]", ""]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
ROUTES = [
    ("version",), ("model",), ("model", "source"), ("model", "dtype"), ("model", "quantization"), ("workload",),
    ("workload", "batch_size"), ("hardware",), ("hardware", "devices"), ("hardware", "devices", "cpu"), ("extends",),
    ("hardware", "devices", "cpu", "memory"), ("hardware", "links"), ("placement",), ("placement", "strategy"),
    ("placement", "pins"), ("placement", "pins", 0), ("placement", "pins", 0, "match"), ("placement", "max_memory"),
    ("placement", "device_map"), ("placement", "offload"), ("variables",), ("variables", "last"), ("targets",),
]  # fmt: skip


@relaxed
@given(st.sampled_from(ROUTES), values)
def test_any_value_in_any_place_gives_findings_or_a_plan(route, value):
    profile = yaml.safe_load(GOOD)
    holder = profile
    for step in route[:-1]:
        holder = holder[step] if isinstance(holder, list) or step in holder else holder.setdefault(step, {})
    holder[route[-1]] = value
    compile_bytes(yaml.safe_dump(profile, allow_unicode=True).encode())


expressions = st.recursive(
    st.sampled_from(["a", "'x'", "9", "a.b", "range(9)", "[1]", "{}", "last", "''.__class__"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "**", "~", "+", "//", "%", "in", "=="]), inner).map(" ".join),
        st.tuples(
            inner, st.sampled_from(["|join", "|list", "|length", "|replace('x', 'xx')", "|center(9)", "|tojson"])
        ).map("".join),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=6,
)


@relaxed
@given(expressions)
def test_any_template_gives_findings_or_a_plan(expression):
    text = GOOD.replace("name: good", f'name: "{{{{ {expression} }}}}"')
    compile_bytes(text.encode())
    compile_bytes(text.replace("name: ", "name: {% for a in range(99999) %}x{% endfor %}").encode())
