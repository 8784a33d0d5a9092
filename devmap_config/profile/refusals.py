"""Turns pydantic's errors into diagnostics with our wording and the place in the YAML."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from devmap_config.profile.device_names import is_device_name
from devmap_config.profile.document import MappingNode, ScalarNode, SequenceNode
from devmap_config.profile.located import Place, Written, WrittenList, WrittenMapping
from devmap_config.profile.synonyms import key_meant, line_for_key, line_for_scalar
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic import ValidationError
    from pydantic.fields import FieldInfo

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.profile.document import Node

ADVICE = {
    "version": "begin with `version: 1`",
    "model": "add `model: {source: …}` with a hub id, a directory or a `config.json`",
    "hardware": "add `hardware: {devices: …}`; `devmap hardware` lists known accelerators",
    "devices": "list the machine's devices, such as `cuda:0: rtx-4090`",
    "source": "name a hub id, a directory or a `config.json`",
    "match": "name what the pin is about, such as `match: lm_head`",
    "bandwidth": "give it as `25GB/s`",
}
"""The advice for each required key that is missing."""

TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "bool_type": "`true` or `false`",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "",
    "greater_than_equal": "at least {ge}",
    "quantity_type": "a quantity such as `20GiB`",
    "device_type": "a device such as `cuda:0`, `cpu` or `disk`",
}
"""The expected value in words, by the type of pydantic's errors and of those of our validators that check types."""


REFUSED = PydanticCustomError("refused", "what is wrong with it is reported")


def refusal(code: ErrorCode, message: str, help: str, **context: object) -> PydanticCustomError:
    """Return the error that a validator raises for a wrong value.

    Args:
        code: a diagnostic's.
        message: a sentence, in which `{route}` stands for the route of the value.
        help: what to write instead.
        context: `key`, if the error is in the value under that key.
    """
    return PydanticCustomError(code, "{message}", {"message": message, "help": help, **context})


def fields_by_key(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their keys."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


@dataclass
class Refusals:
    """Reports the wrong values of one document; only once if ranges or anchors repeat a value.

    `root` is the section that holds all others. With `is_incomplete`, a file that it extends could not be read, so keys
    that seem to be missing may stand there. `doubted` holds the routes of values that were refused or are missing.
    """

    sink: Sink
    root: type[BaseModel]
    is_incomplete: bool = False
    doubted: set[str] = field(default_factory=set)
    said: set[tuple[str, Span]] = field(default_factory=set)

    def check_keys(self, section: type[BaseModel], value: WrittenMapping) -> None:
        """Report unknown keys, and required keys that are missing, unless an unknown one was meant for it."""
        fields, place = fields_by_key(section), value.place
        keys = (
            {entry.key.text: entry.key for entry in place.node.entries} if isinstance(place.node, MappingNode) else {}
        )
        within = f" in `{place.route}`" if place.route else ""
        unknown = [key for key in keys if key not in fields]
        if section.__name__ == "Pin" and len(keys) == len(unknown) == 1:
            self._report_short_pin(value.place)
            return
        for key in unknown:
            self.report("unknown-key", f"unknown key `{key}`{within}", keys[key].span, self.advice_on_key(key, section))
        intended = {key_meant(key, section.__name__, fields) or closest(key, fields) or key for key in unknown}
        if section.__name__ == "Hardware" and any(is_device_name(key) for key in unknown):
            intended.add("devices")
        replaced = {key for key, other in getattr(section, "ALTERNATIVES", {}).items() if other in value}
        missing = {key for key, field in fields.items() if field.is_required() and key not in value} - replaced
        self.doubted |= {f"{place.route}.{key}".removeprefix(".") for key in intended | missing}
        may_be_elsewhere = self.is_incomplete and "[" not in place.route  # no other file completes an item
        for key in fields if not may_be_elsewhere else ():
            if key in missing - intended:
                message = f"`{key}` is empty" if key in keys else f"`{key}` is missing{within}"
                self.sink.error("missing-key", message, (keys.get(key) or place).span, help=ADVICE.get(key))

    def _report_short_pin(self, place: Place) -> None:
        """Report a pin that is written as `pattern: device`, as in a `device_map` and in other tools."""
        if isinstance(place.node, MappingNode):
            [entry] = place.node.entries
            device = entry.value.text if isinstance(entry.value, ScalarNode) else "cuda:0"
            help = f'write `{{match: "{entry.key.text}", device: {device}}}`'
            self.doubted.add(f"{place.route}.match")
            self.report("missing-key", "the pin does not say what it matches", entry.key.span, help)

    def doubtful_keys(self, route: str) -> frozenset[str]:
        """Return the keys of the section at a route whose values were refused or are missing."""
        above = f"{route}." if route else ""
        below = (doubted[len(above) :] for doubted in self.doubted if doubted.startswith(above))
        return frozenset(re.split(r"[.[]", doubted, maxsplit=1)[0] for doubted in below)

    def advice_on_key(self, key: str, section: type[BaseModel]) -> str:
        """Return advice on an unknown key."""
        fields = fields_by_key(section)
        if key[:3].isdigit():
            return "a `,` separates entries: write large numbers without it"
        close, line = key_meant(key, section.__name__, fields), line_for_key(key, section.__name__)
        if close is None and line is not None:
            return line
        if close := close or closest(key, fields):
            return f"did you mean `{close}`?"
        for name, owner in fields_by_key(self.root).items():
            kind = owner.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel) and key in fields_by_key(kind):
                return f"it belongs under `{name}`: check the indentation"
        return f"known here are {', '.join(f'`{name}`' for name in sorted(fields))}"

    def refuse(self, error: ValidationError, value: Written, field: FieldInfo | None = None) -> None:
        """Report the errors of a value; `field`, if given, is the field that it is for."""
        self.doubted.add(value.place.route)
        for details in error.errors(include_url=False):
            kind, context, given = details["type"], details.get("ctx") or {}, details["input"]
            if not isinstance(given, Written):
                given = _item(value, details["loc"])
            if isinstance(given, WrittenMapping) and "key" in context:
                given = given[context["key"]]
            node, route = given.place.node, f"`{given.place.route}`" if given.place.route else "the profile"
            is_reported = kind == "too_short" and isinstance(given, WrittenMapping) and given  # its items were reported
            if (
                kind in ("missing", REFUSED.type)
                or is_reported
                or (isinstance(node, ScalarNode) and node.is_unrendered)
            ):
                continue
            if "help" in context:
                message = context["message"].replace("{route}", route)
                self.report(cast("ErrorCode", kind), message, given.place.span, context["help"])
            else:
                expected = TYPES[kind].format(**context)
                message = f"{route} must be {expected}, not {_kind_in_words(node)}"
                if kind == "too_short":
                    message = f"{route} must not be empty"
                is_item = given is not value and isinstance(value, WrittenList) and given in value
                help = _advice_on_type(kind, value if is_item else given, field if is_item or given is value else None)
                self.report("wrong-type", message, given.place.span, help)

    def report(self, code: ErrorCode, message: str, span: Span, help: str) -> None:
        """Report a mistake, unless one of the same kind was reported at the same place."""
        if (code, span) not in self.said:
            self.said.add((code, span))
            self.sink.error(code, message, span, help=help)


def _item(value: Written, route: Iterable[object]) -> Written:
    """Return the item of a list that an error's route leads to, or the value itself if it leads to none."""
    for index in route:
        if isinstance(value, WrittenList) and isinstance(index, int) and index < len(value):
            value = value[index]
    return value


def _kind_in_words(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping" if node.entries else "an empty mapping"
    return f"`{node.text}`" if node.is_plain else f'the text "{node.text}"'


def _advice_on_type(kind: str, value: Written, field: FieldInfo | None) -> str:
    node, key = value.place.node, value.place.key
    if kind == "int_type" and isinstance(node, ScalarNode) and not node.is_plain and node.text.isdigit():
        return "remove the quotes"
    wants_mapping = kind in ("model_type", "mapping_type", "dict_type")
    if wants_mapping and key is not None and isinstance(node, ScalarNode) and node.text:
        line = line_for_scalar(key.text, node.text)
        if line is not None:
            return line
    if key is not None and key.text in ADVICE and kind == "model_type":
        return ADVICE[key.text]
    if field is None or not field.examples or key is None:
        return "`devmap schema` prints what each key takes"
    example = field.examples[0]
    example_text = json.dumps(example) if isinstance(example, (dict, list, bool)) else str(example)
    return f"for example `{key.text}: {example_text}`"
