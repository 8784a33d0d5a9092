"""Starts this host's part of an engine once all hosts have the same plan, and ends it when one of them is gone.

vLLM itself compares no plans: hosts with different partitions start, are healthy, and answer wrongly. A follower of
which the head is gone stays, and a head of which a follower is gone answers nothing for minutes. Only Python's own
library is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata
from pathlib import Path

BEAT_SECONDS = 2
LOST_SECONDS = 30
"""Hosts tell each other so often that they are there; one that says nothing for so long is gone."""

STOP_SECONDS = 20
"""So long the engine has to end by itself before it is killed: it gives back shared memory then."""

LONGEST_MESSAGE_BYTES = 4096

HELLO_SECONDS = 5
"""A host that is slow to speak keeps the others waiting no longer."""


def say(text: str) -> None:
    """Tell whoever reads this host's log."""
    sys.stderr.write(f"cluster: {text}\n")
    sys.stderr.flush()


class NoAgreementError(Exception):
    """The hosts do not come together; the text says why."""


def own_part(plan: str, node: int, nodes: int) -> dict[str, str | int]:
    """Return what all hosts must agree on, and which of them this is."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = "unknown"  # of another Python than the engine's
    content = Path(plan).read_bytes()
    return {"plan": hashlib.sha256(content).hexdigest(), "vllm": version, "node": node, "nodes": nodes}


def is_hello(message: object) -> bool:
    """Return whether a message is what a host says first (`own_part`), whatever it holds."""
    if not isinstance(message, dict) or any(type(message.get(key)) is not int for key in ("node", "nodes")):
        return False
    plan, version = message.get("plan"), message.get("vllm")
    return isinstance(plan, str) and plan.isalnum() and isinstance(version, str) and version.isprintable()


def difference(own: dict[str, str | int], other: dict[str, str | int]) -> str | None:
    """Return why two hosts cannot serve together; `None` if they can."""
    node = other.get("node")
    for key, name in (("plan", "plan.env"), ("vllm", "version of vLLM"), ("nodes", "number of hosts")):
        if own[key] != other.get(key):
            return f"node {node} has another {name} than node {own['node']}: {other.get(key)}, not {own[key]}"
    if not isinstance(node, int) or not 0 < node < int(own["nodes"]):
        return f"a host says that it is node {node}"
    return None


class Peer:
    """Another host, over a connection that both keep open: lines of JSON first, then a line every few seconds."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(LOST_SECONDS)
        self.connection = connection
        self.heard = time.monotonic()
        self.node: object = "?"

    def send(self, message: object) -> None:
        """Send an object as a line of JSON."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> dict[str, str | int]:
        """Return the object of a line of JSON.

        Raises:
            OSError, ValueError: if none comes within some seconds.
        """
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            byte = self.connection.recv(1)
            if not byte or len(line) > LONGEST_MESSAGE_BYTES:
                raise OSError("the connection was closed")
            line += byte
        try:
            message = json.loads(line)
        except RecursionError as error:
            raise ValueError("no object") from error
        if isinstance(message, dict):
            return message
        raise ValueError("no object")

    def is_gone(self) -> bool:
        """Say that this host is there, and return whether the other one still is."""
        try:
            self.connection.setblocking(False)
            self.connection.send(b"\n")
            while self.connection.recv(LONGEST_MESSAGE_BYTES):
                self.heard = time.monotonic()
        except BlockingIOError:
            return time.monotonic() - self.heard > LOST_SECONDS
        except OSError:
            pass
        return True


def await_followers(own: dict[str, str | int], address: str, port: int, seconds: float) -> list[Peer]:
    """Return a connection to each follower, once all are there with the same plan; else tell them all why not."""
    deadline, peers = time.monotonic() + seconds, dict[object, Peer]()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server, selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        reason = None
        while reason is None and len(peers) < int(own["nodes"]) - 1:
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, int(own["nodes"]))) - set(peers))
                reason = f"after {seconds:.0f} s there is no word of node {', '.join(map(str, missing))}"
            elif selector.select(1):
                peer = Peer(server.accept()[0])
                try:
                    other = peer.receive(HELLO_SECONDS)
                except (OSError, ValueError):
                    other = {}
                if not is_hello(other):
                    peer.connection.close()  # a probe of the port, or a host that was ended
                    continue
                reason = difference(own, other)
                peer.node = other.get("node")
                if old := peers.pop(peer.node, None):
                    old.connection.close()  # it was started anew
                peers[peer.node] = peer
        for peer in peers.values():
            try:
                peer.connection.settimeout(LOST_SECONDS)
                peer.send({"refused": reason} if reason else {"agreed": True})
            except OSError:
                reason = reason or f"node {peer.node} is gone"
    if reason:
        raise NoAgreementError(reason)
    return list(peers.values())


def join_head(own: dict[str, str | int], address: str, port: int, seconds: float) -> list[Peer]:
    """Return a connection to the head, once it says that all hosts have the same plan."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            peer = Peer(socket.create_connection((address, port), timeout=5))
            peer.node = 0
            peer.send(own)
            answer = peer.receive(max(deadline - time.monotonic(), 1))  # for the others
        except (OSError, ValueError):
            if time.monotonic() > deadline:
                raise NoAgreementError(
                    f"after {seconds:.0f} s there is no word of node 0 at {address}:{port}"
                ) from None
            time.sleep(1)
            continue
        if answer.get("agreed") is not True:
            raise NoAgreementError(str(answer.get("refused")))
        peer.heard = time.monotonic()
        return [peer]


def cores_of_ranks(ranks: int) -> str:
    """Return which cores each of a host's ranks computes with: vLLM itself has one for each memory node alone."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        return "nobind"
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def end_with_parent() -> None:
    """Have the kernel end the engine when this process is killed."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def stop(engine: subprocess.Popen[bytes]) -> None:
    """End the engine with all its processes."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
        try:
            os.killpg(engine.pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and is_running(engine):
            time.sleep(0.2)


def is_running(engine: subprocess.Popen[bytes]) -> bool:
    """Return whether any process of the engine is left."""
    engine.poll()
    try:
        os.killpg(engine.pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(plan: str, node: int, nodes: int, address: str, port: int, seconds: float, command: list[str]) -> int:
    """Run the engine's part on this host; its exit code, or 1 where hosts do not agree or one is gone."""
    peers: list[Peer] = []
    if nodes > 1:
        own = own_part(plan, node, nodes)
        try:
            peers = (join_head if node else await_followers)(own, address, port, seconds)
        except (NoAgreementError, OSError) as error:
            say(f"not started: {error}")
            return 1
        say(f"all {nodes} hosts have the plan {str(own['plan'])[:12]}")
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopping.append(number))
    engine = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)  # noqa: PLW1509, S603
    gone = None
    beat = 0.0
    while engine.poll() is None and not stopping and gone is None:
        if time.monotonic() - beat > BEAT_SECONDS:
            beat = time.monotonic()
            gone = next((peer.node for peer in peers if peer.is_gone()), None)
        time.sleep(0.2)
    if gone is not None:
        say(f"node {gone} is gone: this one ends, and starts anew with it")
    code = engine.poll()
    stop(engine)
    for peer in peers:
        peer.connection.close()
    if stopping:
        return 128 + stopping[0]
    return 1 if gone is not None or not code else abs(code)  # an engine that ends unasked has failed


def health(address: str, port: int, model: str, seconds: float) -> int:
    """Ask for one token: `/health` says that all is well while hosts that compute are gone."""
    body = json.dumps({"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}).encode()
    host = f"[{address}]" if ":" in address else address
    request = urllib.request.Request(
        f"http://{host}:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=seconds) as answer:
            written = json.load(answer)["usage"]["completion_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        say(f"no answer: {error}")
        return 1
    return 0 if written == 1 else 1


def main(arguments: list[str]) -> int:
    """Run `run` or `health`, with what `serve.sh` gives them."""
    if arguments[0] == "health":
        address, port, model, seconds = arguments[1:]
        return health(address, int(port), model, float(seconds))
    split = arguments.index("--")
    plan, node, nodes, address, port, seconds, ranks, kind = arguments[1:split]
    if kind == "cpu" and int(ranks) > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_of_ranks(int(ranks)))
    return run(plan, int(node), int(nodes), address, int(port), float(seconds), arguments[split + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
