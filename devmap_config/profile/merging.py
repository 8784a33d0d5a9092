"""Merges the documents of a profile and of the files that it extends into one, with an entry for each device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from devmap_config.profile.device_names import (
    HOST_NAME,
    MAX_DEVICES,
    DeviceNameError,
    expand_devices,
    is_range,
    kind_of,
)
from devmap_config.profile.document import (
    Entry,
    MappingNode,
    Node,
    ScalarNode,
    SequenceNode,
    is_null,
    plain_value,
    report_duplicate,
    whole_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devmap_config.diagnostics.diagnostic import Sink

APPENDED = (("placement", "pins"),)
"""The lists that a later file appends to instead of replacing them."""


def variables_of(documents: list[MappingNode]) -> MappingNode:
    """Return the merged `variables` of all documents, at the place of that key, or of the last file if none has it."""
    merged = _merged([document.only(lambda key: key == "variables") for document in documents])
    for entry in merged.entries:
        if isinstance(entry.value, MappingNode):
            return replace(entry.value, span=entry.key.span)
    return merged.only(lambda _: False)


def variable_values(variables: MappingNode, overrides: Mapping[str, str]) -> dict[str, object]:
    """Return the variables by name; an override is read as if it had been written in the file."""
    values: dict[str, object] = {entry.key.text: _plain(entry.value) for entry in variables.entries}
    return values | {name: plain_value(text) for name, text in overrides.items()}


def _plain(node: Node) -> object:
    if isinstance(node, ScalarNode):
        return node.value
    if isinstance(node, SequenceNode):
        return [_plain(item) for item in node.items]
    return {entry.key.text: _plain(entry.value) for entry in node.entries}


def merge(documents: list[MappingNode], sink: Sink) -> MappingNode:
    """Merge documents: mappings merge, lists replace, pins append, `null` removes, keys with `x-` vanish.

    Device names are made canonical and ranges expanded first, so that `cuda:[0-1]` and `cuda:0` meet.
    """
    expand = partial(_expand, kind=_accelerator_kind(documents), sink=sink)
    documents = [change_mapping(document, ("placement", "max_memory"), expand) for document in documents]
    documents = [
        change_mapping(document, ("hardware", "devices"), lambda mapping: _described(expand(mapping)))
        for document in documents
    ]
    documents = [change_mapping(document, ("hardware", "hosts"), partial(_hosts, sink=sink)) for document in documents]
    return _merged(documents)


def _hosts(hosts: MappingNode, sink: Sink) -> MappingNode:
    """Return the devices of each host, with ranges expanded and the host's name before each device."""
    count = 0

    def devices_of(host: str) -> Callable[[MappingNode], MappingNode]:
        before = f"{host}/" if HOST_NAME.fullmatch(host) else ""  # another name is refused when devices are read
        return lambda mapping: _described(_expand(mapping, _kind_within(mapping), sink, before))

    entries: list[Entry] = []
    for entry in hosts.entries:
        value = entry.value
        if isinstance(value, MappingNode):
            value = change_mapping(value, ("devices",), devices_of(entry.key.text))
            devices = value.get("devices")
            count += len(devices.entries) if isinstance(devices, MappingNode) else 0
        if count > MAX_DEVICES:
            message, help = f"the hosts have more than {MAX_DEVICES} devices together", "list fewer"
            sink.error("too-large", message, entry.key.span, help=help)
            break
        entries.append(replace(entry, value=value))
    return replace(hosts, entries=tuple(entries))


def _merged(documents: list[MappingNode]) -> MappingNode:
    merged = MappingNode((), whole_file(documents[-1].span.file))
    for document in documents:
        own = document.only(lambda key: not key.startswith("x-"))
        merged = replace(_merge_mappings(merged, own, ()), span=merged.span)
    return merged


def _merge_mappings(base: MappingNode, over: MappingNode, route: tuple[str, ...]) -> MappingNode:
    # A `null` stays, so that its key is checked for misspelling.
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
    """Return a document with the mapping at a route changed, if there is one."""
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
    """Return the kind of the accelerators of a profile: that of the first name that states a kind, else `cuda`."""
    for document in documents:
        hardware = document.get("hardware")
        devices = hardware.get("devices") if isinstance(hardware, MappingNode) else None
        if isinstance(devices, MappingNode) and any(kind_of(entry.key.text) for entry in devices.entries):
            return _kind_within(devices)
    return "cuda"


def _kind_within(devices: MappingNode) -> str:
    """Return the kind of the first name that states one, else `cuda`."""
    return next((kind for entry in devices.entries if (kind := kind_of(entry.key.text))), "cuda")


def _expand(mapping: MappingNode, kind: str, sink: Sink, host: str = "") -> MappingNode:
    """Return one entry for each device; a device's own entry outranks a range that includes it, whatever their order.

    `host` is the prefix of the names of its devices.
    """
    entries: dict[str, Entry] = {}
    written: dict[str, ScalarNode] = {}
    for entry in sorted(mapping.entries, key=lambda entry: not is_range(entry.key.text)):
        names, are_too_many = _names(entry.key, kind, sink, host), len(written) >= MAX_DEVICES
        if not names or are_too_many:
            entries[entry.key.text] = replace(entry, key=replace(entry.key, is_unrendered=True))
        if are_too_many:
            message, help = f"more than {MAX_DEVICES} devices are named", "name only devices that exist"
            sink.error("too-large", message, entry.key.span, help=help)
            break
        alike = [name for name in names if name in written and is_range(written[name].text) == is_range(entry.key.text)]
        if alike:
            report_duplicate(alike[0], entry.key, written[alike[0]], sink)
        for name in names:
            written[name] = entry.key
            entries[name] = Entry(replace(entry.key, text=name, is_verbatim=False), entry.value)
    return replace(mapping, entries=tuple(entries.values()))


def _names(key: ScalarNode, kind: str, sink: Sink, host: str) -> tuple[str, ...]:
    """Return the devices that a key names; if it names none, report that."""
    if key.is_unrendered:
        return ()
    try:
        return tuple(map(str, expand_devices(f"{host}{key.text}", kind)))
    except DeviceNameError as error:
        sink.error("bad-device-name", error.message, key.span, help=error.help)
        return ()


def _described(devices: MappingNode) -> MappingNode:
    """Return devices with bare catalogue names expanded to mappings, so that files can add keys to them."""
    entries: list[Entry] = []
    for entry in devices.entries:
        value = entry.value
        if isinstance(value, ScalarNode) and not is_null(value):
            value = MappingNode((Entry(ScalarNode("accelerator", value.span), value),), value.span)
        entries.append(Entry(entry.key, value))
    return replace(devices, entries=tuple(entries))
