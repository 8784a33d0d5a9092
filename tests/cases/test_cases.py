"""Every YAML block of the Markdown files here and of the pages of codes is compiled as a profile, with the stated
findings.

A block is a whole profile, or a part of one: what it leaves out of `version`, `model` and `hardware` is added below
it. Each wrong line states its finding as a comment: `# error[code] column`, several separated by commas. A block
without findings compiles. Blocks under one heading are files of one case: `yaml name.yaml` names another file
than the profile, `yaml bare` adds nothing, `yaml simulated` has the plan dry-run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from devmap_config.compiler import Rejected, Request, run_pipeline

HERE = Path(__file__).parent
PAGES = HERE.parent.parent / "docs" / "codes"

BLOCK = re.compile(r"^```yaml([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANNOTATION = re.compile(r" *# ((?:error|warning)\[[a-z0-9-]+\] \d+(?:, (?:error|warning)\[[a-z0-9-]+\] \d+)*)$")
FINDING = re.compile(r"(error|warning)\[([a-z0-9-]+)\] (\d+)")

DEFAULTS = {
    "version": "version: 1",
    "model": "model: {source: llama}",
    "hardware": "hardware: {devices: {cuda:0: {memory: 1GiB}, cuda:1: {memory: 1GiB}, cpu: {memory: 1GiB}}}",
}


def cases():
    for file in [*sorted(HERE.glob("*.md")), *sorted(PAGES.glob("*.md"))]:
        for section in re.split(r"^(?=#+ )", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            blocks = BLOCK.findall(section)
            heading = section.splitlines()[0].lstrip("# ") if section else ""
            if any(not _name(info) for info, _ in blocks):
                yield pytest.param(blocks, id=f"{file.stem}: {heading}")


def _name(info):
    return next((word for word in info.split() if word not in ("bare", "simulated")), None)


def read(text):
    """Return a block's text without annotations, and the findings that these state."""
    lines, expected = [], set()
    for number, line in enumerate(text.split("\n"), start=1):
        if found := ANNOTATION.search(line):
            expected |= {(number, *each) for each in FINDING.findall(found.group(1))}
            line = line[: found.start()]  # noqa: PLW2901 - what is parsed is the line without it
        lines.append(line)
    return "\n".join(lines), expected


def with_defaults(text):
    missing = [line for key, line in DEFAULTS.items() if not re.search(rf"^{key}:", text, re.MULTILINE)]
    return "\n".join([text.rstrip("\n"), *missing, ""])


@pytest.mark.parametrize("blocks", list(cases()))
def test_a_case_has_the_stated_findings(blocks, workspace):
    expected = set()
    profile = "profile.yaml"
    for info, text in blocks:
        body, findings = read(text)
        name = _name(info)
        if name is None or name.startswith("profile."):
            profile = name or profile
            name = profile
            body = body if "bare" in info or "extends:" in body else with_defaults(body)
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")
        expected |= {(name, *finding) for finding in findings}
    simulates = any("simulated" in info for info, _ in blocks)
    compilation = run_pipeline(Request(path=Path(profile), simulates=simulates))
    found = {
        (each.span.file, each.span.line, each.severity, each.code, str(each.span.column))
        for each in compilation.diagnostics
    }
    assert found == expected, "\n".join(f"{each.span} {each.message}" for each in compilation.diagnostics)
    assert isinstance(compilation, Rejected) == any(severity == "error" for _, _, severity, _, _ in expected)
    for each in compilation.diagnostics:
        assert not each.message[0].isupper(), each.message
        assert not each.message.endswith("."), each.message
    assert [each.code for each in compilation.diagnostics if each.severity == "error" and not each.help] == []
