"""`Export`: the files for one program, and checks that it can express a plan."""

from __future__ import annotations

import json
import os.path
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic, Sink
from devmap_config.files import exists, real_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.compiler import Compiled
    from devmap_config.diagnostics.diagnostic import Span


@dataclass(frozen=True, kw_only=True)
class Export:
    """The text of each file by name; `notes` are sentences about differences from the plan."""

    files: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


class UnfitExportError(DevmapError):
    """The program that a plan is exported to cannot express it."""

    def __init__(self, diagnostics: Iterable[Diagnostic], texts: Mapping[str, str]) -> None:
        findings = tuple(diagnostics)
        super().__init__("; ".join(finding.message for finding in findings if finding.is_error), findings, texts)


def require_no_errors(sink: Sink, compiled: Compiled) -> None:
    """Raise the findings if any of them is an error.

    Raises:
        UnfitExportError: with all findings.
    """
    if sink.has_errors:
        raise UnfitExportError(sink.diagnostics, compiled.texts)


def require_text(made: Export, compiled: Compiled) -> None:
    """Raise if a file contains a path that is not UTF-8, or a null character, which shells do not support.

    Raises:
        UnfitExportError: at the model, whose path or name is the cause.
    """
    sink = Sink()
    for name, text in made.files.items():
        if odd := re.search("[\ud800-\udfff]|\0", text):
            what = "holds a zero" if odd[0] == "\0" else "is not UTF-8"
            sink.error(
                "unfit-export",
                f"the path or the name of the model {what}, and `{name}` would hold it",
                compiled.loaded.profile.model.source.span,
                help="rename it, or pass `--model` with a path that is UTF-8, of the machine that is to run it",
            )
            break
    require_no_errors(sink, compiled)


def check_model_alone(compiled: Compiled, program: str, sink: Sink) -> None:
    """Report an adapter, a draft model, or code that comes with the model, which no export supports."""
    model, cannot = compiled.loaded.profile.model, "is not exported"
    if model.adapter is not None:
        help = "merge it into the checkpoint, or load the profile with `devmap run` or `load_model`"
        sink.error("unfit-export", f"an adapter {cannot} to {program}", model.adapter.key_span, help=help)
    if model.assistant is not None:
        help = "leave it out, or load the profile with `devmap run` or `load_model`"
        sink.error("unfit-export", f"a draft model {cannot} to {program}", model.assistant.key_span, help=help)


def weights_for(compiled: Compiled, program: str, sink: Sink) -> str | None:
    """Return the folder or hub id of the weights; if there is only a config, report that and return `None`."""
    source = compiled.model.source
    if source.weights is None:
        named = compiled.loaded.profile.model.source
        sink.error(
            "no-weights",
            f"there is only a config at `{named.value}`, and {program} needs to be told where the weights are",
            named.span,
            help="pass `--model` with a folder or a hub id, of the machine that is to run it",
        )
    return source.weights


def from_folder(path: str | Path, folder: Path) -> str:
    """Return the path of a file relative to a folder, with `/` on every system."""
    return Path(os.path.relpath(real_path(Path(path)), real_path(folder))).as_posix()


def is_local(weights: str) -> bool:
    """Return whether weights are in a local folder, rather than on the hub."""
    return exists(Path(weights))


def span_of(compiled: Compiled, units: Iterable[str]) -> Span:
    """Return the place of the rule that placed these units, or of the strategy if none did."""
    tensors = {assignment.unit: assignment.tensors for assignment in compiled.plan.assignments}
    decisions = compiled.resolution.decisions
    rules = (decisions[name].rule for unit in units for name in tensors[unit] if name in decisions)
    return next((rule.span for rule in rules), compiled.loaded.profile.placement.strategy.span)


def as_json(value: object) -> str:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"
