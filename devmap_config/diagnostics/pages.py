"""The page of each diagnostic's code, as it stands under `docs/codes/`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PACKAGE = "devmap_config.codes"
"""`docs/codes/` is installed under this name."""


def codes() -> list[str]:
    """Every code that has a page."""
    return sorted(path.stem for path in _folder().glob("*.md"))


def page(code: str) -> str:
    """The page of a code, in Markdown."""
    return (_folder() / f"{code}.md").read_text(encoding="utf-8")


def _folder() -> Path:
    checkout = Path(__file__).parents[2] / "docs" / "codes"
    return checkout if checkout.is_dir() else Path(str(resources.files(PACKAGE)))
