"""The files exported for vLLM start, coordinate and stop hosts; a stub program replaces the engine (`make test-vllm`
runs it).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from shutil import which

import pytest
import yaml

from devmap_config.devices import Device
from devmap_config.exports.vllm import ServedModel, files_for, options
from devmap_config.exports.vllm_parser import _arguments
from devmap_config.pipeline.stages import Pipeline, PipelineHost, Stage

STAGE = Stage(
    devices=(),
    first_layer=0,
    last_layer=3,
    weights_bytes=1,
    activation_bytes=0,
    overhead_bytes=0,
    capacity_bytes=9,
    page_bytes=1,
    blocks=8,
)


def pipeline(hosts=2, kind="cuda", ranks=1):
    names = [f"node-{number}" if hosts > 1 else None for number in range(hosts)]
    devices = [tuple(Device(kind, rank, name) for rank in range(ranks)) for name in names]
    stages = [(device,) for of_host in devices for device in of_host]
    return Pipeline(
        kind=kind,
        hosts=tuple(
            PipelineHost(name=name, devices=of_host, cache_bytes=2**26, address="127.0.0.1", interface="lo")
            for name, of_host in zip(names, devices, strict=True)
        ),
        stages=tuple(replace(STAGE, devices=each) for each in stages),
        dtype="float32",
        cache_dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        block_size=16,
        blocks=8,
        blocks_per_request=2,
    )


MODEL = ServedModel(source="/models/tiny", name="tiny")

ENGINE = """\
#!{python}
import json, os, sys, time
with open(sys.argv[0] + "." + str(os.getpid()), "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
time.sleep(60)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def engine(tmp_path):
    """A program that records its arguments and sleeps."""
    path = tmp_path / "engine"
    path.write_text(ENGINE.format(python=sys.executable))
    path.chmod(0o755)
    return path


def exported(folder, made, model=MODEL, **changed):
    """The exported files, with free ports and short timeouts."""
    folder.mkdir()
    for name, text in files_for(made, model).items():
        (folder / name).write_text(text)
    values = {"JOIN_PORT": free_port(), "JOIN_SECONDS": 20, **changed}
    for name, value in values.items():
        plan = (folder / "plan.env").read_text()
        (folder / "plan.env").write_text(re.sub(rf"^{name}=.*$", f"{name}={value}", plan, flags=re.MULTILINE))
    return folder


def start(folder, node, engine, *flags, plan="plan.env"):
    command = ["sh", folder / "serve.sh", folder / plan, folder / f"node.{node}.env", *flags]
    environment = {**os.environ, "VLLM": str(engine), "PYTHON": sys.executable}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def given(engine, count):
    """Return the engine's arguments by the number of the node, once this many were started."""
    for _ in range(200):
        notes = [path for path in engine.parent.glob("engine.*") if path.stat().st_size]
        if len(notes) == count:
            try:
                read = {int(path.suffix[1:]): json.loads(path.read_text()) for path in notes}
            except ValueError:  # half of it is written
                continue
            return {("--headless" in arguments): (pid, arguments, env) for pid, (arguments, env) in read.items()}
        time.sleep(0.1)
    raise AssertionError(f"{count} engines did not start")


def ended(process, seconds=20):
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def is_running(pid):
    return (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )


def test_two_hosts_start_with_one_plan_and_end_together(tmp_path, engine):
    folder = exported(tmp_path / "out", pipeline())
    follower = start(folder, 1, engine)  # in any order
    head = start(folder, 0, engine, "--seed", "1")
    started = given(engine, 2)
    _, arguments, environment = started[False]
    assert arguments[:2] == ["serve", "/models/tiny"]
    assert arguments[arguments.index("--seed") + 1] == "1"
    assert {"--host", "--port", "--nnodes", "--device-ids"} <= set(arguments)
    assert (environment["VLLM_PP_LAYER_PARTITION"], environment["GLOO_SOCKET_IFNAME"]) == ("4,4", "lo")
    assert environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "300"
    of_follower = started[True][1]
    assert of_follower[of_follower.index("--node-rank") + 1] == "1"
    assert "--port" not in of_follower
    os.kill(started[True][0], signal.SIGKILL)  # the follower's engine
    code, said = ended(head)
    assert (code, "node 1 is gone" in said) == (1, True)
    assert ended(follower)[0] == signal.SIGKILL
    assert not is_running(started[False][0])


def test_a_follower_ends_with_its_head_even_where_that_is_killed_at_once(tmp_path, engine):
    folder = exported(tmp_path / "out", pipeline())
    head, follower = start(folder, 0, engine), start(folder, 1, engine)
    started = given(engine, 2)
    head.kill()
    code, said = ended(follower)
    assert (code, "node 0 is gone" in said) == (1, True)
    ended(head)
    for _ in range(50):
        if not any(is_running(pid) for pid, *_ in started.values()):
            break
        time.sleep(0.1)
    assert not any(is_running(pid) for pid, *_ in started.values())


def test_hosts_with_different_plans_do_not_start(tmp_path, engine):
    folder = exported(tmp_path / "out", pipeline())
    text = (folder / "plan.env").read_text()
    (folder / "other.env").write_text(text.replace("VLLM_PP_LAYER_PARTITION=4,4", "VLLM_PP_LAYER_PARTITION=3,5"))
    head, follower = start(folder, 0, engine), start(folder, 1, engine, plan="other.env")
    for process in (head, follower):
        code, said = ended(process)
        assert (code, "not started: node 1 has another plan.env than node 0" in said) == (1, True), said
    assert not list(tmp_path.glob("engine.*"))


def test_messages_that_come_from_no_host_are_ignored(tmp_path, engine):
    """Any JSON type can arrive at the port, and bytes that are no JSON."""
    folder = exported(tmp_path / "out", pipeline())
    port = int(re.search(r"^JOIN_PORT=(\d+)$", (folder / "plan.env").read_text(), re.MULTILINE)[1])
    own = {"plan": "0" * 64, "vllm": "unknown", "node": 1, "nodes": 2}
    wrong = [None, True, 1.0, float("inf"), [], {}, [1], "\n", "1"]
    of_fields = [own | {key: value} for key in own for value in wrong if key not in ("plan", "vllm") or value != "1"]
    objects = [*wrong, *of_fields, *({k: v for k, v in own.items() if k != key} for key in own), list(own.items())]
    lines = [json.dumps(each).encode() + b"\n" for each in objects]
    lines += [
        b"\n",
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(range(256)) + b"\n",
        b"[" * 4000 + b"\n",
        b"1" * 4000 + b"\n",
    ]
    lines += [b"x" * 1_000_000, json.dumps(own).encode()]
    head = start(folder, 0, engine)
    for line in lines:
        connection = reached(port)
        with suppress(OSError):
            connection.sendall(line)
        connection.close()
    follower = start(folder, 1, engine)
    assert set(given(engine, 2)) == {True, False}
    for process in (head, follower):
        process.terminate()
        ended(process)


def reached(port):
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise AssertionError("nothing listens")


def test_waiting_for_a_missing_host_ends(tmp_path, engine):
    folder = exported(tmp_path / "out", pipeline(), JOIN_SECONDS=2)
    code, said = ended(start(folder, 0, engine))
    assert (code, "after 2 s there is no word of node 1" in said) == (1, True)
    code, said = ended(start(folder, 1, engine))
    assert (code, "there is no word of node 0 at 127.0.0.1" in said) == (1, True)


def test_a_single_host_starts_alone_and_stops_on_a_signal(tmp_path, engine):
    folder = exported(tmp_path / "out", pipeline(hosts=1, kind="cpu", ranks=2))
    process = start(folder, 0, engine)
    pid, arguments, environment = given(engine, 1)[False]
    assert arguments[arguments.index("--device-ids") + 1] == "0,1"
    assert "--nnodes" not in arguments
    assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
    assert "GLOO_SOCKET_IFNAME" not in environment
    cores = os.sched_getaffinity(0)
    binding = environment["VLLM_CPU_OMP_THREADS_BIND"]
    if len(cores) > 1:
        parts = [set(map(int, part.split(","))) for part in binding.split("|")]
        assert len(parts) == 2
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] <= cores
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM
    assert not is_running(pid)


def test_every_exported_flag_and_variable_is_in_the_table(tmp_path):
    files = files_for(pipeline(), MODEL)
    used = set(re.findall(r"--[a-z][a-z-]+", files["serve.sh"].partition("mode=serve")[2])) - {"--print", "--health"}
    used |= set(re.findall(r"\b(?:VLLM_[A-Z_]+|[GN][LC]\w+_SOCKET_IFNAME)\b", files["serve.sh"]))
    used |= set(re.findall(r'"(VLLM_[A-Z_]+)"', files["cluster.py"]))
    assert used == set(options())


SEEN_AND_NOT = "😀 é \u202e \u2028 \x85 \x7f \t \ufeff \U000e0001"

HOSTILE = "it's $(touch ran) `touch ran` \"; touch ran; \\ \n#${HOME} {x}"


def test_names_with_special_characters_are_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ServedModel(source=f"/{HOSTILE}", name=HOSTILE)
    folder = exported(tmp_path / "out", pipeline(), model)
    command = ["sh", folder / "serve.sh", "--print", folder / "plan.env", folder / "node.0.env"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed)
    assert words[:3] == [f"/{HOSTILE}", f"--served-model-name={HOSTILE}", "--dtype"]
    assert _arguments(files_for(pipeline(), model))[0][:3] == words[:3]
    assert not (tmp_path / "ran").exists()
    service = yaml.safe_load((folder / "compose.0.yaml").read_text())["services"]["vllm"]
    assert service["volumes"][1]["source"] == f"/{HOSTILE}".replace("$", "$$")
    assert service["entrypoint"][-1] == "/devmap/node.0.env"


def test_exported_files_can_have_names_like_options(tmp_path):
    folder = exported(tmp_path / "out", pipeline())
    for name, other in (("plan.env", "--"), ("node.0.env", "-n")):
        (folder / name).rename(folder / other)
    command = ["sh", "serve.sh", "--print", "--", "-n"]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("/models/tiny\n--served-model-name=tiny\n")


def test_ipv6_addresses_have_brackets_in_urls():
    made = pipeline()
    hosts = tuple(replace(host, address=f"::{number + 1}") for number, host in enumerate(made.hosts))
    files = files_for(replace(made, hosts=hosts), MODEL)
    assert "`http://[::1]:8000/v1`" in files["README.md"]
    assert "MASTER_ADDR=::1\n" in files["plan.env"]


def test_compose_files_preserve_every_character(tmp_path):
    text = files_for(pipeline(), ServedModel(source=f"/{SEEN_AND_NOT}", name="tiny"))["compose.0.yaml"]
    assert "😀" in text
    assert not re.search("[\u202e\u2028\x85\x7f\t\ufeff]", text)
    assert yaml.safe_load(text)["services"]["vllm"]["volumes"][1]["source"] == f"/{SEEN_AND_NOT}"


def test_compose_files_match_the_published_schema(tmp_path):
    """The schema of the Compose Specification, as `check-jsonschema` ships it."""
    model = ServedModel(source="org/model", name=HOSTILE)
    folders = [exported(tmp_path / kind, pipeline(kind=kind), model) for kind in ("cuda", "cpu")]
    files = [path for folder in folders for path in folder.glob("compose.*.yaml")]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(files[0].read_text().replace("network_mode:", "network_mod:"))
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, *files, wrong], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("::$")) == (1, 1), done.stdout
    assert "'network_mod' was unexpected" in done.stdout


@pytest.mark.skipif(which("systemd-analyze") is None, reason="systemd is not on this machine")
def test_systemd_accepts_every_key_of_the_unit(tmp_path):
    folder = exported(tmp_path / "out", pipeline())
    text = (folder / "vllm@.service").read_text()
    (folder / "wrong@.service").write_text(text.replace("KillMode", "KilMode"))

    def said_of(unit):
        command = ["systemd-analyze", "verify", "--man=no", f"./{unit}@0.service"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr

    assert said_of("vllm") == ""
    assert "'KilMode'" in said_of("wrong")


class Completions(BaseHTTPRequestHandler):
    answer = (200, {"usage": {"completion_tokens": 1}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code, body = self.answer if asked["model"] == "tiny" and self.path == "/v1/completions" else (404, {})
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


def test_the_health_check_needs_an_answer(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Completions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder = exported(tmp_path / "out", pipeline(), API_PORT=server.server_port)
        command = ["sh", folder / "serve.sh", "--health", folder / "plan.env", folder / "node.1.env"]
        assert subprocess.run(command, check=False).returncode == 0
        Completions.answer = (500, {})
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        server.shutdown()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
