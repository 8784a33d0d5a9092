"""All commands share options, ways of failing, and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY

from devmap_config.cli import devmap
from devmap_config.cli.check import EXIT_CODES, WORDS
from devmap_config.cli.checking import State
from devmap_config.cli.command import CommandError, command, profile_command
from devmap_config.cli.exit_codes import ExitCode
from devmap_config.diagnostics.diagnostic import Diagnostic, ProfileError, Span
from devmap_config.libraries.private import LibraryChangedError
from devmap_config.profile.permissions import Permissions

SHARED = ["--set", "--quiet", "--verbose", "--allow-outside", "--trust-remote-code", "--allow-unmeasured"]
WRONG = Diagnostic.error("unknown-key", "there is no such key")


def run(made, *arguments):
    return CliRunner().invoke(made, list(arguments), standalone_mode=False, catch_exceptions=False)


@pytest.mark.parametrize("name", ["compile", "check", "explain", "fit", "run", "serve", "simulate", "report", "update"])
def test_commands_on_profiles_list_the_shared_options_last(name):
    options = [each.opts[-1] for each in devmap.commands[name].params if each.opts[-1].startswith("--")]
    assert options[-len(SHARED) :] == SHARED


def test_a_command_gets_the_profile_of_a_lock_and_the_shared_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("version: 1\n")

    @profile_command("ask", "table", "json")
    def ask(profile, options):
        asked.append((profile, options))

    asked = []
    assert run(ask, "p.lock.json", "--format", "json", "-q", "--set", "a=1", "--allow-outside").return_value == 0
    [(profile, options)] = asked
    assert (profile, options.output_format, options.quiet) == (Path("p.yaml"), "json", True)
    assert (options.variables, options.permissions) == ({"a": "1"}, Permissions(allow_outside=True))


@pytest.mark.parametrize(
    ("raised", "code", "exit_code"),
    [
        (CommandError([WRONG]), "unknown-key", ExitCode.WRONG),
        (CommandError([WRONG], exit_code=ExitCode.STALE, data={"plan": None}), "unknown-key", ExitCode.STALE),
        (ProfileError((WRONG,)), "unknown-key", ExitCode.USAGE),
        (LibraryChangedError("torch", "what it had is gone"), "library-changed", ExitCode.WRONG),
    ],
)
def test_an_error_is_one_json_object_and_an_exit_code(raised, code, exit_code):
    @command("fail", "table", "json")
    def fail(output_format):
        raise raised

    done = run(fail, "--format", "json")
    value = json.loads(done.stdout)
    assert [each["code"] for each in value["diagnostics"]] == [code]
    assert (value["plan"], done.return_value) == (None, exit_code)
    table = run(fail)
    assert (table.return_value, table.stdout, f"error[{code}]" in table.stderr) == (exit_code, "", True)


def test_an_error_shows_the_lines_of_its_place():
    span = Span(file="p.yaml", line=1, column=1, end_line=1, end_column=5)

    @command("fail")
    def fail():
        raise ProfileError((Diagnostic.error("unknown-key", "there is no such key", span),), {"p.yaml": "modl: x"})

    assert "1 | modl: x" in run(fail).stderr


def test_check_has_words_and_an_exit_code_for_every_state():
    assert list(EXIT_CODES) == list(WORDS)
    assert sorted(EXIT_CODES) == sorted(get_args(State))


def test_the_page_of_commands_lists_every_exit_code():
    text = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    _, _, table = text.partition("## Exit codes")
    codes = [int(number) for number in re.findall(r"^\| (\d+) \| ", table, re.MULTILINE)]
    assert codes == [code for code in ExitCode if code is not ExitCode.INTERRUPTED]


def test_the_page_of_commands_lists_every_command_and_its_options():
    text = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    assert [name for name in devmap.commands if f"`devmap {name}" not in text] == []
    assert [name for name in SHARED if name not in text] == []
