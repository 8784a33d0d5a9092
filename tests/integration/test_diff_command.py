"""`devmap diff` compares profiles, locks and git revisions, as a process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from integration.test_commands import GOOD, devmap


def git(*arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(workspace):
    """A profile whose lock has two versions in git; in the second, layers 4 and 5 are on the CPU."""
    Path("profiles").mkdir()
    profile = Path("profiles/x.yaml")
    text = GOOD.replace("source: llama", "source: ../llama")
    git("init", "-q", ".")
    for pins in ("", '{match: "model.layers.[4-5]", device: cpu}, '):
        profile.write_text(text.replace("pins: [", f"pins: [{pins}"))
        assert devmap("compile", "-q", "profiles/x.yaml").returncode == 0
        git("add", ".")
        git("commit", "-qm", "a lock")
    return profile


def test_diff_of_a_revision_shows_runs_of_moved_layers(repository):
    done = devmap("diff", "HEAD~1", "profiles/x.yaml")
    assert done.returncode == 3, done.stderr
    assert "model.layers.[4-5]   cuda:0 → cpu" in done.stdout
    assert "copied at every forward" in done.stdout
    assert "model.layers.0" not in done.stdout
    back = devmap("diff", "profiles/x.lock.json", "HEAD~1")
    assert "model.layers.[4-5]   cpu → cuda:0" in back.stdout
    assert devmap("diff", "HEAD~1:profiles/x.lock.json", "HEAD:profiles/x.yaml").returncode == 3


def test_diff_of_equal_plans(repository):
    for before, after in (("HEAD", "profiles/x.yaml"), ("profiles/x.lock.json", "profiles/x.yaml")):
        done = devmap("diff", before, after)
        assert (done.returncode, done.stdout) == (0, f"{before} and {after} are the same plan\n")


def test_diff_prints_one_json_object(repository):
    done = devmap("diff", "HEAD~1", "profiles/x.yaml", "--format", "json")
    value = json.loads(done.stdout)
    assert (done.returncode, value["diagnostics"], value["diff"]["equal"]) == (3, [], False)
    [move] = value["diff"]["moved"]
    assert move["modules"] == ["model.layers.[4-5]"]
    assert (move["before"]["device"], move["after"]["device"]) == ("cuda:0", "cpu")
    assert set(value["diff"]["prediction"]) == {
        "decode_nanoseconds_per_token", "bound_decode_nanoseconds_per_token", "prefill_nanoseconds",
        "streamed_bytes_per_token", "hops", "longest_context",
    }  # fmt: skip
    missing = devmap("diff", "nowhere", "profiles/x.yaml", "--format", "json")
    assert (missing.returncode, json.loads(missing.stdout)["diff"]) == (2, None)


def test_diff_prints_markdown_tables(repository):
    done = devmap("diff", "HEAD~1", "profiles/x.yaml", "--format", "markdown")
    assert "| `model.layers.[4-5]` | cuda:0 | cpu |" in done.stdout.splitlines()
    tables = [block for block in done.stdout.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_two_revisions_are_compared(repository):
    done = devmap("diff", "HEAD~1:profiles/x.yaml", "HEAD:profiles/x.yaml")
    assert (done.returncode, "model.layers.[4-5]" in done.stdout) == (3, True), done.stderr


def test_diff_compiles_a_changed_profile_anew(repository):
    repository.write_text(repository.read_text().replace("[4-5]", "[3-5]"))
    done = devmap("diff", "profiles/x.lock.json", "profiles/x.yaml")
    assert (done.returncode, "model.layers.3   cuda:0 → cpu" in done.stdout) == (3, True)
    assert "warning[stale-lock]" in done.stderr
    repository.write_text(repository.read_text().replace("lm_head", "lm_haed"))
    wrong = devmap("diff", "profiles/x.lock.json", "profiles/x.yaml")
    assert (wrong.returncode, "error[unmatched-pattern]" in wrong.stderr) == (1, True)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("HEAD~7", "neither a file nor a git revision"),
        ("--output=x", "No such option"),
        ("HEAD:nothing.yaml", "if it had another name, `HEAD:PATH`"),
        ("nothing.yaml", "for two revisions, `REVISION:PROFILE` twice"),
        ("llama/config.json", "is not a lock"),
    ],
)
def test_diff_of_something_that_is_no_plan_is_an_error(repository, before, words):
    done = devmap("diff", before, "profiles/x.yaml")
    assert (done.returncode, words in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (None, "missing-lock"),
        (lambda text: text[:300], "unreadable-lock"),
        (lambda text: text.replace('"lock_version": 1', '"lock_version": 2'), "newer-lock"),
    ],
)
def test_diff_reports_why_a_lock_cannot_be_read(repository, change, code):
    lock = Path("profiles/x.lock.json")
    text = lock.read_text()
    lock.unlink()
    if change is not None:
        lock.write_text(change(text))
    done = devmap("diff", "HEAD", "profiles/x.yaml")
    assert (done.returncode, f"warning[{code}]" in done.stderr) == (0, True), done.stderr


def test_diff_names_another_model_and_another_card(repository):
    other = Path("profiles/other.yaml")
    other.write_text(repository.read_text().replace("../llama", "../tied").replace('"{{ memory }}"', "2GiB"))
    done = devmap("diff", "profiles/x.yaml", "profiles/other.yaml")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[1].startswith("the models differ: of modules, those are compared that both")
    assert "model    ../llama → ../tied" in done.stdout
    assert "cuda:0   1.0 GiB → 2.0 GiB" in done.stdout
    assert "config." not in done.stdout  # of another model all is other
    settings = json.loads(devmap("diff", "profiles/x.yaml", "profiles/other.yaml", "--format", "json").stdout)["diff"]
    assert settings["settings"]["model"] == {"before": "../llama", "after": "../tied"}


def test_diff_names_changed_config_values_of_the_same_model(repository):
    config = Path("llama/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-5}))
    done = devmap("diff", "HEAD", "profiles/x.yaml")
    assert "config.rms_norm_eps   – → 1e-05" in done.stdout
