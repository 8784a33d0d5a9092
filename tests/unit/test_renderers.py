"""Findings are rendered for terminals, byte for byte, and for other programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from sarif_pydantic import Sarif

from devmap_config.cli.reporting import report_on_terminal
from devmap_config.compiler import Request, run_pipeline
from devmap_config.diagnostics.diagnostic import Diagnostic, Related, Sink, Span
from devmap_config.diagnostics.github import diagnostics_to_github
from devmap_config.diagnostics.sarif import diagnostics_to_sarif
from devmap_config.diagnostics.terminal import print_diagnostics

PROFILE = """\
extends: base.yaml
version: 1
model: {source: llama}
placement:
  stragety: auto
  pins:
    - {match: "model.layer.[0-15]", device: cuda:0}
    - {match: lm_head, device: cuda:0}
    - {match: lm_head, device: cpu}
"""
BASE = """\
hardware:
  devices:
    cuda:0: {memory: 1GiB}
    cpu: {memory: 20G}
"""

EXPECTED = """\
error[bad-quantity]: `G` is not a unit of bytes
 --> base.yaml:4:19
  |
4 |     cpu: {memory: 20G}
  |                   ^^^
 ::: profile.yaml:1:10
  |
1 | extends: base.yaml
  |          --------- extended from here
  = help: write `20GiB` or `20GB`: 1,073,741,824 or 1,000,000,000 bytes each

error[unknown-key]: unknown key `stragety` in `placement`
 --> profile.yaml:5:3
  |
5 |   stragety: auto
  |   ^^^^^^^^
  = help: did you mean `strategy`?

error[unmatched-pattern]: `model.layer.[0-15]` matches no module of
  LlamaForCausalLM
 --> profile.yaml:7:15
  |
7 |     - {match: "model.layer.[0-15]", device: cuda:0}
  |               ^^^^^^^^^^^^^^^^^^^^ nearest: `model.layers` (6 layers)
  = help: `devmap tree llama --match 'model.layers.*'`

error[conflicting-pins]: two rules give `lm_head` different devices: cuda:0 and
  cpu
 --> profile.yaml:9:15
  |
9 |     - {match: lm_head, device: cpu}
  |               ^^^^^^^ cpu here
 ::: profile.yaml:8:15
  |
8 |     - {match: lm_head, device: cuda:0}
  |               ------- cuda:0 here
  = help: remove one, or write `override: true` in the later one

"""


def rendered(diagnostics, texts, width=80):
    stream = io.StringIO()
    print_diagnostics(diagnostics, texts, Console(file=stream, width=width, highlight=False, color_system=None))
    return stream.getvalue()


@pytest.fixture
def compilation(workspace):
    Path("profile.yaml").write_text(PROFILE)
    Path("base.yaml").write_text(BASE)
    return run_pipeline(Request(path=Path("profile.yaml")))


def test_the_terminal_shows_all_findings_with_their_lines(compilation):
    assert rendered(compilation.diagnostics, compilation.texts) == EXPECTED


def finding(line, column, end_column, **options):
    span = Span(file="p.yaml", line=line, column=column, end_line=line, end_column=end_column)
    return Diagnostic(code="wrong-type", severity="error", message="this is wrong", span=span, **options)


def test_marks_are_aligned_below_wide_characters():
    lines = rendered([finding(1, 10, 12, label="here")], {"p.yaml": "name: 模型 模型"}).splitlines()
    assert lines[3] == "1 | name: 模型 模型"
    assert lines[4] == "  |            ^^^^ here"


def test_marks_are_aligned_after_tabs():
    lines = rendered([finding(1, 2, 3)], {"p.yaml": "\tx: 1"}).splitlines()
    assert lines[3] == "1 |     x: 1"
    assert lines[4] == "  |     ^"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_long_line_is_cut_around_the_mark(width):
    text = "a" * 300 + ": WRONG " + "b" * 300
    lines = rendered([finding(1, 303, 308, label="not this")], {"p.yaml": text}, width).splitlines()
    assert all(len(line) <= width for line in lines)
    source, marks = lines[3], lines[4]
    assert source[marks.index("^") :].startswith("WRONG")


def test_a_label_without_room_goes_below():
    label = "a label that says rather more than fits beside the mark"
    lines = rendered([finding(1, 30, 34, label=label)], {"p.yaml": " " * 29 + "here"}, 60).splitlines()
    assert lines[4].rstrip().endswith("^^^^")
    assert "a label that says" in lines[5]


def test_a_finding_without_a_place_is_shown():
    bare = Diagnostic(code="missing-file", severity="error", message="`x` does not exist", help="name a profile")
    assert rendered([bare], {}) == "error[missing-file]: `x` does not exist\n  = help: name a profile\n\n"


def test_escapes_of_a_strangers_profile_do_not_reach_the_terminal():
    hostile = Diagnostic(code="syntax", severity="error", message="bad \x1b[31m text", help="\x1b]0;title\x07")
    text = rendered([hostile, finding(1, 1, 3)], {"p.yaml": "\x1b[2Jx"})
    assert "\x1b" not in text


def test_sarif_is_valid(compilation):
    value = diagnostics_to_sarif(compilation.diagnostics, "0.1.0")
    log = Sarif.model_validate(value)
    assert [result.rule_id for result in log.runs[0].results] == [each.code for each in compilation.diagnostics]
    assert json.loads(json.dumps(value))["version"] == "2.1.0"


def test_github_annotations_escape_what_would_end_them():
    related = (Related(message="m", span=Span(file="b", line=1, column=1, end_line=1, end_column=2)),)
    each = Diagnostic(
        code="syntax",
        severity="warning",
        message="50% of\nit",
        span=Span(file="a,b:c.yaml", line=3, column=5, end_line=3, end_column=9),
        related=related,
    )
    assert diagnostics_to_github([each]) == [
        "::warning file=a%2Cb%3Ac.yaml,line=3,endLine=3,col=5,endColumn=9,title=syntax::50%25 of\\nit"
    ]


def test_the_terminal_shows_a_hundred_findings_errors_first(capsys):
    warnings = [Diagnostic.warning("ignored-key", f"warning {number}") for number in range(150)]
    report_on_terminal([*warnings, Diagnostic.error("unknown-key", "an error")], {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error[unknown-key]: an error"
    assert [line for line in lines if line.startswith("warning")][-1] == "warning[ignored-key]: warning 98"
    assert lines[-2:] == ["and 51 more findings, which `--format json` shows", "1 error and 150 warnings"]


def test_equal_findings_are_recorded_once():
    sink = Sink()
    for number in [*range(5000), *range(5000)]:
        sink.warning("ignored-key", f"warning {number}")
    assert len(sink.diagnostics) == 5000
