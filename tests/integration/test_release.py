"""The release workflow: its steps run in bash, its actions are pinned, and versions and names agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY

from devmap_config.diagnostics.codes import CODES, PAGES

WORKFLOW = REPOSITORY / ".github" / "workflows" / "release.yml"
VERSION = re.search(r'^version = "(.*)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)[1]
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff")


@pytest.fixture
def checkout(tmp_path):
    for name in FILES:
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def run(name, folder, **environment):
    """Run a step as GitHub's runner does."""
    steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"]
    [step] = [step for step in steps if step.get("name", "").startswith(name)]
    assert set(step.get("env", {})) == set(environment)
    script = folder / "step.sh"
    script.write_text(step["run"])
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_release_needs_the_tag_of_the_version(checkout):
    assert run("Hold the tag", checkout, TAG=f"v{VERSION}").returncode == 0
    done = run("Hold the tag", checkout, TAG="v0.0.1")
    assert (done.returncode, f"the tag is v0.0.1, and pyproject.toml says {VERSION}" in done.stdout) == (1, True)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff"])
def test_a_version_missing_from_changelog_or_citation_is_not_released(checkout, name):
    text = (checkout / name).read_text()
    (checkout / name).write_text(text.replace(VERSION, "9.9.9"))
    done = run("Hold the tag", checkout, TAG=f"v{VERSION}")
    assert (done.returncode, name in done.stdout) == (1, True)


def test_a_release_fills_in_the_name_of_the_repository(checkout):
    assert run("Name the repository", checkout, REPOSITORY="someone/devmap-config").returncode == 0
    assert [name for name in FILES if "OWNER" in (checkout / name).read_text().replace("for OWNER", "")] == []
    assert "https://github.com/someone/devmap-config/issues" in (checkout / "pyproject.toml").read_text()
    assert run("Name the repository", checkout, REPOSITORY="some|e/one").returncode == 1


def test_actions_are_pinned_and_expressions_stay_out_of_scripts():
    text = WORKFLOW.read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert len(used) == 5
    assert [action for action in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)] == []
    scripts = [step.get("run", "") for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
    assert [script for script in scripts if "${{" in script] == []
    [target] = re.findall(r"^make ([\w-]+)", "\n".join(scripts), re.MULTILINE)
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_the_pages_of_codes_are_part_of_the_package():
    assert {path.stem for path in PAGES.glob("*.md")} == set(CODES)
    assert "diagnostics/pages/*.md" in (REPOSITORY / "pyproject.toml").read_text()
    assert Path(os.path.realpath(PAGES)) == REPOSITORY / "docs" / "codes"
