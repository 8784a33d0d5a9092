"""A profile compiles to the same lock, byte for byte, under every setting, directory, Python and installation.

The graph is kept beside the profile, so that none of these runs needs torch.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODELS, REPOSITORY, write_models
from integration.test_commands import RUN

PROFILES = {
    "fastest": """\
version: 1
model: {source: mixture}
workload: {context_length: 64}
hardware:
  devices: {"cuda:[0-1]": {memory: 300KiB, bandwidth: 1TB/s}, cpu: {memory: 1GiB, bandwidth: 50GB/s}}
  links: {host: 25GB/s, peer: 12GB/s}
placement: {strategy: fastest, pins: [{match: "**.{norm,input_layernorm}", keep_together: true, optional: true}]}
""",
    "auto": """\
version: 1
variables: {memory: 160KiB, "größe": "{{ memory }}"}
description: "überall gleich: ı İ ß"
model: {source: tied, attention: eager}
hardware: {devices: {"cuda:[0-2]": {memory: "{{ memory }}"}, cpu: {memory: 1GiB}}}
placement: {strategy: auto, max_memory: {1: 90%}, pins: [{match: "model.layers.[-1:]", device: cuda:2}]}
""",
    "streamed": """\
version: 1
model: {source: llama}
workload: {context_length: 64}
hardware:
  devices: {cuda:0: {memory: 1MiB, bandwidth: 1TB/s}, cpu: {memory: 1GiB}, disk: {memory: 1GiB, bandwidth: 3GB/s}}
  links: {host: 25GB/s}
placement:
  strategy: sequential
  pins: [{match: "model.layers.[3-]", device: cpu}, {match: lm_head, device: disk}]
  offload: {folder: offload}
""",
}

HERE = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}

WITH_CORES = "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ['CORES'])]); "

ELSEWHERE = {"CORES": "1", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

SETTINGS = {
    "hash seed 0": {"PYTHONHASHSEED": "0"},
    "hash seed 1": {"PYTHONHASHSEED": "1"},
    "a plain locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a Turkish locale": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "LANGUAGE": "tr"},
    "a time zone ahead": {"TZ": "Pacific/Kiritimati"},
    "a time zone behind": {"TZ": "Etc/GMT+12"},
    "one core": {"CORES": "1", "OMP_NUM_THREADS": "1"},
    "optimised bytecode": {"PYTHONOPTIMIZE": "2"},
    "all of it": {"PYTHONHASHSEED": "4294967295", "TZ": "Asia/Kathmandu", **ELSEWHERE},
}


def without_versions(lock):
    """A lock's bytes without `made_with`, which no comparison counts."""
    text, count = re.subn(rb'  "made_with": \{.*?\},\n', b"", lock, flags=re.DOTALL)
    assert count == 1
    return text


def locks_by(python, code=RUN, *, folder=".", **environment):
    """The locks that an interpreter writes, started in a folder, without any graph but those beside the profiles."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "LANG", "OMP_"))}
    environment = {**kept, "XDG_CACHE_HOME": os.path.abspath("no-cache"), **environment}  # noqa: PTH100
    locks = {}
    for name in PROFILES:
        profile = os.path.relpath(f"{name}.yaml", folder)
        lock = Path(f"{name}.lock.json")
        lock.unlink(missing_ok=True)
        command = [python, "-c", code, "compile", "-q", profile]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        locks[name] = without_versions(lock.read_bytes())
    return locks


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of profiles with their graphs, and the locks that were written with them; the models are not there."""
    folder = tmp_path_factory.mktemp("compiled")
    write_models(folder)
    locks = {}
    for name, text in PROFILES.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", RUN, "compile", "-q", "--vendor", f"{name}.yaml"]
        subprocess.run(command, cwd=folder, check=True)
        locks[name] = without_versions((folder / f"{name}.lock.json").read_bytes())
    for model in MODELS:
        shutil.rmtree(folder / model)
    return folder, locks


@pytest.fixture
def vendored(compiled, tmp_path, monkeypatch):
    """Those locks, with a copy of the folder as the working directory."""
    folder, locks = compiled
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return locks


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_lock_is_the_same_under_every_setting(vendored, setting):
    environment = SETTINGS[setting]
    code = WITH_CORES + RUN if "CORES" in environment else RUN
    assert locks_by(sys.executable, code, **HERE, **environment) == vendored


@pytest.mark.parametrize("folder", ["..", "elsewhere/deep"])
def test_the_lock_is_the_same_from_every_working_directory(vendored, folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    assert locks_by(sys.executable, folder=folder, **HERE) == vendored


def test_the_lock_is_the_same_if_the_repository_is_elsewhere(vendored, tmp_path, monkeypatch):
    moved = tmp_path / "a folder" / "with ünusual name"
    moved.mkdir(parents=True)
    for path in itertools.chain(Path().glob("*.yaml"), Path().glob("*.graph.json")):
        shutil.copy(path, moved)
    monkeypatch.chdir(moved)
    assert locks_by(sys.executable, **HERE) == vendored


def interpreter(version):
    """An interpreter of this version on this machine: on the path, or among those that pyenv keeps."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(root.glob(f"versions/{version}.*/bin/python")))]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


WITHOUT_TORCH = "pydantic pyyaml jinja2 highspy numpy click rich psutil google-re2 huggingface-hub safetensors".split()


@pytest.mark.zoo
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_is_the_same_by_every_python_and_installation(vendored, tmp_path_factory, version):
    """Installed as a wheel beside its dependencies, without torch, in an environment of its own."""
    found = interpreter(version)
    if found is None:
        pytest.skip(f"there is no Python {version} on this machine")
    environment = tmp_path_factory.mktemp(f"python{version}")
    source = environment / "source"
    shutil.copytree(
        REPOSITORY / "devmap_config", source / "devmap_config", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([found, "-m", "venv", environment / "venv"], check=True)
    python = str(environment / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--constraint", REPOSITORY / "constraints.txt", *WITHOUT_TORCH], check=True)
    subprocess.run([*install, "--no-deps", source], check=True)
    assert locks_by(python) == vendored
    assert locks_by(python, PYTHONHASHSEED="7", TZ="Asia/Kathmandu", LC_ALL="C") == vendored
    checked = subprocess.run(
        [Path(python).with_name("devmap"), "check", "."], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "3 locks up to date\n"), checked.stderr
