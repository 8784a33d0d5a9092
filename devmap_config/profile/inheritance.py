"""Reads a profile with every file that it extends, and merges them into one document."""

from __future__ import annotations

import os.path
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Sink, Span
from devmap_config.files import PROFILE, FileError, decoded, read_bytes, require_regular
from devmap_config.profile.devices import DeviceNameError, expand_devices, is_range, kind_of
from devmap_config.profile.document import (
    Entry,
    MappingNode,
    Node,
    ScalarNode,
    SequenceNode,
    parse_document,
    report_duplicate,
    whole_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devmap_config.files import Boundary

MAX_FILES = 100

APPENDED = (("placement", "pins"),)
"""Lists that grow instead of being replaced."""


@dataclass
class Reader:
    """Reads files for one profile: each once, none in a cycle, none from outside.

    `is_incomplete` says that some could not be read:
    what seems to be missing may stand there.
    """

    boundary: Boundary
    sink: Sink
    files_read: int = 0
    is_incomplete: bool = False

    def read(self, shown: str, trail: tuple[Path, ...] = ()) -> list[MappingNode]:
        """The documents of a file and of those it extends, in the order in which they are merged."""
        path = Path(shown)
        text = self.text_of(path, shown)
        document = None if text is None or self.is_template_file(shown) else parse_document(text, shown, self.sink)
        if document is None:
            self.is_incomplete = True
            return []
        if trail:
            self.check_version(document)
        documents: list[MappingNode] = []
        for base in base_files(document):
            found = self.read_base(base, path, (*trail, path.resolve()))
            self.is_incomplete |= not found
            documents += found
        return [*documents, document]

    def is_template_file(self, shown: str) -> bool:
        """Report a file that is named as a template of a whole file, such as `x.yaml.j2`."""
        if shown.endswith(".j2"):
            self.sink.error(
                "template-error",
                f"`{shown}` is a template of a whole file, and those are not read",
                whole_file(shown),
                help=f"name it `{PurePosixPath(shown).stem}`: templates stand in values and in names, and where a loop"
                ' wrote devices, a range such as `"cuda:[0-{{ count - 1 }}]"` names them',
            )
        return shown.endswith(".j2")

    def check_version(self, document: MappingNode) -> None:
        """A base file may leave its version out, but not be of another one."""
        version = document.get("version")
        if isinstance(version, ScalarNode) and version.value is not None and version.text != "1":
            self.sink.error(
                "unsupported-version",
                f"version {version.text} of the profile language is not known",
                version.span,
                help="this devmap-config reads `version: 1`; a newer one may read more",
            )

    def read_base(self, base: ScalarNode, extending: Path, trail: tuple[Path, ...]) -> list[MappingNode]:
        """The documents of a file that another extends; a file that must not be read is reported."""
        shown = str(PurePosixPath(*_normal(extending.parent / base.text).parts))
        path = Path(shown)
        if not self.boundary.holds(path):
            self.sink.error(
                "outside-repository",
                f"`{base.text}` lies outside of the repository",
                base.span,
                help="keep what a profile extends within its repository, or pass `--allow-outside`",
            )
            return []
        try:
            require_regular(path)
        except FileError as error:
            moved_to = _moved_to(path) if error.is_absent else ""
            help = f"paths are relative to the file that writes them: `{shown}` was looked for{moved_to}"
            self.sink.error(error.code, f"`{base.text}` {error}", base.span, help=help)
            return []
        if path.resolve() in trail:
            names = [*(step.name for step in trail[trail.index(path.resolve()) :]), path.name]
            self.sink.error(
                "extends-cycle",
                f"the profile extends itself: {' → '.join(names)}",
                base.span,
                help="remove one of these `extends`",
            )
            return []
        self.files_read += 1
        if self.files_read > MAX_FILES:
            message = f"the profile extends more than {MAX_FILES} files"
            self.sink.error("too-large", message, base.span, help="extend fewer files")
            return []
        self.sink.origins.setdefault(shown, base.span)
        return self.read(shown, trail)

    def text_of(self, path: Path, shown: str) -> str | None:
        """A file's text, kept for those who show what is wrong in it."""
        try:
            data = read_bytes(path, PROFILE, self.boundary)
            self.sink.texts[shown] = data.decode("utf-8", errors="replace")
            return decoded(data)
        except FileError as error:
            line, column = error.line, error.column
            place = Span(file=shown, line=line, column=column, end_line=line, end_column=column + 1)
            self.sink.error(error.code, f"`{shown}` {error}", place, help=error.help)
            return None


def base_files(document: MappingNode) -> tuple[ScalarNode, ...]:
    """The files that `extends` names; what is not text there is left to the schema."""
    extends = document.get("extends")
    nodes = extends.items if isinstance(extends, SequenceNode) else (extends,)
    return tuple(node for node in nodes if isinstance(node, ScalarNode) and not (node.is_plain and node.value is None))


def merge(documents: list[MappingNode], sink: Sink) -> MappingNode:
    """One document: mappings merge, lists replace, pins append, `null` removes, `x-` keys vanish.

    Device names are made canonical and ranges expanded first, so that `cuda:[0-1]` and `cuda:0` meet.
    """
    kind = accelerator_kind(documents)
    return _merged([_with_canonical_devices(document, kind, sink) for document in documents])


def variables_of(documents: list[MappingNode]) -> MappingNode:
    """The `variables` of all documents, with the place of that key; of the last file where there is none."""
    merged = _merged([document.only(lambda key: key == "variables") for document in documents])
    for entry in merged.entries:
        if isinstance(entry.value, MappingNode):
            return replace(entry.value, span=entry.key.span)
    return merged.only(lambda _: False)


def _merged(documents: list[MappingNode]) -> MappingNode:
    merged = MappingNode((), whole_file(documents[-1].span.file))
    for document in documents:
        own = document.only(lambda key: not key.startswith("x-"))
        merged = replace(_merge_mappings(merged, own, ()), span=merged.span)
    return merged


def accelerator_kind(documents: list[MappingNode]) -> str:
    """The kind of the accelerators that a profile lists: that of the first one named with it, else `cuda`."""
    for document in documents:
        hardware = document.get("hardware")
        devices = hardware.get("devices") if isinstance(hardware, MappingNode) else None
        for entry in _entries(devices):
            if kind := kind_of(entry.key.text):
                return kind
    return "cuda"


def variable_values(entries: tuple[Entry, ...], overrides: Mapping[str, str]) -> dict[str, object]:
    """The variables by name: later entries win, overrides over all."""
    values: dict[str, object] = {entry.key.text: _plain(entry.value) for entry in entries}
    for name, text in overrides.items():
        values[name] = ScalarNode(text, Span(file="--set", line=1, column=1, end_line=1, end_column=1)).value
    return values


def _plain(node: Node) -> object:
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, SequenceNode):
        return [_plain(item) for item in node.items]
    return {entry.key.text: _plain(entry.value) for entry in node.entries}


def _entries(node: Node | None) -> tuple[Entry, ...]:
    return node.entries if isinstance(node, MappingNode) else ()


def _merge_mappings(base: MappingNode, over: MappingNode, route: tuple[str, ...]) -> MappingNode:
    entries = {entry.key.text: entry for entry in base.entries}
    for entry in over.entries:
        name = entry.key.text
        inherited = entries.get(name)
        if isinstance(entry.value, ScalarNode) and entry.value.is_plain and entry.value.value is None:
            entries[name] = entry  # it removes what is inherited, and is looked at once more: the key may be misspelt
        elif inherited is not None:
            entries[name] = Entry(entry.key, _merge_values(inherited.value, entry.value, (*route, name)))
        else:
            entries[name] = entry
    return MappingNode(tuple(entries.values()), over.span)


def _merge_values(inherited: Node, own: Node, route: tuple[str, ...]) -> Node:
    if isinstance(inherited, MappingNode) and isinstance(own, MappingNode):
        return _merge_mappings(inherited, own, route)
    if route in APPENDED and isinstance(inherited, SequenceNode) and isinstance(own, SequenceNode):
        return SequenceNode(inherited.items + own.items, own.span)
    return own


def _with_canonical_devices(document: MappingNode, kind: str, sink: Sink) -> MappingNode:
    document = change_mapping(
        document, ("hardware", "devices"), lambda mapping: _expand(mapping, kind, sink, is_spec=True)
    )
    return change_mapping(
        document, ("placement", "max_memory"), lambda mapping: _expand(mapping, kind, sink, is_spec=False)
    )


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


def _expand(mapping: MappingNode, kind: str, sink: Sink, *, is_spec: bool) -> MappingNode:
    """One entry a device; what names a device by itself beats a range that holds it, whatever their order."""
    entries: dict[str, Entry] = {}
    ranges_first = sorted(mapping.entries, key=lambda entry: not is_range(entry.key.text))
    written: dict[str, ScalarNode] = {}
    for entry in ranges_first:
        if entry.key.is_unrendered:
            entries[entry.key.text] = entry
            continue
        try:
            names = expand_devices(entry.key.text, kind)
        except DeviceNameError as error:
            sink.error("bad-device-name", error.message, entry.key.span, help=error.help)
            continue
        for name in names:
            earlier = written.get(name)
            is_first = all(written.get(other) is not earlier for other in names[: names.index(name)])
            if earlier is not None and is_range(earlier.text) == is_range(entry.key.text) and is_first:
                report_duplicate(name, entry.key, earlier, sink)
            written[name] = entry.key
            key = replace(entry.key, text=name, is_verbatim=False)
            value = _as_specification(entry.value) if is_spec else entry.value
            entries[name] = Entry(key, value)
    return MappingNode(tuple(entries.values()), mapping.span)


def _as_specification(value: Node) -> Node:
    """A bare catalogue name as the mapping that it stands for, so that files can add to it."""
    if isinstance(value, ScalarNode) and not (value.is_plain and value.value is None):
        key = ScalarNode("accelerator", value.span, is_plain=True)
        return MappingNode((Entry(key, value),), value.span)
    return value


def _normal(path: Path) -> Path:
    """A path without `..`, as text alone tells it."""
    return Path(os.path.normpath(path))


def _moved_to(path: Path) -> str:
    """Where a file of that name lies nearby: it may have moved."""
    folder = path.parent if path.parent.is_dir() else path.parent.parent
    if not folder.is_dir():
        return ""
    found = sorted(candidate for candidate in (*folder.glob(path.name), *folder.glob(f"*/{path.name}")))
    return f"; a file of that name is at `{found[0]}`" if found else ""
