"""Hosts that serve an exported plan: processes on this machine, in network namespaces if there are several."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

PLUGIN = Path(__file__).with_name("weights_plugin")

STARTING_SECONDS = 240
"""An engine takes 20 to 100 s to start, by how busy the machine is."""

NOT_COMPILED = ("--compilation-config", '{"mode": 2, "backend": "eager"}')
"""Nothing is compiled, and the warm-up runs, which a pipeline on CPUs needs: `--enforce-eager` leaves it out."""

PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [27])


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def namespaces():
    """Make two network namespaces that reach each other; return their names, addresses and interfaces."""
    names = [f"devmap-{os.getpid()}-{number}" for number in range(2)]
    interfaces = [f"dm{os.getpid() % 100_000}-{number}" for number in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", interfaces[0], "type", "veth", "peer", "name", interfaces[1])
        for name, interface, address in zip(names, interfaces, addresses, strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", interface, "up")
        yield list(zip(names, addresses, interfaces, strict=True))
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


WITHIN = (
    "unshare",
    "-m",
    "-i",
    "--propagation",
    "private",
    "bash",
    "-c",
    'mount -t tmpfs tmpfs /dev/shm; exec "$@"',
    "_",
)
"""vLLM takes processes that share /dev/shm for those of one host."""


class Served:
    """An exported plan that a script serves on each host."""

    def __init__(self, folder, python, spaces=(None,)):
        self.folder, self.spaces = folder, spaces
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("VLLM", "GLOO"))},
            "PYTHON": str(python),
            "VLLM": str(python.with_name("vllm")),
            "PYTHONPATH": str(PLUGIN),
            "NOTED_WEIGHTS": str(folder),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.hosts = []

    def command(self, node, *options):
        space = self.spaces[node]
        script = ["sh", str(self.folder / "serve.sh"), *options, "plan.env", f"node.{node}.env"]
        return script if space is None else ["ip", "netns", "exec", space, *WITHIN, *script]

    def start(self, plans=("plan.env", "plan.env")):
        for node in range(len(self.spaces)):
            command = [plans[node] if part == "plan.env" else part for part in self.command(node)]
            with (self.folder / f"log.{node}").open("w") as log:
                started = subprocess.Popen(
                    [*command, *NOT_COMPILED], cwd=self.folder, env=self.environment, stdout=log, stderr=log
                )
            self.hosts.append(started)
        return self

    def log(self, node=0):
        return (self.folder / f"log.{node}").read_text(errors="replace")

    def wait(self):
        """Wait for an answer."""
        deadline = time.monotonic() + STARTING_SECONDS
        while time.monotonic() < deadline:
            last = len(self.spaces) - 1
            asked = subprocess.run(
                self.command(last, "--health"), cwd=self.folder, env=self.environment, check=False, capture_output=True
            )
            if asked.returncode == 0:
                return self
            assert all(host.poll() is None for host in self.hosts), self.told()
            time.sleep(1)
        raise AssertionError(self.told())

    def told(self):
        return "\n".join(f"--- {node}\n{self.log(node)[-4000:]}" for node in range(len(self.hosts)))

    def tokens(self):
        """Return the 24 likeliest tokens after each prompt."""
        program = (
            "import json, sys, urllib.request\n"
            "body, url = sys.stdin.read().encode(), sys.argv[1]\n"
            'request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})\n'
            "print(urllib.request.urlopen(request, timeout=120).read().decode())\n"
        )
        plan = dict(re.findall(r"^(\w+)=(.*)$", (self.folder / "plan.env").read_text(), re.MULTILINE))
        asked = {
            "model": plan["SERVED_NAME"], "prompt": PROMPTS, "max_tokens": 24, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        url = f"http://{plan['API_HOST']}:{plan['API_PORT']}/v1/completions"
        within = [] if self.spaces[0] is None else ["ip", "netns", "exec", self.spaces[0]]
        command = [*within, self.environment["PYTHON"], "-c", program, url]
        done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        choices = sorted(json.loads(done.stdout)["choices"], key=lambda choice: choice["index"])
        return [choice["token_ids"] for choice in choices]

    def cache_tokens(self):
        """Return the tokens that the engine says its cache holds."""
        [size] = re.findall(r"KV cache size: ([\d,]+) tokens", self.log())
        return int(size.replace(",", ""))

    def weights(self):
        """Return the bytes of weights that each rank has loaded."""
        ranks = sorted(self.folder.glob("rank.*"), key=lambda path: int(path.suffix[1:]))
        return [json.loads(path.read_text()) for path in ranks]

    def kill(self, node, *, engine_only):
        """Kill a host's engine, or its script first, with all their processes."""
        tree = [self.hosts[node].pid, *_below(self.hosts[node].pid)]
        for pid in tree[1:] if engine_only else tree:
            if engine_only and "cluster.py" in _command(pid):
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def codes(self, seconds=60):
        """Return the exit codes of the scripts."""
        return [host.wait(seconds) for host in self.hosts]

    def stop(self):
        left = [pid for host in self.hosts for pid in _below(host.pid)]
        for host in self.hosts:
            if host.poll() is None:
                host.terminate()
        for host in self.hosts:
            with suppress(subprocess.TimeoutExpired):
                host.wait(40)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _below(pid):
    """Return the processes that a process has started, with their descendants."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *_below(child))]


def _command(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""
