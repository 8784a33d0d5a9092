"""The page of each diagnostic's code, as it stands under `docs/codes/`."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

from devmap_config.files import ANYWHERE, PACKAGED, read_text

CHECKOUT = Path(__file__).parents[2] / "docs" / "codes"


def codes() -> list[str]:
    """Every code that has a page."""
    return sorted(_pages())


def page(code: str) -> str:
    """The page of a code, in Markdown."""
    return read_text(_pages()[code], PACKAGED, ANYWHERE)


def _pages() -> dict[str, Path]:
    """The pages by code: of this checkout, else those that were installed (`share/devmap-config/codes`)."""
    if CHECKOUT.is_dir():
        return {path.stem: path for path in CHECKOUT.glob("*.md")}
    installed = (Path(str(file.locate())) for file in files("devmap-config") or ())
    return {path.stem: path.resolve() for path in installed if path.suffix == ".md" and path.parent.name == "codes"}
