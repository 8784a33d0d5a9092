"""Reads a profile with every file that it extends, and merges them into one document."""

from __future__ import annotations

import itertools
import os.path
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Sink, Span
from devmap_config.files import PROFILE, FileError, decoded, read_bytes, require_regular
from devmap_config.profile.device_names import DeviceNameError, expand_devices, is_range, kind_of
from devmap_config.profile.document import (
    Entry,
    MappingNode,
    Node,
    ScalarNode,
    SequenceNode,
    is_null,
    parse_document,
    plain_value,
    report_duplicate,
    whole_file,
)
from devmap_config.profile.field_types import unsupported_version

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.files import Boundary

MAX_FILES = 100

APPENDED = (("placement", "pins"),)
"""Lists that grow instead of being replaced."""


RENAME = (
    "leave out `.j2`: templates stand in values and in names, and where a loop wrote devices, a range such as"
    ' `"cuda:[0-{{ count - 1 }}]"` names them'
)


@dataclass
class Reader:
    """Reads files for one profile: each once, none in a cycle, none from outside.

    `is_incomplete` says that some could not be read: what seems to be missing may stand there.
    """

    boundary: Boundary
    sink: Sink
    files_read: int = 0
    is_incomplete: bool = False

    def read(self, shown: str, trail: tuple[Path, ...] = ()) -> list[MappingNode]:
        """The documents of a file and of those it extends, in the order in which they are merged."""
        path = Path(shown)
        text = self.text_of(path, shown)
        document = None if text is None else parse_document(text, shown, self.sink)
        if document is None:
            self.is_incomplete = True
            return []
        if trail:
            self.check_version(document)
        bases = [self.read_base(base, path, (*trail, path.resolve())) for base in base_files(document)]
        self.is_incomplete |= not all(bases)
        return [*itertools.chain.from_iterable(bases), document]

    def check_version(self, document: MappingNode) -> None:
        """A base file may leave its version out, but not be of another one."""
        version = document.get("version")
        if isinstance(version, ScalarNode) and not is_null(version) and version.text != "1":
            message, help = unsupported_version(version.text)
            self.sink.error("unsupported-version", message, version.span, help=help)

    def read_base(self, base: ScalarNode, extending: Path, trail: tuple[Path, ...]) -> list[MappingNode]:
        """The documents of a file that another extends; a file that must not be read is reported."""
        path = Path(os.path.normpath(extending.parent / base.text))
        if problem := self.problem_of(base.text, path, trail):
            code, message, help = problem
            self.sink.error(code, message, base.span, help=help)
            return []
        self.files_read += 1
        self.sink.origins.setdefault(path.as_posix(), base.span)
        return self.read(path.as_posix(), trail)

    def problem_of(self, base: str, path: Path, trail: tuple[Path, ...]) -> tuple[ErrorCode, str, str] | None:
        """Why a file must not be read that another extends: code, message and help."""
        if not self.boundary.holds(path):
            help = "keep what a profile extends within its repository, or pass `--allow-outside`"
            return "outside-repository", f"`{base}` lies outside of the repository", help
        try:
            require_regular(path)
        except FileError as error:
            moved_to = _moved_to(path) if error.is_absent else ""
            help = f"paths are relative to the file that writes them: `{path.as_posix()}` was looked for{moved_to}"
            return error.code, f"`{base}` {error}", help
        if path.resolve() in trail:
            names = [*(step.name for step in trail[trail.index(path.resolve()) :]), path.name]
            message = f"the profile extends itself: {' → '.join(names)}"
            return "extends-cycle", message, "remove one of these `extends`"
        if self.files_read >= MAX_FILES:
            return "too-large", f"the profile extends more than {MAX_FILES} files", "extend fewer files"
        return None

    def text_of(self, path: Path, shown: str) -> str | None:
        """A file's text, kept for those who show what is wrong in it."""
        try:
            data = read_bytes(path, PROFILE, self.boundary)
            self.sink.texts[shown] = data.decode("utf-8", errors="replace")
            if path.suffix != ".j2":
                return decoded(data)
            message = f"`{shown}` is a template of a whole file, and those are not read"
            self.sink.error("template-error", message, whole_file(shown), help=RENAME)
        except FileError as error:
            place = Span.within_line(shown, error.line, error.column)
            self.sink.error(error.code, f"`{shown}` {error}", place, help=error.help)
        return None


def base_files(document: MappingNode) -> tuple[ScalarNode, ...]:
    """The files that `extends` names; what is not text there is left to the schema."""
    extends = document.get("extends")
    nodes = extends.items if isinstance(extends, SequenceNode) else (extends,)
    return tuple(node for node in nodes if isinstance(node, ScalarNode) and not is_null(node))


def variables_of(documents: list[MappingNode]) -> MappingNode:
    """The `variables` of all documents, with the place of that key; of the last file where there is none."""
    merged = _merged([document.only(lambda key: key == "variables") for document in documents])
    for entry in merged.entries:
        if isinstance(entry.value, MappingNode):
            return replace(entry.value, span=entry.key.span)
    return merged.only(lambda _: False)


def variable_values(variables: MappingNode, overrides: Mapping[str, str]) -> dict[str, object]:
    """The variables by name; overrides are read as if they had been written there."""
    values: dict[str, object] = {entry.key.text: _plain(entry.value) for entry in variables.entries}
    return values | {name: plain_value(text) for name, text in overrides.items()}


def _plain(node: Node) -> object:
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, SequenceNode):
        return [_plain(item) for item in node.items]
    return {entry.key.text: _plain(entry.value) for entry in node.entries}


def merge(documents: list[MappingNode], sink: Sink) -> MappingNode:
    """One document: mappings merge, lists replace, pins append, `null` removes, `x-` keys vanish.

    Device names are made canonical and ranges expanded first, so that `cuda:[0-1]` and `cuda:0` meet.
    """
    expand = partial(_expand, kind=_accelerator_kind(documents), sink=sink)
    documents = [change_mapping(document, ("placement", "max_memory"), expand) for document in documents]
    documents = [
        change_mapping(document, ("hardware", "devices"), lambda mapping: _described(expand(mapping)))
        for document in documents
    ]
    return _merged(documents)


def _merged(documents: list[MappingNode]) -> MappingNode:
    merged = MappingNode((), whole_file(documents[-1].span.file))
    for document in documents:
        own = document.only(lambda key: not key.startswith("x-"))
        merged = replace(_merge_mappings(merged, own, ()), span=merged.span)
    return merged


def _merge_mappings(base: MappingNode, over: MappingNode, route: tuple[str, ...]) -> MappingNode:
    # A `null` stays, and is looked at once more: its key may be misspelt.
    entries = {entry.key.text: entry for entry in base.entries}
    for entry in over.entries:
        name = entry.key.text
        value = _merge_values(entries[name].value, entry.value, (*route, name)) if name in entries else entry.value
        entries[name] = Entry(entry.key, value)
    return MappingNode(tuple(entries.values()), over.span)


def _merge_values(inherited: Node, own: Node, route: tuple[str, ...]) -> Node:
    if isinstance(inherited, MappingNode) and isinstance(own, MappingNode):
        return _merge_mappings(inherited, own, route)
    if route in APPENDED and isinstance(inherited, SequenceNode) and isinstance(own, SequenceNode):
        return SequenceNode(inherited.items + own.items, own.span)
    return own


def change_mapping(
    document: MappingNode, route: tuple[str, ...], change: Callable[[MappingNode], MappingNode]
) -> MappingNode:
    """Return a document with the mapping at a route changed, where there is one."""
    if not route:
        return change(document)
    entries = (
        replace(entry, value=change_mapping(entry.value, route[1:], change))
        if entry.key.text == route[0] and isinstance(entry.value, MappingNode)
        else entry
        for entry in document.entries
    )
    return replace(document, entries=tuple(entries))


def _accelerator_kind(documents: list[MappingNode]) -> str:
    """The kind of the accelerators that a profile lists: that of the first one named with it, else `cuda`."""
    for document in documents:
        hardware = document.get("hardware")
        devices = hardware.get("devices") if isinstance(hardware, MappingNode) else None
        for entry in devices.entries if isinstance(devices, MappingNode) else ():
            if kind := kind_of(entry.key.text):
                return kind
    return "cuda"


def _expand(mapping: MappingNode, kind: str, sink: Sink) -> MappingNode:
    """One entry a device; what names a device by itself beats a range that holds it, whatever their order."""
    entries: dict[str, Entry] = {}
    written: dict[str, ScalarNode] = {}
    for entry in sorted(mapping.entries, key=lambda entry: not is_range(entry.key.text)):
        names = _names(entry.key, kind, sink)
        alike = [name for name in names if name in written and is_range(written[name].text) == is_range(entry.key.text)]
        if alike:
            report_duplicate(alike[0], entry.key, written[alike[0]], sink)
        for name in names:
            written[name] = entry.key
            entries[name] = Entry(replace(entry.key, text=name, is_verbatim=False), entry.value)
    return replace(mapping, entries=tuple(entries.values()))


def _names(key: ScalarNode, kind: str, sink: Sink) -> tuple[str, ...]:
    if key.is_unrendered:
        return (key.text,)
    try:
        return tuple(map(str, expand_devices(key.text, kind)))
    except DeviceNameError as error:
        sink.error("bad-device-name", error.message, key.span, help=error.help)
        return ()


def _described(devices: MappingNode) -> MappingNode:
    """Bare catalogue names as the mappings that they stand for, so that files can add to them."""
    entries: list[Entry] = []
    for entry in devices.entries:
        value = entry.value
        if isinstance(value, ScalarNode) and not is_null(value):
            value = MappingNode((Entry(ScalarNode("accelerator", value.span), value),), value.span)
        entries.append(Entry(entry.key, value))
    return replace(devices, entries=tuple(entries))


def _moved_to(path: Path) -> str:
    """Where a file of that name lies nearby: it may have moved."""
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    if not folder.is_dir():
        return ""
    found = sorted(candidate for candidate in (*folder.glob(path.name), *folder.glob(f"*/{path.name}")))
    return f"; a file of that name is at `{found[0]}`" if found else ""
