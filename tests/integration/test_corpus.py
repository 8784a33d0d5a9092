"""Every input in `tests/corpus` once made a command fail, and now gets a proper answer.

Its folder is named after the surface that reads it, and its file after the failure. `make fuzz` finds such inputs. Each
is tried as there: in a process that has 5 s of processor time and 1 GiB.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import click
import fuzz.execution
import fuzz.worker
import pytest
from fuzz.execution import SLOW, execute
from fuzz.surfaces import SURFACES, Sources
from fuzz.worker import Worker, make_root

from devmap_config.cli import devmap

CORPUS = Path(__file__).parent.parent / "corpus"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    make_root(root)
    return root


@pytest.fixture(scope="module")
def worker(root):
    worker = Worker(root)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name.partition('.')[0]}"
)
def test_an_input_that_once_failed_gets_an_answer(path, worker):
    outcome = worker.run(path.parent.name, path.read_bytes())
    assert outcome.kind is None, f"{outcome.kind}\n{outcome.details}"


@pytest.mark.parametrize("surface", SURFACES)
def test_a_seed_makes_the_same_fuzz_inputs(surface, root):
    first, again = (
        [SURFACES[surface].make(Random(f"{n}"), Sources(root / "template")) for n in range(3)] for _ in "12"
    )
    assert first == again


@click.command()
@click.argument("how")
def answer(how):
    if how == "raise":
        raise ValueError(how)
    if how == "silent":
        return 1
    if how == "unknown":
        return 70
    click.echo("not JSON")
    return 0


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ('"raise"', "ValueError"),
        ('"silent"', "exits with 1, and says nothing"),
        ('"unknown"', "exits with 70"),
        ('"json"', "prints what is no JSON"),
        ('"table"', None),
    ],
)
def test_fuzzing_counts_exceptions_and_bad_output_as_failures(words, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(devmap.commands, "answer", answer)
    monkeypatch.setattr(fuzz.execution, "MAX_PEAK_BYTES", 2**50)  # of this process, which holds all tests
    (tmp_path / "template").mkdir()
    outcome = execute("arguments", f'["answer", {words}]'.encode(), tmp_path / "template", tmp_path / "work")
    assert outcome.kind == kind


def test_fuzzing_counts_too_much_time_or_memory_as_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template").mkdir()
    for name, command, kind in (
        ("MAX_PEAK_BYTES", b'["hardware"]', fuzz.execution.LARGE),
        ("MAX_CPU_SECONDS_OF_ACCEPTED", b'["hardware"]', SLOW),
        ("MAX_CPU_SECONDS", b'["hardware", "x"]', SLOW),
    ):
        with monkeypatch.context() as context:
            context.setattr(fuzz.execution, name, 0)
            assert execute("arguments", command, tmp_path / "template", tmp_path / "work").kind == kind


def test_fuzzing_ends_a_stuck_input_and_goes_on(worker, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(fuzz.worker, "STUCK_CPU_SECONDS", -1)
        assert worker.run("patterns", b"model").kind == SLOW
    assert worker.run("patterns", b"model").exit_code == 0
