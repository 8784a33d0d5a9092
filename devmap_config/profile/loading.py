"""Loads a profile: reads and merges its files, renders its templates, validates it; every value keeps its place."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from devmap_config.files import Boundary, boundary_of
from devmap_config.profile.document import (
    Entry,
    MappingNode,
    Node,
    ScalarNode,
    SequenceNode,
    at,
    routes,
    whole_file,
)
from devmap_config.profile.inheritance import Reader, merge, variable_values
from devmap_config.profile.schema import OPTIMAL_STRATEGIES, Hardware, PlainText, Profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink, Span

Route: TypeAlias = "tuple[str | int, ...]"

UNRENDERED = ("variables", "extends")
"""Top-level keys that templates cannot stand in: they are what templates are rendered with."""


@dataclass(frozen=True)
class LoadedProfile:
    """A valid profile, or what is valid of it, and where each of its values was written.

    `path` is as it was given, `overrides` the
    `--set` values, `invalid` the routes that were left out because they are wrong.
    """

    path: Path
    profile: Profile
    document: MappingNode
    boundary: Boundary
    overrides: Mapping[str, str]
    invalid: tuple[Route, ...] = ()

    def span(self, *route: str | int) -> Span:
        """The place of a value; of the nearest thing around it where it is not written."""
        for length in range(len(route), 0, -1):
            if (node := at(self.document, route[:length])) is not None:
                return node.span
        return whole_file(str(self.path))

    def key_span(self, *route: str | int) -> Span:
        """The place of a key; of the nearest thing around it where it is not written."""
        holder = at(self.document, route[:-1])
        if isinstance(holder, MappingNode) and (span := holder.key_span(str(route[-1]))):
            return span
        return self.span(*route)

    def scalar(self, *route: str | int) -> ScalarNode | None:
        """The value at a route, where it is a single one."""
        node = at(self.document, route)
        return node if isinstance(node, ScalarNode) else None

    def key(self, *route: str | int) -> ScalarNode | None:
        """The key at a route."""
        holder = at(self.document, route[:-1])
        entries = holder.entries if isinstance(holder, MappingNode) else ()
        return next((entry.key for entry in entries if entry.key.text == str(route[-1])), None)

    def beside(self, text: str, *route: str | int) -> Path:
        """A path that a value names, relative to the file that writes it."""
        return Path(self.span(*route).file).parent / text


def on_other_hardware(loaded: LoadedProfile, hardware: Hardware, strategy: str | None) -> LoadedProfile:
    """A profile with another machine than its own, for which its caps mean nothing.

    Args:
        loaded: the profile.
        hardware: the machine.
        strategy: what to ask, unless the profile asks for one of ours that is not after speed alone.
    """
    placement = loaded.profile.placement
    changed: dict[str, object] = {"max_memory": {}, "device": None}
    if strategy is not None and placement.strategy not in OPTIMAL_STRATEGIES[1:]:
        changed |= {"strategy": strategy, "device_map": None}
    profile = loaded.profile.model_copy(
        update={"hardware": hardware, "placement": placement.model_copy(update=changed)}
    )
    return replace(loaded, profile=profile)


def load_profile(
    path: Path,
    sink: Sink,
    *,
    overrides: Mapping[str, str] | None = None,
    remembered: Mapping[str, str] | None = None,
    allow_outside: bool = False,
) -> LoadedProfile | None:
    """The profile in a file, or `None` where so little of it is valid that nothing more can be said.

    Args:
        path: the profile's file.
        sink: takes everything that is wrong.
        overrides: values for variables, as text; a variable that the profile does not have is a mistake.
        remembered: such values from before, for those of the variables that still exist.
        allow_outside: whether paths may lead out of the repository.
    """
    overrides = overrides or {}
    boundary = boundary_of(path, allow_outside=allow_outside)
    reader = Reader(boundary, sink)
    documents = reader.read(str(path))
    if not documents:
        return None
    merged = merge(documents, sink)
    known = {entry.key.text for entry in _variables(merged)}
    used = {name: text for name, text in (remembered or {}).items() if name in known} | dict(overrides)
    variables = variable_values(_variables(merged), used)
    _check_overrides(merged, overrides, path, sink)
    rendered, unrendered = _render(merged, variables, sink)
    _check_empty_keys(rendered, sink)
    profile, invalid = _validate(rendered, unrendered, sink, is_incomplete=reader.is_incomplete)
    if profile is None:
        return None
    return LoadedProfile(path, profile, rendered, boundary, used, invalid)


def _variables(document: MappingNode) -> tuple[Entry, ...]:
    variables = document.get("variables")
    return variables.entries if isinstance(variables, MappingNode) else ()


def _check_overrides(document: MappingNode, overrides: Mapping[str, str], path: Path, sink: Sink) -> None:
    known = [entry.key.text for entry in _variables(document)]
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            sink.error(
                "unknown-variable",
                f"a value is given for `{name}`, which is no variable of the profile",
                document.key_span("variables") or whole_file(str(path)),
                help=f"did you mean `{close[0]}`?" if close else f"add `{name}` under `variables:`",
            )


def _render(
    document: MappingNode, variables: Mapping[str, object], sink: Sink
) -> tuple[MappingNode, frozenset[ScalarNode]]:
    """The document with its templates rendered, and the values whose template failed."""
    failed: set[ScalarNode] = set()

    def rendered(node: Node) -> Node:
        if isinstance(node, ScalarNode):
            return rendered_scalar(node) if _is_template(node.text) else node
        if isinstance(node, SequenceNode):
            return SequenceNode(tuple(map(rendered, node.items)), node.span)
        return MappingNode(tuple(Entry(entry.key, rendered(entry.value)) for entry in node.entries), node.span)

    def rendered_scalar(node: ScalarNode) -> ScalarNode:
        """What a template renders to, as if it had been written without quotes: its field's type reads it."""
        from devmap_config.profile.template import TemplateRefusedError, render  # with it comes jinja2

        try:
            text = render(node.text, variables)
        except TemplateRefusedError as error:
            sink.error(error.code, error.message, node.span, help=error.help)
            failed.add(node)
            return node
        return ScalarNode(text, node.span, is_plain=True)

    entries = tuple(
        entry if entry.key.text in UNRENDERED else Entry(entry.key, rendered(entry.value)) for entry in document.entries
    )
    return MappingNode(entries, document.span), frozenset(failed)


def _is_template(text: str) -> bool:
    """Whether jinja2 would find anything to do in a text."""
    return "{{" in text or "{%" in text or "{#" in text


def _validate(
    document: MappingNode, unrendered: frozenset[ScalarNode], sink: Sink, *, is_incomplete: bool
) -> tuple[Profile | None, tuple[Route, ...]]:
    """The profile, and the routes that had to be left out to get one."""
    data = _data(document)
    failed = [route for route, node in routes(document) if isinstance(node, ScalarNode) and node in unrendered]
    invalid: list[Route] = [out for route in failed for out in (route, _to_leave_out("", route))]
    for route in invalid:
        _leave_out(data, route)
    misspelt = frozenset(meant for route, key in _unknown_keys(document) if (meant := _meant(key, route)))
    said: set[tuple[str, Span]] = set()
    for _ in range(5):  # what is left out may uncover more: a missing key, then what lacks it
        try:
            return Profile.model_validate(data), tuple(invalid)
        except ValidationError as error:
            for details in error.errors():
                route = _route(details["loc"], document)
                is_consequence = (
                    route in invalid
                    or (details["type"] == "missing" and (is_incomplete or route in misspelt))
                    or (details["type"], _nearest_span(document, route)) in said
                )
                said.add((details["type"], _nearest_span(document, route)))
                if not is_consequence:
                    _refuse(details, route, document, sink)
                invalid += [route, _to_leave_out(details["type"], route)]
            for route in invalid:
                _leave_out(data, route)
    return None, tuple(invalid)


def _unknown_keys(document: MappingNode) -> Iterator[tuple[Route, str]]:
    """Keys that the schema does not have, with the route of what holds them."""
    for route, node in routes(document):
        known = frozenset(_known_keys(route))
        if isinstance(node, MappingNode) and known:
            for entry in node.entries:
                if entry.key.text not in known:
                    yield route, entry.key.text


def _meant(key: str, route: Route) -> Route | None:
    """The route of the key that a misspelt one was most likely meant to be."""
    close = difflib.get_close_matches(key, sorted(_known_keys(route)), n=1, cutoff=0.6)
    return (*route, close[0]) if close else None


def _check_empty_keys(document: MappingNode, sink: Sink) -> None:
    """A key without a value means nothing, but one that does not exist is misspelt all the same."""
    for route, key in _unknown_keys(document):
        node = at(document, (*route, key))
        if isinstance(node, ScalarNode) and node.is_plain and node.value is None and not key.startswith("x-"):
            holder = at(document, route)
            span = holder.key_span(key) if isinstance(holder, MappingNode) else None
            _report_unknown_key((*route, key), span or document.span, sink)


def _report_unknown_key(route: Route, span: Span, sink: Sink) -> None:
    key = str(route[-1])
    known = sorted(_known_keys(route[:-1]))
    meant = _meant(key, route[:-1])
    section = next((name for name in SECTIONS if key in set(_known_keys((name,)))), None)
    if key[:3].isdigit():
        advice = "a `,` separates entries: write large numbers without it"
    elif meant:
        advice = f"did you mean `{meant[-1]}`?"
    elif len(route) == 1 and section:
        advice = f"it belongs under `{section}`: check the indentation"
    else:
        advice = f"known here are {', '.join(f'`{each}`' for each in known)}"
    sink.error("unknown-key", f"unknown key `{key}`{_within(route)}", span, help=advice)


SECTIONS = ("model", "workload", "hardware", "placement")

PIN_DEPTH = 3
"""`placement`, `pins` and the index: a pin goes as a whole."""


def _to_leave_out(kind: str, route: Route) -> Route:
    if route[:2] == ("placement", "pins"):
        return route[:PIN_DEPTH]
    return route[:-1] if kind == "missing" else route


def _data(node: Node) -> Any:
    if isinstance(node, ScalarNode):
        if node.is_plain and node.value is None:
            return None
        return PlainText(node.text) if node.is_plain else node.text
    if isinstance(node, SequenceNode):
        return [_data(item) for item in node.items]
    # A key without a value says nothing: it has its default.
    values = {entry.key.text: _data(entry.value) for entry in node.entries}
    return {key: value for key, value in values.items() if value is not None}


def _leave_out(data: Any, route: Route) -> None:
    for step in route[:-1]:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return
    last = route[-1] if route else None
    if last == "version":
        data[last] = "1"
    elif isinstance(data, dict):
        data.pop(last, None)
    elif isinstance(data, list) and isinstance(last, int) and last < len(data):
        # The indices of the others must stay what they are: a rule that nothing matches, and nobody minds.
        data[last] = {"match": "re:-", "keep_together": True, "optional": True}


def _route(location: tuple[str | int, ...], document: MappingNode) -> Route:
    """Pydantic's `loc` as keys and indices of the document, without its names for alternatives."""
    route: list[str | int] = []
    node: Node | None = document
    for step in location:
        child = at(node, (step,)) if node is not None else None
        if child is None and step != location[-1]:
            continue
        route.append(step)
        node = child
    return tuple(route)


def _refuse(details: ErrorDetails, route: Route, document: MappingNode, sink: Sink) -> None:
    """Report one error of pydantic's in our words."""
    kind, context = details["type"], details.get("ctx") or {}
    node = at(document, route)
    name = _shown(route)
    span = _nearest_span(document, route)
    if kind == "extra_forbidden":
        holder = at(document, route[:-1])
        place = holder.key_span(str(route[-1])) if isinstance(holder, MappingNode) else None
        _report_unknown_key(route, place or span, sink)
        return
    if kind == "missing":
        holder = at(document, route[:-1])
        empty = holder.key_span(str(route[-1])) if isinstance(holder, MappingNode) else None
        what = "is empty" if empty else f"is missing{_within(route)}"
        sink.error("missing-key", f"`{route[-1]}` {what}", empty or span, help=_add_advice(route))
        return
    if kind == "empty-pin":
        sink.error(
            "empty-pin",
            "the pin asks for nothing",
            span,
            help="give it `device`, `compute`, `not_on` or `keep_together`",
        )
        return
    if kind == "prompt-beyond-context":
        place = _nearest_span(document, (*route, "prompt_length"))
        message = "`workload.prompt_length` must be at most `context_length`"
        sink.error("wrong-type", message, place, help="the context holds prompt and answer")
        return
    if kind == "quantization-method":
        sink.error(
            "missing-key", "`method` is missing in `model.quantization`", span, help="such as `method: bitsandbytes`"
        )
        return
    if kind in ("bad-quantity", "bad-device-name"):
        code: ErrorCode = "bad-quantity" if kind == "bad-quantity" else "bad-device-name"
        sink.error(code, context["text"], span, help=context["help"])
        return
    if kind == "unsupported-version":
        sink.error(
            "unsupported-version",
            f"version {context['value']} of the profile language is not known",
            span,
            help="this devmap-config reads `version: 1`; a newer one may read more",
        )
        return
    if kind in ("unknown-strategy", "choice"):
        choices: tuple[str, ...] = context["choices"]
        close = difflib.get_close_matches(context["value"], choices, n=1)
        wanted = f"did you mean `{close[0]}`? " if close else ""
        listed = f"one of {', '.join(f'`{each}`' for each in choices)}"
        code = "unknown-strategy" if kind == "unknown-strategy" else "wrong-type"
        message = f"`{context['value']}` is no strategy" if code == kind else f"{name} cannot be `{context['value']}`"
        sink.error(code, message, span, help=wanted + listed)
        return
    sink.error(
        "wrong-type",
        f"{name or 'the profile'} must be {_wanted(kind, context)}, not {_found(node)}",
        span,
        help=_type_advice(kind, node, route),
    )


def _nearest_span(document: MappingNode, route: Route) -> Span:
    for length in range(len(route), 0, -1):
        if (node := at(document, route[:length])) is not None:
            return node.span
    return whole_file(document.span.file)


def _shown(route: Route) -> str:
    """A route as a person writes it: `placement.pins[2].match`."""
    text = ""
    for step in route:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return f"`{text.removeprefix('.')}`" if text else ""


def _within(route: Route) -> str:
    return f" in {_shown(route[:-1])}" if len(route) > 1 else ""


ADVICE = {
    "version": "begin with `version: 1`",
    "model": "add `model: {source: …}` with a hub id, a directory or a `config.json`",
    "hardware": "add `hardware: {devices: …}`; `devmap hardware` lists known accelerators",
    "devices": "list the machine's devices, such as `cuda:0: rtx-4090`",
    "source": "name a hub id, a directory or a `config.json`",
    "match": "name what the pin is about, such as `match: lm_head`",
    "bandwidth": "give it as `25GB/s`",
}


def _add_advice(route: Route) -> str | None:
    return ADVICE.get(str(route[-1]))


TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "`true` or `false`",
    "bool_parsing": "`true` or `false`",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "quantity_type": "a quantity such as `20GiB`",
    "device_type": "a device such as `cuda:0`, `cpu` or `disk`",
}


def _wanted(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "greater_than_equal":
        return f"at least {context['ge']}"
    if kind == "too_short":
        return "not empty"
    return TYPES.get(kind, kind.replace("_", " "))


def _type_advice(kind: str, node: Node | None, route: Route) -> str:
    if kind == "int_type" and isinstance(node, ScalarNode) and not node.is_plain and node.text.isdigit():
        return "remove the quotes"
    field = _field_at(route)
    if field is None or not field.examples:
        return "`devmap schema` prints what each key takes"
    example = field.examples[0]
    shown = json.dumps(example) if isinstance(example, (dict, list, bool)) else str(example)
    return f"for example `{route[-1]}: {shown}`"


def _found(node: Node | None) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping" if node.entries else "an empty mapping"
    if node is None:
        return "nothing"
    return f"`{node.text}`" if node.is_plain else f'the text "{node.text}"'


def _known_keys(route: Route) -> Iterator[str]:
    """The keys that the schema has at a route."""
    model = _model_at(route)
    for name, field in model.model_fields.items() if model else ():
        yield field.alias or name


def _field_at(route: Route) -> FieldInfo | None:
    """The field that a route leads to, where it is one of the schema's own."""
    model = _model_at(route[:-1]) if route else None
    return _field_of(model, route[-1]) if model else None


def _model_at(route: Route) -> type[BaseModel] | None:
    """The part of the schema at a route; `None` where keys are open, as those of devices are."""
    annotation: Any = Profile
    for step in route:
        annotation = _within_annotation(annotation, step)
    annotation = _plain_annotation(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _within_annotation(annotation: Any, step: str | int) -> Any:
    annotation = _plain_annotation(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = _field_of(annotation, step)
        return None if field is None else field.annotation
    # Of `Mapping[str, Device]` and `tuple[Pin, ...]`, what they hold.
    held = [part for part in get_args(annotation) if part is not Ellipsis]
    return held[-1] if held else None


def _plain_annotation(annotation: Any) -> Any:
    """Without `Annotated` and without `None`."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _field_of(model: type[BaseModel], key: str | int) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key in (field.alias or name, name)), None)
