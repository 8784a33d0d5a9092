"""A process that tries inputs one after another, and is ended if one takes too much time or memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fuzz.execution import LARGE, SLOW, Outcome, execute, remember_solutions
from fuzz.workspace import make_workspace

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

STUCK_CPU_SECONDS = 25
"""After so much of the processor's time an input counts as one that does not end."""

STUCK_SECONDS = 120
"""The same by the clock, without the time in which other work had the processors: it waits for something."""

HEADROOM_BYTES = 3 * 2**29
"""What a worker may take besides what it has at first: more than is allowed, and less than endangers the machine."""

INPUTS_PER_WORKER = 5_000
"""Then it is replaced by a new one: libraries keep things."""

CONTEXT = multiprocessing.get_context("forkserver")
MODELS = ("llama", "qwen3_moe", "gpt2", "gemma3", "t5", "vit")
CONTEXT.set_forkserver_preload(
    ["fuzz.execution", "torch", "highspy", *(f"transformers.models.{name}.modeling_{name}" for name in MODELS)]
)


class Worker:
    """A process in which inputs are tried, one at a time.

    Args:
        root: the folder of `make_root`.
        number: which of the workers there it is.
    """

    def __init__(self, root: Path, number: int = 0) -> None:
        self._root, self._number = root, number
        self._start()

    def _start(self) -> None:
        self.connection, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(other, self._root, self._number))
        self._process.start()
        other.close()
        self._tried = 0
        self.connection.recv()

    def send(self, surface: str, data: bytes) -> None:
        """Send an input to be tried."""
        if self._tried >= INPUTS_PER_WORKER:
            self.close()
            self._start()
        self._tried += 1
        self._started, self._cpu_seconds = time.monotonic() - self._queued_seconds(), self._cpu_time()
        self.connection.send((surface, data))

    def outcome(self) -> Outcome | None:
        """Return how the input was answered, or `None` while it is not."""
        try:
            if self.connection.poll(0):
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return self._ended(f"ends the process with {self._process.exitcode}")
        if self._cpu_time() - self._cpu_seconds > STUCK_CPU_SECONDS:
            return self._ended(SLOW)
        if time.monotonic() - self._queued_seconds() - self._started > STUCK_SECONDS:
            return self._ended("waits for something")
        return None

    def run(self, surface: str, data: bytes) -> Outcome:
        """Try an input and wait for the outcome."""
        self.send(surface, data)
        while (outcome := self.outcome()) is None:
            self.connection.poll(0.1)
        return outcome

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _ended(self, kind: str) -> Outcome:
        self.close()
        self._start()
        return Outcome(kind)

    def _queued_seconds(self) -> float:
        """Return how long the first thread was ready but had no processor; only Linux reports it."""
        try:
            return int(Path(f"/proc/{self._process.pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def _cpu_time(self) -> float:
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system


def make_root(root: Path) -> None:
    """Fill a folder from which workers start, in a process of its own."""
    process = CONTEXT.Process(target=_make_root, args=(root,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("there is no workspace to try inputs in")


def _make_root(root: Path) -> None:
    _go_offline(root / "cache")
    (root / "template").mkdir()
    make_workspace(root / "template")


def _work(connection: Connection, root: Path, number: int) -> None:
    """Try the inputs that arrive; output that libraries print by themselves is discarded."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    folder = root / f"worker-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "cache", folder / "cache")
    _go_offline(folder / "cache")
    remember_solutions()
    limit = HEADROOM_BYTES + psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send("ready")
    with suppress(EOFError):  # whoever sent inputs is gone
        while True:
            surface, data = connection.recv()
            try:
                outcome = execute(surface, data, root / "template", folder / "work")
            except MemoryError:
                outcome = Outcome(LARGE)
            connection.send(outcome)


def _go_offline(cache: Path) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ |= {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
