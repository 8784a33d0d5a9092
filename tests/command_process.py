"""A command in a process of its own that need not import torch and transformers: it is forked from one that did."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

import huggingface_hub.constants

from devmap_config.cli import progress

CONTEXT = multiprocessing.get_context("forkserver")
MODELS = ("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert")
CONTEXT.set_forkserver_preload(["devmap_config.cli", "devmap_config.compiler", "torch", "accelerate", *MODELS])


def run_command(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command, and return its exit code and what it wrote to its streams.

    Tests that run commands this way cannot see what happens while Python itself starts: the encoding of streams by the
    environment, the modules that are imported, the time to the first answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_run, args=(program, arguments, Path.cwd(), dict(os.environ), *streams))
        process.start()
        process.join()
        return subprocess.CompletedProcess(
            [program, *arguments], process.exitcode, *(stream.read_text("utf-8") for stream in streams)
        )


def _run(program, arguments, folder, environment, *streams) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)  # which are read from the environment once
    for descriptor, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    progress.SECONDS_WITHOUT_A_WORD = 600  # as in conftest.py, of which this process has not heard
    sys.argv = [program, *arguments]
    (command,) = entry_points(group="console_scripts", name=program)
    sys.exit(command.load()())  # as the script that an installer writes for it does
