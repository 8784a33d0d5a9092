"""The page of each diagnostic's code, as it stands under `docs/codes/`."""

from __future__ import annotations

from importlib import resources

PACKAGE = "devmap_config.codes"
"""`docs/codes/` is installed under this name."""


def codes() -> list[str]:
    """Every code that has a page."""
    files = resources.files(PACKAGE).iterdir()
    return sorted(file.name.removesuffix(".md") for file in files if file.name.endswith(".md"))


def page(code: str) -> str:
    """The page of a code, in Markdown."""
    return resources.files(PACKAGE).joinpath(f"{code}.md").read_text(encoding="utf-8")
