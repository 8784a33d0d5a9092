"""Writes new profiles, for `devmap init` and `devmap adopt`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devmap_config.files import boundary_of, exists, is_file, is_folder
from devmap_config.wording import is_unicode, visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.compiler import Compilation
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink
    from devmap_config.profile.permissions import Permissions
    from devmap_config.profile.schema import DeviceSection

SCHEMA = Path("schemas", "profile.v1.schema.json")
"""The path of the schema of profiles from the root of the repository; `devmap schema profile` prints it."""


@dataclass(frozen=True, kw_only=True)
class NewProfile:
    """A profile to write; `hardware` and `placement` are the lines within these keys."""

    title: str
    output: Path | None
    source: str
    class_name: str | None = None
    dtype: str | None = None
    context_length: int | None = None
    hardware: Sequence[str]
    placement: Sequence[str]

    @property
    def text(self) -> str:
        """The profile in YAML."""
        from devmap_config.profile.writing import yaml_text

        model = {"source": yaml_text(relative_source(self.source, self.output)), "class": self.class_name}
        model |= {"dtype": self.dtype}
        lines = [
            f"# yaml-language-server: $schema={schema_beside(self.output)}",
            f"# {visible(self.title)}",
            "version: 1",
            "",
            "model:",
            *(f"  {key}: {value}" for key, value in model.items() if value),
        ]
        if self.context_length is not None:
            lines += [
                "",
                "workload:   # what must fit besides the weights",
                f"  context_length: {self.context_length}   # tokens of prompt and answer together",
            ]
        lines += ["", "hardware:", *_indented(self.hardware), "", "placement:", *_indented(self.placement)]
        return "\n".join(lines) + "\n"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def device_lines(devices: Mapping[Device, DeviceSection], remark: str = "", *, is_comment: bool = False) -> list[str]:
    """Return the lines of `hardware.devices`, with equal accelerators in one line.

    Args:
        devices: their descriptions.
        remark: the comment on each.
        is_comment: whether the lines are commented out, for a user to put in.
    """
    from devmap_config.profile.writing import device_text, yaml_text
    from devmap_config.rules.folding import ranges

    alike: dict[tuple[str, str], list[int]] = {}
    for device, section in devices.items():
        alike.setdefault((device.kind, device_text(section)), []).extend([] if device.index is None else [device.index])
    lines = (
        f"{yaml_text(f'{kind}:{ranges(sorted(indices), with_steps=False)}' if indices else kind)}: {text}"
        for (kind, text), indices in alike.items()
    )
    return [f"  {'# ' if is_comment else ''}{line}{f'   # {remark}' if remark else ''}" for line in lines]


def schema_beside(output: Path | None) -> str:
    """Return the path of the schema of profiles, relative to a profile's folder."""
    folder = (output or Path("profile.yaml")).parent
    root = boundary_of(folder / "profile.yaml").folder or folder
    return Path(os.path.relpath(root / SCHEMA, folder.resolve())).as_posix()


def relative_source(source: str, output: Path | None) -> str:
    """Return a source as the profile should name it: local paths are relative to the profile.

    Raises:
        click.UsageError: if the path is not UTF-8, which profiles are.
    """
    if not is_unicode(source):
        raise click.UsageError(f"`{source}` is not UTF-8, as profiles are: give it another name")
    if not source or not exists(Path(source)):
        return source
    relative = os.path.relpath(source, output.parent if output else ".")
    return relative if "/" in relative or relative.endswith(".json") else f"./{relative}"


def require_new(path: Path | None, *, force: bool) -> None:
    """Refuse to overwrite an existing file, or to write into a missing folder; `None` is stdout.

    Raises:
        click.UsageError: with the reason.
    """
    if path is None:
        return
    if not is_folder(path.parent):
        raise click.UsageError(f"the folder `{path.parent}` does not exist")
    if is_folder(path):
        raise click.UsageError(f"`{path}` is a folder")
    if exists(path) and not is_file(path):  # a file would replace a device or a pipe
        raise click.UsageError(f"`{path}` is not a regular file")
    if exists(path) and not force:
        raise click.UsageError(f"`{path}` exists: pass `--force` to replace it")


def compile_draft(draft: NewProfile, permissions: Permissions, *, simulates: bool) -> Compilation:
    """Compile a profile as if it were at the path that it will be written to.

    Raises:
        click.ClickException: if nothing can be written there.
    """
    from devmap_config.cli.locking import write
    from devmap_config.compiler import Request, run_pipeline

    file = (draft.output or Path("profile")).with_name(f".draft-{os.getpid()}.yaml")
    write(file, draft.text)
    try:
        return run_pipeline(Request(path=file, permissions=permissions, simulates=simulates, advises=False))
    finally:
        file.unlink(missing_ok=True)


def deliver(
    text: str, path: Path | None, output_format: str, findings: Sink | None = None, next_step: str = ""
) -> None:
    """Write a profile, or print it if there is no path, and report the findings about it."""
    from devmap_config.cli.locking import write
    from devmap_config.cli.reporting import echo, echo_lines, report

    if path is not None:
        write(path, text)
    texts = {} if findings is None else findings.texts
    report(findings or (), texts, output_format, data={"profile": text, "written": None if path is None else str(path)})
    if path is not None:
        echo(f"wrote {path}{next_step}", err=True)
    elif output_format == "table":
        echo_lines(text)
