"""Every command on the pages of the documentation runs and prints what its page shows: `make test-docs`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from pages import ELSEWHERE, Command, File, blocks, name_of, pages

from devmap_config.cli import devmap
from devmap_config.cli.exit_codes import ExitCode

pytestmark = pytest.mark.docs

PAGES = [page for page in pages() if name_of(page) not in ELSEWHERE and any(blocks(page))]

SHELL = re.compile(r"[|&;<>$]")
MEASURED = ("devmap run", "devmap serve", "curl")
"""Commands that print times and memory of this machine: their numbers are compared with no others."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The graphs and dry runs of all pages."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workspace(tmp_path, monkeypatch, cache):
    """A repository with the shipped profiles, and an environment in which lines are not wrapped."""
    monkeypatch.chdir(tmp_path)
    Path(".git").mkdir()
    shutil.copytree(REPOSITORY / "profiles", "profiles")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def servers():
    """Processes that a page leaves running."""
    started = []
    yield started
    for process in started:
        process.terminate()
        process.wait(60)


def test_the_picture_in_the_readme_is_drawn_by_its_command(workspace):
    command = ["report", "profiles/qwen3-30b-a3b-fastest.yaml", "--svg", "plan.svg", "-q"]
    assert f"`devmap {' '.join(command[:4])}`" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert CliRunner().invoke(devmap, command).exit_code == ExitCode.DONE
    assert Path("plan.svg").read_bytes() == (REPOSITORY / "docs" / "images" / "plan.svg").read_bytes()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_print_what_it_shows(page, workspace, servers):
    for block in blocks(page):
        if isinstance(block, File):
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.needs is None:
            run(block, servers)


def run(command: Command, servers: list[subprocess.Popen[str]]) -> None:
    """Run a command, and compare its output with the page."""
    name, _, rest = command.line.partition(" ")
    if name == "make":  # what CI runs; a target that it does not run is no command of a page
        of_ci = (line.strip() for line in (REPOSITORY / ".ci" / "run").read_text().splitlines())
        assert command.line.partition("#")[0].strip() in of_ci
        return
    if command.line.startswith("devmap serve"):
        output, code = serve(command.line, servers), 0
    elif name in ("devmap", "devmap-compile") and not SHELL.search(command.line):
        output, code = invoke([*(["compile"] if name == "devmap-compile" else []), *shlex.split(rest)])
    else:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.line],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        output, code = done.stdout, done.returncode
    assert code == command.exit_code, f"{command.line}\n{output}"
    shown = " ".join(output.split())
    for line in command.printed:
        assert pattern(line, command).search(shown), f"{command.line}\nshows no: {line}\nbut: {output}"


def pattern(line: str, command: Command) -> re.Pattern[str]:
    """Return the pattern of a line of a page: any blanks match, `…` matches anything, measured numbers match any
    number.
    """
    expected = re.escape(" ".join(line.split())).replace(re.escape("…"), ".*?").replace("…", ".*?")
    if command.line.startswith(MEASURED):
        expected = re.sub(r"\d+(?:\\?[.,]\d+)*", lambda _: r"[\d.,]+", expected)
    return re.compile(expected)


def invoke(arguments: list[str]) -> tuple[str, int]:
    """Run a command of devmap in this process."""
    result = CliRunner().invoke(devmap, arguments, standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{result.output}{result.exception}", ExitCode.USAGE
    return result.output, result.return_value or 0


def serve(line: str, servers: list[subprocess.Popen[str]]) -> str:
    """Start a server, and return its first line of output."""
    said = Path("server.txt")
    with said.open("w", encoding="utf-8") as output:
        servers.append(subprocess.Popen(shlex.split(line), stdout=output, stderr=subprocess.STDOUT, text=True))
    deadline = time.monotonic() + 300
    while "is served at" not in said.read_text(encoding="utf-8"):
        assert servers[-1].poll() is None, said.read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return said.read_text(encoding="utf-8")
