"""The documentation's links resolve, all its pages are in the site, and few commands need a GPU or a hub."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import REPOSITORY
from pages import Command, blocks, name_of, pages

LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]+)?\)")
CODE = re.compile(r"```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
GENERATED = ("docs/reference/",)
"""What `docs/hooks.py` writes while the site is built."""


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", CODE.sub(lambda block: block[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*pages(), *REPOSITORY.glob("[A-Z]*.md")], ids=name_of)
def test_links_resolve(page):
    lost = []
    for link in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        target = (page.parent / link["target"]).resolve() if link["target"] else page
        if target.is_relative_to(REPOSITORY) and name_of(target).startswith(GENERATED):
            continue
        if not target.exists() or (link["anchor"] and link["anchor"][1:] not in anchors(target)):
            lost.append(link[0])
    assert lost == []


def test_at_most_a_fifth_of_the_commands_needs_a_gpu_or_a_hub():
    commands = [block for page in pages() for block in blocks(page) if isinstance(block, Command)]
    needy = [command.line for command in commands if command.needs]
    assert len(commands) > 50
    assert len(needy) <= len(commands) / 5, needy


def test_needs_marks_of_commands_are_known():
    marks = re.findall(r"#\s*needs\b.*", "".join(page.read_text(encoding="utf-8") for page in pages()))
    assert marks
    assert [mark for mark in marks if not re.match(r"# needs: (gpu|hub)\b", mark)] == []


class _Loader(yaml.SafeLoader):
    """A loader of mkdocs.yml, whose `!!python/name:` tags name functions."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def test_every_page_is_in_the_site():
    navigation = yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"]  # noqa: S506
    listed = set(re.findall(r"[\w./-]+\.md", str(navigation)))
    there = {name_of(page).removeprefix("docs/") for page in pages()[1:]}
    assert there - listed == set()
    assert {name for name in listed - there if not f"docs/{name}".startswith((*GENERATED, "docs/codes/"))} == set()
