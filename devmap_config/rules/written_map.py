"""Reads a `device_map` from text: JSON, or a Python dict that somebody wrote or a model printed."""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from devmap_config.diagnostics.diagnostic import Span
from devmap_config.profile.device_names import ACCELERATOR_KINDS, DeviceNameError, expand_devices, kind_of
from devmap_config.profile.document import whole_file

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Sink

GAP = r"(?:\s|\#[^\n]*)*"
STRING = r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
TORCH_DEVICE = rf"(?:torch\.)?device\((?:type=)?(?P<type>{STRING})(?:,\s*(?:index=)?(?P<index>\d+))?\)"
START = re.compile(rf"{GAP}(?:[\w.]+{GAP}={GAP})?(?P<ordered>(?:collections\.)?OrderedDict\({GAP})?(?P<bracket>[{{\[])")
ENTRY = re.compile(
    rf"{GAP}(?P<pair>\({GAP})?(?P<key>{STRING}){GAP}[:,]{GAP}"
    rf"(?P<value>(?P<text>{STRING})|-?[0-9]{{1,9}}|{TORCH_DEVICE}){GAP}(?(pair)\)){GAP}(?P<more>,)?"
)
END = re.compile(rf"{GAP}[}}\]]{GAP}\)?{GAP};?{GAP}")
"""Each pattern is matched once, from the end of the previous match: nothing in the text is run, and nothing is
nested.
"""

EXAMPLE = '`{"model.embed_tokens": 0, "lm_head": "cpu"}`'
PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True)
class MapEntry:
    """An entry of a map: the device of a key, its value in Python, and the key's place."""

    device: Device
    value: int | str
    span: Span


def read_device_map(text: str, file: str, sink: Sink) -> dict[str, MapEntry] | None:
    """Return the entries of a map by key, the last of repeated ones; `None` if the text cannot be read.

    Args:
        text: JSON, or a Python dict of names, numbers and `torch.device`.
        file: the name of the file, for diagnostics.
        sink: takes the diagnostics.
    """
    sink.texts[file] = text
    start = START.match(text)
    if start is None or (start["bracket"] == "[" and not start["ordered"]):
        _report_other(text, file, sink)
        return None
    written, position = [], start.end()
    while (entry := ENTRY.match(text, position)) is not None:
        written.append(entry)
        position = entry.end()
        if not entry["more"]:
            break
    if END.fullmatch(text, position) is None:
        position += len(text[position:]) - len(text[position:].lstrip())
        sink.error("syntax", "the device_map cannot be read here", _span(text, position, 1, file), help=_advice(text))
        return None
    if not written:
        sink.error("wrong-type", "the device_map is empty", whole_file(file), help=f"write {EXAMPLE}")
        return None
    values = {entry: _value(entry) for entry in written}
    kind = next(filter(None, (kind_of(str(value)) for value in values.values())), "cuda")
    entries = {}
    for entry, value in values.items():
        device = _device(value, kind, _place(entry, "value", file), sink)
        if device is not None:
            entries[_string(entry["key"])] = MapEntry(device, value, _place(entry, "key", file))
    return None if sink.has_errors else entries


def _report_other(text: str, file: str, sink: Sink) -> None:
    planned = text.strip().strip("\"'")
    help = f"such as {EXAMPLE}, or what `print(model.hf_device_map)` shows"
    if planned in PLANNED:
        help = f"`{planned}` leaves it to transformers: `devmap init MODEL --strategy {planned}` writes a profile"
    sink.error("wrong-type", "this is not a device_map: it must be modules and devices", whole_file(file), help=help)


def _advice(text: str) -> str:
    if re.search(r"\bfor\b|\bf[\"']|\brange\(|\bdict\(", text):
        return "no code is run: print the map, and adopt what `print(device_map)` shows"
    return f"a device_map is one level of keys and devices, such as {EXAMPLE}"


def _value(entry: re.Match[str]) -> int | str:
    """Return a value of Python's syntax; a `torch.device` as its name."""
    if entry["type"]:
        return _string(entry["type"]) + (f":{entry['index']}" if entry["index"] else "")
    return _string(entry["text"]) if entry["text"] else int(entry["value"])


def _string(literal: str) -> str:
    try:
        return str(ast.literal_eval(literal.replace(r"\/", "/")))
    except (ValueError, SyntaxError):  # an incomplete escape
        return literal[1:-1]


def _device(value: int | str, kind: str, place: Span, sink: Sink) -> Device | None:
    text = f"{value}:0" if value in ACCELERATOR_KINDS and value != "mps" else str(value)
    try:
        devices = expand_devices(text, kind)
    except DeviceNameError as error:
        sink.error("bad-device-name", error.message, place, help=error.help)
        return None
    if len(devices) > 1:
        sink.error("bad-device-name", f"`{value}` is several devices", place, help=f"write `{devices[0]}`")
        return None
    return devices[0]


def _place(entry: re.Match[str], group: str, file: str) -> Span:
    return _span(entry.string, entry.start(group), len(entry[group]), file)


def _span(text: str, position: int, length: int, file: str) -> Span:
    starts = _line_starts(text)
    line = bisect_right(starts, position)
    return Span.within_line(file, line, position - starts[line - 1] + 1, length)


@lru_cache(1)
def _line_starts(text: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer("\n", text))]
