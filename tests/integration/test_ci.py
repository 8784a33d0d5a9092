"""What a repository with profiles uses: docs/ci.md, the hooks, the action, each in a repository made for the test."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
import yaml
from conftest import LLAMA, REPOSITORY, devmap
from packaging.requirements import Requirement

BLOCK = re.compile(r"^```(?P<kind>bash|text)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
EXIT_CODE = re.compile(r"# exit code (?P<code>[0-9]+)$", re.MULTILINE)

PROFILE = """\
version: 1
model: {source: ../models/llama}
hardware: {devices: {cuda:0: {memory: 1GiB}, cpu: {memory: 1GiB}}}
placement: {strategy: single}
"""


@pytest.fixture
def environment(tmp_path):
    """Of a process: the commands of this interpreter, an author, and nothing of this machine's git."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "GITHUB_"))},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
        "PRE_COMMIT_HOME": str(tmp_path / "pre-commit"),
        "COLUMNS": "200",
    }


@pytest.fixture
def run(environment, tmp_path):
    """Runs a command in the test's folder, or one below it; what it prints is one text."""

    def run(*command, folder=None, **more):
        return subprocess.run(
            command,
            cwd=folder or tmp_path,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    return run


@pytest.mark.docs
def test_the_commands_of_the_page_run_in_order(run):
    """Run the page's blocks one after the other; each says its exit code, the block after it what is printed."""
    page = (REPOSITORY / "docs" / "ci.md").read_text()
    folder, output, ran, shown = None, "", 0, 0
    for block in BLOCK.finditer(page[page.index("## A walk-through") :]):
        text = block["text"]
        if block["kind"] == "text":
            for line in text.splitlines():
                assert line in output, (line, output)
            shown += 1
            continue
        stated = EXIT_CODE.search(text)
        done = run("bash", "-euo", "pipefail", "-c", f'{text}\npwd > "$HOME/folder"', folder=folder)
        assert done.returncode == (int(stated["code"]) if stated else 0), (text, done.stdout)
        if not stated:
            folder = Path((Path(run("bash", "-c", "echo $HOME").stdout.strip()) / "folder").read_text().strip())
        output, ran = " ".join(done.stdout.split()), ran + 1  # a terminal breaks lines
    assert (ran, shown) == (6, 4)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with compiled profiles and vendored graphs."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "models" / "llama").mkdir(parents=True)
    (folder / "models" / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (folder / "profiles").mkdir()
    (folder / ".git").mkdir()  # the end of what a profile may name
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        for name in ("a", "b"):
            Path(f"profiles/{name}.yaml").write_text(PROFILE)
            assert devmap("compile", "--vendor", "-q", f"profiles/{name}.yaml") == 0
    return folder


def commit(run, folder):
    run("git", "add", ".", folder=folder)
    done = run("git", "commit", "--quiet", "--no-verify", "--message", "a change", folder=folder)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def placed(run, compiled, tmp_path):
    """A repository of them, committed."""
    folder = shutil.copytree(compiled, tmp_path / "placed")
    run("git", "init", "--quiet", "--initial-branch=main", folder=folder)
    commit(run, folder)
    return folder


def change(folder, name="a", old="memory: 1GiB}, cpu", new="memory: 2GiB}, cpu"):
    path = folder / "profiles" / f"{name}.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# --- the action


def action():
    return yaml.safe_load((REPOSITORY / "action.yml").read_text())


def step(run, name, folder, tmp_path, **inputs):
    """Run one step as GitHub's runner does, expressions over inputs replaced; gives the process and the summary."""
    [found] = [each for each in action()["runs"]["steps"] if each["name"].startswith(name)]
    values = {key if "." in key else f"inputs.{key}": value for key, value in inputs.items()}
    values["github.action_path"] = str(REPOSITORY)
    given = {
        key: re.sub(r"\$\{\{ (.*?) \}\}", lambda match: values[match[1]], value) for key, value in found["env"].items()
    }
    for file in ("summary", "path"):
        (tmp_path / file).touch()
    script = tmp_path / "step.sh"
    script.write_text(found["run"])
    more = {
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        "GITHUB_PATH": str(tmp_path / "path"),
        "GITHUB_WORKSPACE": str(folder),
        "RUNNER_TEMP": str(tmp_path / "runner"),
    }
    assert found["shell"] == "bash"
    command = ("bash", "--noprofile", "--norc", "-eo", "pipefail", str(script))
    done = run(*command, folder=folder, **given, **more)
    return done, (tmp_path / "summary").read_text()


def test_the_action_and_the_hooks_have_the_shape_that_their_readers_want(tmp_path):
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [checker, "--builtin-schema", "vendor.github-actions", REPOSITORY / "action.yml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    names = [each["name"] for each in action()["runs"]["steps"]]
    assert names == [
        *("Install devmap", "Check the locks", "Show what moved"),
        *("Keep the pictures", "Link the pictures"),
    ]
    used = set(re.findall(r"inputs\.(\w+)", (REPOSITORY / "action.yml").read_text()))
    assert used == set(action()["inputs"])


def test_the_action_passes_with_fresh_locks(run, placed, tmp_path):
    done, _ = step(run, "Check", placed, tmp_path, profiles="profiles")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_action_annotates_stale_locks_and_errors(run, placed, tmp_path):
    change(placed)
    done, _ = step(run, "Check", placed, tmp_path, profiles="profiles")
    assert done.returncode == 3
    [line] = done.stdout.splitlines()
    assert line.startswith("::error file=profiles/a.yaml,line=1,")
    assert "title=stale-lock::" in line
    change(placed, "b", "strategy: single", "strategy: singel")
    done, _ = step(run, "Check", placed, tmp_path, profiles="profiles/a.yaml profiles/b.yaml")
    assert done.returncode == 1
    assert [re.search("title=([a-z-]+)", each)[1] for each in done.stdout.splitlines()] == [
        "stale-lock",
        "unknown-strategy",
    ]
    assert "file=profiles/b.yaml,line=4,endLine=4,col=23" in done.stdout


def test_the_summary_names_new_and_gone_locks(run, placed, tmp_path):
    shutil.copy(placed / "profiles/a.yaml", placed / "profiles/c.yaml")
    run("devmap", "compile", "--vendor", "-q", "profiles/c.yaml", folder=placed)
    for path in (placed / "profiles").glob("b.*"):
        path.unlink()
    commit(run, placed)
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="HEAD~1")
    assert done.returncode == 0, done.stdout
    assert summary == (
        "### `profiles/b.lock.json`\n\nThe lock is gone.\n\n### `profiles/c.lock.json`\n\nThe lock is new.\n\n"
    )


def test_the_summary_is_empty_where_no_lock_changed(run, placed, tmp_path):
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="HEAD")
    assert (done.returncode, done.stdout, summary) == (0, "", "")


def test_a_missing_base_commit_is_a_notice(run, placed, tmp_path):
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="0" * 40)
    assert (done.returncode, summary) == (0, "")
    assert "::notice title=devmap::" in done.stdout


def test_the_summary_shows_what_moved(run, placed, tmp_path):
    change(placed, old="strategy: single", new="strategy: single, device: cpu")
    run("devmap", "compile", "--vendor", "-q", "profiles/a.yaml", folder=placed)
    commit(run, placed)
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="HEAD~1")
    assert done.returncode == 0, done.stdout
    assert summary.startswith("### `profiles/a.lock.json`\n\n")
    assert "| `everything` | cuda:0 | cpu |" in summary.splitlines()
    assert "b.lock.json" not in summary
    drawn = tmp_path / "runner" / "devmap-plans"
    assert sorted(each.name for each in drawn.iterdir()) == ["first.svg", "plans.html"]
    assert ">profiles/a.yaml</h2>" in (drawn / "plans.html").read_text()


def test_the_summary_links_what_is_drawn_where_it_is_kept(run, placed, tmp_path):
    [kept] = [each for each in action()["runs"]["steps"] if each["name"] == "Keep the pictures"]
    assert kept["with"] | {"path": kept["with"]["path"].replace("${{ runner.temp }}", "$RUNNER_TEMP")} == {
        "name": "devmap-plans",
        "path": "$RUNNER_TEMP/devmap-plans",
        "if-no-files-found": "ignore",
        "overwrite": True,
    }
    address = "https://github.com/o/r/actions/runs/1/artifacts/2"
    done, summary = step(run, "Link", placed, tmp_path, **{"steps.pictures.outputs.artifact-url": address})
    assert (done.returncode, done.stdout) == (0, "")
    assert summary == f"[The plans as pages and pictures (`devmap-plans`)](<{address}>)\n"


STRANGE = ["-q né.yaml", "c\n::error::forged\n.yaml", "d|`<img src=x>`\u202e\udce9.yaml"]
"""Names that a pull request may give to profiles."""

MARKUP = re.compile("<(?!/?code>)|[`|]<|^::|forged$", re.MULTILINE)


def copied(folder, name):
    """The files of `a.yaml` under the name of another profile."""
    for suffix in (".yaml", ".lock.json", ".graph.json"):
        shutil.copy(folder / f"profiles/a{suffix}", folder / "profiles" / name.replace(".yaml", suffix))


def test_the_action_works_for_any_file_name(run, placed, tmp_path):
    for name in STRANGE:
        copied(placed, name)
    (placed / "profiles/b.yaml").unlink()
    commit(run, placed)
    done, _ = step(run, "Check", placed, tmp_path, profiles="profiles")
    assert (done.returncode, done.stdout) == (0, "")
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="HEAD~1")
    assert (done.returncode, done.stdout, summary.count("The lock is new.")) == (0, "", 3)
    page = (tmp_path / "runner/devmap-plans/plans.html").read_text()
    assert page.count('class="title"') == 3
    assert "<img" not in page
    change(placed, old="strategy: single", new="strategy: single, device: cpu")
    done, _ = step(run, "Check", placed, tmp_path, profiles="profiles")
    run("devmap", "compile", "--vendor", "-q", "profiles/a.yaml", folder=placed)
    for name in STRANGE:
        copied(placed, name)
    commit(run, placed)
    done, summary = step(run, "Show", placed, tmp_path, profiles="profiles", base="HEAD~1")
    assert (done.returncode, done.stdout, summary.count("| `everything` | cuda:0 | cpu |")) == (0, "", 4)
    assert all(line.isprintable() for line in summary.split("\n"))
    assert not MARKUP.search(summary)
    assert "### `profiles/-q né.lock.json`\n" in summary


def test_actions_are_pinned_and_have_few_permissions():
    """Actions are commits, permissions are stated, and no expression of a stranger's becomes a part of a script."""
    page = (REPOSITORY / "docs" / "ci.md").read_text()
    shown = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)]
    files = sorted((REPOSITORY / ".github" / "workflows").glob("*.y*ml"))
    workflows = [each for each in (*shown, *map(yaml.safe_load, (f.read_text() for f in files))) if "jobs" in each]
    assert workflows
    steps = [each for workflow in workflows for job in workflow["jobs"].values() for each in job["steps"]]
    jobs = [(workflow["permissions"], job) for workflow in workflows for job in workflow["jobs"].values()]
    for permissions, job in jobs:
        may = job.get("permissions", permissions)
        publishes = any("/gh-action-pypi-publish@" in each.get("uses", "") for each in job["steps"])
        assert may == ({"id-token": "write"} if publishes else {"contents": "read"})
    for each in (*steps, *action()["runs"]["steps"]):
        assert re.search("@([0-9a-f]{40}|REVISION)$", each.get("uses", "@REVISION"))
        assert "${{" not in each.get("run", "")
    assert all(
        each["with"]["persist-credentials"] is False for each in steps if "actions/checkout@" in each.get("uses", "")
    )


@pytest.mark.zoo  # needs the package index
def test_the_action_installs_what_a_check_needs_and_no_torch(run, placed, tmp_path):
    done, _ = step(run, "Install", placed, tmp_path, install="check")
    assert done.returncode == 0, done.stdout
    folder = (tmp_path / "path").read_text().strip()
    done = run(f"{folder}/devmap", "check", "profiles", folder=placed, PYTHONPATH="")
    assert done.returncode == 0, done.stdout
    assert run(f"{folder}/python", "-c", "import torch", folder=placed, PYTHONPATH="").returncode == 1


# --- the hooks


@pytest.fixture
def hooked(run, environment, placed, tmp_path):
    """The repository with hooks from this checkout, as a repository of its own; their own keys may be given."""
    if shutil.which("pre-commit", path=environment["PATH"]) is None:
        pytest.skip("pre-commit is not installed")
    source = tmp_path / "devmap-config"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=REPOSITORY).stdout.split():
        if not name.startswith(("profiles/", "tests/", "benchmarks/")) and (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    run("git", "init", "--quiet", folder=source)
    commit(run, source)
    revision = run("git", "rev-parse", "HEAD", folder=source).stdout.strip()

    def hook(**more):
        hooks = [{"id": name, **keys} for name, keys in more.items()]
        config = {"repos": [{"repo": str(source), "rev": revision, "hooks": hooks}]}
        (placed / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
        commit(run, placed)
        done = run("pre-commit", "install", folder=placed)
        assert done.returncode == 0, done.stdout
        return placed

    return hook


def try_to_commit(run, folder):
    run("git", "add", ".", folder=folder)
    return run("git", "commit", "--quiet", "--message", "try", folder=folder)


def test_the_hook_checks_all_profiles_in_the_users_environment(run, hooked):
    folder = hooked(**{"devmap-check": {"language": "system", "additional_dependencies": []}})
    change(folder)
    done = try_to_commit(run, folder)
    assert done.returncode == 1
    assert "error[stale-lock]" in done.stdout
    assert run("devmap", "compile", "--vendor", "-q", "profiles/a.yaml", folder=folder).returncode == 0
    done = try_to_commit(run, folder)
    assert done.returncode == 0, done.stdout


def test_the_hook_compiles_profiles_of_any_name(run, hooked):
    folder = hooked(**{"devmap-compile": {}})
    for name in STRANGE[:2]:  # pre-commit itself takes no name that is not UTF-8
        (folder / "profiles" / name).write_text(PROFILE)
    done = try_to_commit(run, folder)
    assert (done.returncode, done.stdout.count("look at what was written")) == (1, 2), done.stdout
    assert "wrote profiles/c\\n::error::forged\\n.lock.json" in done.stdout
    assert not MARKUP.search(done.stdout)
    assert run("devmap", "check", "profiles", folder=folder).returncode == 0


def test_the_hook_compiles_changed_profiles_and_fails_if_it_writes(run, hooked):
    folder = hooked(**{"devmap-compile": {}})
    (folder / "profiles" / "c.yaml").write_text(PROFILE)
    change(folder)
    untouched = (folder / "profiles" / "b.lock.json").stat().st_mtime_ns
    done = try_to_commit(run, folder)
    assert done.returncode == 1
    assert "wrote profiles/a.lock.json and profiles/a.graph.json\nlook at what was written, and add it" in done.stdout
    assert "wrote profiles/c.lock.json and profiles/c.graph.json\nlook at what was written, and add it" in done.stdout
    assert run("devmap", "check", "profiles", folder=folder).returncode == 0
    assert (folder / "profiles" / "b.lock.json").stat().st_mtime_ns == untouched
    done = try_to_commit(run, folder)
    assert done.returncode == 0, done.stdout
    change(folder, "b", "strategy: single", "strategy: singel")
    done = try_to_commit(run, folder)
    assert done.returncode == 1
    assert "error[unknown-strategy]" in done.stdout


@pytest.mark.zoo  # pre-commit installs from the package index
def test_the_hook_checks_in_an_environment_of_its_own_without_torch(run, hooked):
    folder = hooked(**{"devmap-check": {}})
    done = run("pre-commit", "run", "--all-files", folder=folder, PYTHONPATH="")
    assert done.returncode == 0, done.stdout
    change(folder, "b", "strategy: single", "strategy: singel")
    run("git", "add", ".", folder=folder)
    done = run("git", "commit", "--quiet", "--message", "try", folder=folder, PYTHONPATH="")
    assert done.returncode == 1
    assert "error[unknown-strategy]" in done.stdout
    assert "--> profiles/b.yaml:4:23" in done.stdout
    [python] = Path(folder.parent / "pre-commit").glob("repo*/py_env-*/bin/python")
    assert run(str(python), "-c", "import torch", folder=folder, PYTHONPATH="").returncode == 1


# --- what both install

NOT_FOR_CHECKS = {"torch", "transformers", "accelerate", "huggingface-hub", "safetensors"}


def test_the_list_without_torch_holds_all_that_a_check_needs_and_is_pinned_as_the_tests_are():
    wanted: dict[str, None] = {}

    def add(requirement):
        name = requirement.name.lower().replace("_", "-")
        if name in wanted or name in NOT_FOR_CHECKS or (requirement.marker and not requirement.marker.evaluate()):
            return
        wanted[name] = None
        for text in requires(name) or ():
            try:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": ""}):
                    add(further)
            except PackageNotFoundError:
                continue

    toml = (REPOSITORY / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", toml, re.MULTILINE | re.DOTALL)[1]
    for text in re.findall(r'"([^"]+)"', listed):
        add(Requirement(text))
    here, constrained = pins_of("requirements-without-torch.txt"), pins_of("constraints.txt")
    assert set(wanted) <= set(here)
    pins = {name: pin for name, pin in constrained.items() if name in wanted}
    assert pins
    assert here | pins == here
    installed = {name: f"=={version(name)}" for name in wanted}
    if installed | pins == installed:  # other versions may need less, and bring others
        assert here == installed


def pins_of(file):
    lines = (REPOSITORY / file).read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: str(each.specifier) for each in pinned if each.marker is None or each.marker.evaluate()}
