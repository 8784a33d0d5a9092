"""Strangers' names and texts are escaped in every output format and on every stream."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import click
import pytest
import yaml
from conftest import write_models
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from sarif_pydantic import Sarif

from devmap_config.cli import _exit_code, main, options
from devmap_config.cli.console import EscapingConsole, progress_line
from devmap_config.cli.diff import _markdown, table_lines
from devmap_config.cli.new_profile import NewProfile
from devmap_config.cli.reporting import EscapedStream, echo, echo_lines, print_json, print_lines, report
from devmap_config.diagnostics.diagnostic import Diagnostic, ProfileError, Related, Span
from devmap_config.diagnostics.terminal import print_diagnostics
from devmap_config.graph.digest import digest
from devmap_config.plan.diff import Difference, Home, Move, ValueChange
from devmap_config.runner.loading import RunnerError
from devmap_config.wording import visible_lines

STRANGE = (
    *("\x1b[35m", "\x1b[2J", "\x1b]0;title\x07", "\x9b35m", "\r", "\n", "\x00", "\x7f", "\t", "\v", "\x85", "\u2028"),
    *("\u202e", "\u2066", "\u200b", "\ufeff", "\xa0", "\u3000", "\udce9", "\ud800", "\udbff\udc00", "\U000e0041"),
    *("\n::error file=x::forged", "::set-output name=a::b", "\n \t::notice::x", "##[error]x", "#", "##[add-mask]x"),
    *("|", "`", "``", "<img src=x>", "[a](https://b.example)", "www.example.com", "@someone", "\\", "*a*", "&lt;"),
    *("[/x]", "[bold]", "[link=https://b]", ":smile:", "%0A::error::x", "%", ",", '"', "'", "{x}", "%s", "模型", "é"),
)  # fmt: skip

strange = st.lists(st.sampled_from(STRANGE) | st.characters(), min_size=1, max_size=6).map("".join)

names = st.binary(min_size=1, max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b"\n"))) | strange.filter(
    lambda text: not re.search("[\ud800-\udc7f\udd00-\udfff]", text)
)
"""Of files, as the system gives them: any bytes."""

often = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def each_by_itself(**others):
    """Try each strange text alone as well, beside these other values; `file` is the text if a file can hold it."""

    def decorate(test):
        for text in STRANGE:
            named = {} if others.get("file") is None else {"file": text if text.isascii() else "p.yaml"}
            test = example(**{"text": text, **others, **named})(test)
        return test

    return decorate


COLOUR = re.compile(r"\x1b\[[\d;]*m")
NOT_OURS = "\x1b[35m"
"""A colour that nothing of ours has."""

COMMAND = re.compile(r"\s*::(?P<name>[a-zA-Z][^:]*?)::|.*##\[")
"""What GitHub's runner takes for a command, as its `ActionCommand` reads lines."""


def is_harmless(text, *, may_be_coloured=False):
    if may_be_coloured:
        assert NOT_OURS not in text
        text = COLOUR.sub("", text)
    for line in text.split("\n"):
        assert line.replace("\t", "").isprintable(), line
        assert not COMMAND.match(line), line
    return text


def finding(text, file="p.yaml"):
    span = Span(file=file, line=1, column=3, end_line=1, end_column=9)
    related = (Related(message=text, span=span),)
    return Diagnostic.error("wrong-type", f"`{text}` is wrong", span, label=text, help=f"not {text}", related=related)


def reported(capsys, output_format, *arguments, **more):
    report(*arguments, output_format, **more)
    return capsys.readouterr()


@often
@each_by_itself(file="", width=40)
@given(text=strange, file=names, width=st.integers(20, 120))
def test_findings_hold_no_terminal_controls_and_no_workflow_commands(text, file, width):
    for colours in (None, "truecolor"):
        shown = io.StringIO()
        console = EscapingConsole(file=shown, width=width, force_terminal=bool(colours), color_system=colours)
        print_diagnostics([finding(text, file)], {file: f"a: {text} # {text}"}, console)
        is_harmless(shown.getvalue(), may_be_coloured=bool(colours))
        assert len(shown.getvalue().splitlines()) >= 9


@often
@each_by_itself(file="")
@given(text=strange, file=names)
def test_machine_formats_hold_the_whole_text_and_are_printable(capsys, text, file):
    given_in = ([finding(text, file)], {file: text})
    value = json.loads(is_harmless(reported(capsys, "json", *given_in, data={text: [text]}).out))
    json.dumps(value, ensure_ascii=False).encode()  # no half characters
    assert len(value["diagnostics"][0]["related"]) == 1
    [run] = Sarif.model_validate_json(is_harmless(reported(capsys, "sarif", *given_in).out)).runs
    [result] = run.results
    assert result.locations[0].physical_location.artifact_location.uri.isascii()
    assert not re.search(r"(?<!\\)\]\(", result.message.text)


@often
@each_by_itself(file="")
@given(text=strange, file=names)
def test_a_finding_is_one_github_annotation(capsys, text, file):
    shown = reported(capsys, "github", [finding(text, file)], {}).out
    assert re.fullmatch(r"::error ([a-zA-Z]+=[^:,\n]*,?)+::[^\n]*\n", shown)
    assert shown[:-1].isprintable()
    assert not re.search("%(?!25|0A|3A|2C)", shown)


@often
@each_by_itself()
@given(text=strange)
def test_each_way_of_printing_escapes_text(capsys, text):
    console = EscapingConsole(file=io.StringIO(), width=60)
    for word in (text, f"[{text}", Text.assemble((text, "red"), text)):
        table = Table(text if isinstance(word, str) else "name", "b")
        table.add_row(word, "2")
        print_lines(lambda _, word=word, table=table: [word, table])
        console.print(word, soft_wrap=True)
    progress = progress_line("{task.description}", "{task.fields[x]}")
    progress.add_task(text, total=2, x=text)
    console.print(progress.get_renderable())
    echo(text)
    echo_lines(text, err=True)
    print_json({text: text})
    record = logging.LogRecord(text, logging.WARNING, "", 1, "%s", (text,), None)
    for shown in (
        *capsys.readouterr(),
        console.file.getvalue(),
        options._Formatter("%(name)s: %(message)s").format(record),
    ):
        is_harmless(shown)
    assert visible_in_one_line(capsys, text)


def visible_in_one_line(capsys, text):
    """Return a name as one line, so that no part of it looks like a line of ours."""
    echo(f"wrote {text}")
    return capsys.readouterr().out.count("\n") == 1


@often
@given(pieces=st.lists(strange | st.sampled_from([":", "::", "#", "##", "[", "\n", " ", "error"]), max_size=12))
def test_text_in_pieces_is_escaped_like_the_whole(pieces):
    shown = io.StringIO()
    stream = EscapedStream(shown)
    for piece in pieces:
        stream.write(piece)
    is_harmless(shown.getvalue())
    assert shown.getvalue().count("\n") == "".join(pieces).count("\n")


@often
@each_by_itself()
@given(text=strange)
def test_error_messages_of_commands_are_escaped(capsys, text):
    for raised in (click.UsageError(text), ValueError(text), ProfileError((finding(text),))):

        @click.command()
        def fail(raised=raised):
            raise raised

        with pytest.MonkeyPatch.context() as context:
            context.setattr(sys, "argv", ["devmap"])
            _exit_code(fail, "devmap")
        is_harmless("".join(capsys.readouterr()))
    for raised in (ProfileError((finding(text, text),)), RunnerError("load-failed", text)):
        is_harmless(str(raised))


PIPE = re.compile(r"(?<!\\)\|")


@often
@each_by_itself()
@given(text=strange)
def test_strange_names_do_not_break_markdown_tables(text):
    moved = Move((text, "model"), Home(text), None)
    change = ValueChange({"capacity_bytes": 1, "weights_bytes": 1, "kv_cache_bytes": 0, "activation_bytes": 0,
                     "overhead_bytes": 0, "free_bytes": 0}, None)  # fmt: skip
    nothing = dict.fromkeys(
        ("decode_nanoseconds_per_token", "bound_decode_nanoseconds_per_token", "prefill_nanoseconds",
         "streamed_bytes_per_token", "hops", "longest_context"), ValueChange(None, None)
    )  # fmt: skip
    settings = {"model": ValueChange(text, f"{text} "), text: ValueChange("a", "b")}
    found = Difference((moved,), {text: change}, nothing, settings, {"decode": ValueChange("stated", None)})
    lines = [visible_lines(line) for line in _markdown(found, text, text)]  # as they are printed
    for line in lines:
        is_harmless(line)
        assert line.isprintable()
        bare = re.sub(r"`[^`]+`", "", line)
        assert "`" not in bare
        assert not re.search(
            r"<(?!/?code>)|\]\(|@|://|www\.|\*(?!\*Placement|\*:)(?<!\*\*)", bare.replace("**Placement**", "")
        )
    rows = [line for line in lines if line.startswith("|")]
    assert [len(PIPE.findall(row)) for row in rows] == [4] * 4 + [4] * 4 + [7] * 3
    assert list(table_lines(found, text, text, 80))


@often
@each_by_itself()
@given(text=strange)
def test_the_title_of_a_new_profile_stays_a_comment(text):
    draft = NewProfile(title=text, output=None, source="x", hardware=["devices: {}"], placement=["strategy: auto"])
    assert set(yaml.safe_load(draft.text)) == {"version", "model", "hardware", "placement"}


# -- the commands, with names in files of a stranger's -----------------------------------------------------------------

PROFILE = """\
version: 1
model: {source: llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: single}
"""

HOSTILE = ["\x1b[35m\x1b[2J", "\u202e::error::x", "a|`b`<img>[/x]##[error]x", "\n::error::\udce9\n"]


def devmap(capsys, *arguments):
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["devmap", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err, err
    return caught.value.code, out, err


@pytest.fixture(scope="module")
def vendored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        context.setattr(sys, "argv", ["devmap", "compile", "-q", "--vendor", "p.yaml"])
        write_models(folder)
        Path("p.yaml").write_text(PROFILE)
        with pytest.raises(SystemExit, match="0"):
            main()
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_no_command_prints_control_characters_of_names(vendored, monkeypatch, capsys, name):
    """The name is that of the profile's file, and of a module, by a graph that was made to say so."""
    monkeypatch.chdir(vendored)
    file = f"{name}.yaml".replace("/", "_")
    Path(file).write_text(PROFILE)
    graph = json.loads(Path("p.graph.json").read_text())
    if not re.search("[\ud800-\udfff]", name):
        graph = json.loads(json.dumps(graph).replace("lm_head", json.dumps(name)[1:-1]))
    del graph["digest"]
    Path(file.replace(".yaml", ".graph.json")).write_text(json.dumps({**graph, "digest": digest(graph)}))
    for command in ("compile --no-simulate", "check", "explain", "tree", "fit --on 2x24GiB"):
        code, out, err = devmap(capsys, *command.split(), "--", file)
        assert code in (0, 1, 3)
        is_harmless(out)
        is_harmless(err)
    Path(file).write_text(PROFILE.replace("single", "singel"))
    for output_format in ("table", "json", "sarif", "github"):
        code, out, err = devmap(capsys, "check", "--format", output_format, "--", file)
        assert (code, bool(out)) == (1, True)
        is_harmless(err)
        is_harmless(out if output_format != "github" else "")


def test_a_lock_shows_strange_characters_in_a_review(vendored, monkeypatch, capsys):
    monkeypatch.chdir(vendored)
    Path("evil.yaml").write_text(PROFILE.replace("single", "single, offload: {folder: ./\u202eoffload\u2066}"))
    assert devmap(capsys, "compile", "-q", "--no-simulate", "evil.yaml")[0] == 0
    lock = is_harmless(Path("evil.lock.json").read_text())
    assert json.loads(lock)["values"]["profile"]["placement.offload.folder"] == "./\u202eoffload\u2066"
    assert devmap(capsys, "check", "-q", "evil.yaml")[0] == 0
