"""What the site has besides the pages: reference that is generated, and links that lead out of `docs`.

mkdocs calls `on_files` and `on_page_markdown` by their names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mkdocs.structure.files import File, Files

import devmap_config
from devmap_config.cli import devmap
from devmap_config.diagnostics.codes import CODES, severities, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = "https://github.com/OWNER/devmap-config/blob/main/"
LINK = re.compile(r"\]\((?P<target>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "reference/cli.md": "\n".join(_commands()),
        "reference/codes.md": "\n".join(_codes()),
        "reference/profile.md": "\n".join(_schema("profile")),
        "reference/lock.md": "\n".join(_schema("lock")),
        "reference/python.md": "\n".join(_python()),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links to files outside of `docs` lead to the repository."""
    folder = (Path(config["docs_dir"]) / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match["target"]).resolve()
        if target.is_relative_to(config["docs_dir"]):
            return match[0]
        return f"]({SOURCE}{target.relative_to(REPOSITORY).as_posix()}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)


def _commands() -> Iterator[str]:
    """Each command with its help, as click prints it."""
    yield "# Options of the commands\n\nAs `--help` prints them. [Commands](../commands.md) says more of each.\n"
    for name, command in devmap.commands.items():
        context = click.Context(command, info_name=f"devmap {name}", terminal_width=100, max_content_width=100)
        yield f"## devmap {name}\n\n```text\n{command.get_help(context)}\n```\n"


def _codes() -> Iterator[str]:
    """Each diagnostic in a row."""
    yield "# Diagnostics\n\nEvery finding has a code. `devmap explain CODE` prints its page.\n"
    yield "| code | is | means |\n|---|---|---|"
    for code in CODES:
        means = re.sub(r"\]\([^)]*\)", "]", summary(code)).replace("|", "\\|")
        yield f"| [{code}](../codes/{code}.md) | {' or '.join(severities(code))} | {means} |"


def _schema(name: str) -> Iterator[str]:
    """The keys of a schema, a table for each mapping."""
    path = f"schemas/{name}.v1.schema.json"
    schema = json.loads((REPOSITORY / path).read_text(encoding="utf-8"))
    yield f"# The {name}\n\nGenerated from [`{path}`](../../{path}), which editors use for completion.\n"
    yield from _mapping(schema, schema.get("title", name), 2)
    for title, definition in schema.get("definitions", {}).items():
        if definition.get("properties"):
            yield from _mapping(definition, title, 2)


def _mapping(schema: dict[str, Any], title: str, level: int) -> Iterator[str]:
    yield f"\n{'#' * level} {title}\n\n{schema.get('description', '')}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    required = schema.get("required", ())
    for key, value in schema.get("properties", {}).items():
        default = "required" if key in required else f"`{json.dumps(value['default'])}`" if "default" in value else ""
        meaning = " ".join(value.get("description", "").split())
        yield f"| `{key}` | {_cell(_type(value))} | {_cell(default)} | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(value: dict[str, Any]) -> str:
    """A schema's type in words."""
    if "$ref" in value:
        return value["$ref"].rpartition("/")[2]
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    choices = value.get("anyOf") or value.get("oneOf") or value.get("allOf")
    if choices:
        return " or ".join(dict.fromkeys(filter(None, map(_type, choices))))
    kind = value.get("type", "")
    if kind == "array":
        return f"list of {_type(value.get('items', {})) or 'values'}"
    return "mapping" if kind == "object" else kind if isinstance(kind, str) else " or ".join(kind)


def _python() -> Iterator[str]:
    """Every public name, by its docstring."""
    yield "# Python names\n\n[Python](../python.md) shows how they are used.\n"
    for name in sorted(devmap_config.__all__, key=lambda name: (name[0].isupper(), name)):
        yield f"::: {devmap_config._HOMES[name]}.{name}\n"
