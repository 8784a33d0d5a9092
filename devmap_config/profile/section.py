"""`Section`: a part of a profile, whose fields are validated one by one, so that all errors come at once.

What is wrong is reported where it stands, and the default goes on in its stead.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticOmit

from devmap_config.profile.document import MappingNode, ScalarNode, SequenceNode
from devmap_config.profile.located import NOWHERE, Located, Place, Written, WrittenMapping, at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo
    from pydantic.functional_validators import ModelWrapValidatorHandler
    from typing_extensions import Self

    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.profile.document import Node


class Section(BaseModel):
    """What all parts of a profile share: frozen, without unknown keys, and with a place in the document."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    STAND_INS: ClassVar[Mapping[str, object]] = {}
    """By required key, what stands in where it is missing or wrong, so that the rest can be looked at."""

    _place: Place = PrivateAttr(default=NOWHERE)
    _is_sound: bool = PrivateAttr(default=True)

    @property
    def span(self) -> Span:
        """The place of the section."""
        return self._place.node.span

    @property
    def key_span(self) -> Span:
        """The place of the key before it."""
        return (self._place.key or self._place.node).span

    @property
    def is_sound(self) -> bool:
        """Whether nothing in it was wrong."""
        return self._is_sound

    def changed(self, **values: object) -> Self:
        """Return the section with other values, each at the place of the one before."""
        for name, value in values.items():
            if isinstance(before := getattr(self, name), Located):
                values[name] = Located(value, before.place)
        return self.model_copy(update=values)

    def remember(self, place: Place, *, is_sound: bool) -> None:
        """Note where the section was read, and whether nothing in it was wrong."""
        self._place, self._is_sound = place, is_sound

    @model_validator(mode="wrap")
    @classmethod
    def _remember_place(cls, value: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(value, Written):
            return handler(value)
        refusals = cast("Refusals", info.context)
        refused_before = refusals.count
        section = handler(refusals.readable(cls, value) if isinstance(value, WrittenMapping) else value)
        section.remember(value.place, is_sound=refusals.count == refused_before)
        return section

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_default(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if not isinstance(value, Written):
                raise
            name, field = str(info.field_name), cls.model_fields[str(info.field_name)]
            refusals = cast("Refusals", info.context)
            refusals.refuse(error, value, field)
            if name in cls.STAND_INS:
                return handler(cls.STAND_INS[name])
            if field.is_required():
                raise REFUSED from None
            located = refusals.default(field, value.place)
            return field.get_default(call_default_factory=True) if located is None else located


Item = TypeVar("Item")


def _or_nothing(value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        if not isinstance(value, Written):
            raise
        cast("Refusals", info.context).refuse(error, value)
        raise PydanticOmit from None


Each = Annotated[Item, WrapValidator(_or_nothing)]
"""An item of a list or mapping that is left out, and reported, where it is wrong."""

REFUSED = PydanticCustomError("refused", "what is wrong with it is reported")


def refusal(code: ErrorCode, message: str, help: str, **context: object) -> PydanticCustomError:
    """Return the error of a validator that says in our words what is wrong.

    Args:
        code: a diagnostic's.
        message: a sentence, in which `{route}` stands for the value's.
        help: what to write instead.
        context: `key`, where the error is in the value under that key.
    """
    return PydanticCustomError(code, "{message}", {"message": message, "help": help, **context})


def known_keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by their keys."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


@dataclass
class Refusals:
    """Reports what is wrong with the values of one document; once, where ranges or anchors repeat a value.

    `root` is the section that holds all others. With `is_incomplete`, a file that it extends could not be read: what
    seems to be missing may stand there.
    """

    sink: Sink
    root: type[Section]
    is_incomplete: bool = False
    count: int = 0
    said: set[tuple[str, Span]] = field(default_factory=set)

    def report(self, code: ErrorCode, message: str, span: Span, help: str | None, *, kind: str) -> None:
        """Report a mistake, unless one of its kind is reported there."""
        self.count += 1
        if (kind, span) not in self.said:
            self.said.add((kind, span))
            self.sink.error(code, message, span, help=help)

    def readable(self, section: type[Section], value: WrittenMapping) -> dict[str, object]:
        """Return what a section is read from: its values, and the defaults that have a place; report its keys."""
        node, route = value.place.node, value.place.route
        keys = [entry.key for entry in node.entries] if isinstance(node, MappingNode) else []
        fields = known_keys(section)
        unknown = [key for key in keys if key.text not in fields]
        for key in unknown:
            message, help = f"unknown key `{key.text}`{_within(route)}", self.advice_on_key(key.text, section)
            self.report("unknown-key", message, key.span, help, kind="unknown")
        meant = {_nearest(key.text, fields) for key in unknown}
        data: dict[str, object] = dict(section.STAND_INS)
        for name, each in fields.items():
            if name in value:
                data[name] = value[name]
            elif each.is_required() and name not in meant and not self.is_incomplete:
                empty = next((key.span for key in keys if key.text == name), None)
                message = f"`{name}` is empty" if empty else f"`{name}` is missing{_within(route)}"
                self.report("missing-key", message, empty or node.span, ADVICE.get(name), kind=f"no {name}")
            elif not each.is_required() and (default := self.default(each, Place(node, None, route))) is not None:
                data[name] = default
        return data

    def default(self, field: FieldInfo, place: Place) -> object:
        """Return the default of a field at a place: of what holds it, or of what is wrong in its stead."""
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            empty = Place(MappingNode((), place.node.span), None, place.route)
            return kind.model_validate(at(WrittenMapping(), empty), context=self)
        return Located(field.default.value, place) if isinstance(field.default, Located) else None

    def advice_on_key(self, key: str, section: type[Section]) -> str:
        """Return what was meant by an unknown key."""
        fields = known_keys(section)
        owners = [
            name for name, each in known_keys(self.root).items() if key in known_keys(_section_of(each) or BaseModel)
        ]
        if key[:3].isdigit():
            return "a `,` separates entries: write large numbers without it"
        if close := _nearest(key, fields):
            return f"did you mean `{close}`?"
        if section is self.root and owners:
            return f"it belongs under `{owners[0]}`: check the indentation"
        return f"known here are {', '.join(f'`{name}`' for name in sorted(fields))}"

    def refuse(self, error: ValidationError, value: Written, field: FieldInfo | None = None) -> None:
        """Report the errors of a value, which is that of a field where one is given."""
        for details in error.errors(include_url=False):
            given = details["input"] if isinstance(details["input"], Written) else value
            kind, context = details["type"], details.get("ctx") or {}
            if isinstance(given, WrittenMapping) and "key" in context:
                given = given[context["key"]]
            place, route = given.place, f"`{given.place.route}`" if given.place.route else "the profile"
            if kind in ("missing", REFUSED.type) or (isinstance(place.node, ScalarNode) and place.node.is_unrendered):
                self.count += 1  # it is reported already
            elif "help" in context:
                message = context["message"].replace("{route}", route)
                self.report(cast("ErrorCode", kind), message, place.node.span, context["help"], kind=kind)
            else:
                message = f"{route} must be {_wanted(kind, context)}, not {_found(place.node)}"
                help = _advice_on_type(kind, given, field if given is value else None)
                self.report("wrong-type", message, place.node.span, help, kind=kind)


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _nearest(key: str, keys: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(keys), n=1)), None)


def _within(route: str) -> str:
    return f" in `{route}`" if route else ""


ADVICE = {
    "version": "begin with `version: 1`",
    "model": "add `model: {source: …}` with a hub id, a directory or a `config.json`",
    "hardware": "add `hardware: {devices: …}`; `devmap hardware` lists known accelerators",
    "devices": "list the machine's devices, such as `cuda:0: rtx-4090`",
    "source": "name a hub id, a directory or a `config.json`",
    "match": "name what the pin is about, such as `match: lm_head`",
    "bandwidth": "give it as `25GB/s`",
}
"""By required key, what to write."""

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
    "too_short": "not empty",
    "greater_than_equal": "at least {ge}",
    "quantity_type": "a quantity such as `20GiB`",
    "device_type": "a device such as `cuda:0`, `cpu` or `disk`",
}
"""By type of pydantic's errors, and of those of our validators that only a wrong type brings about, what is wanted."""


def _wanted(kind: str, context: Mapping[str, Any]) -> str:
    return TYPES.get(kind, kind.replace("_", " ")).format(**context)


def _found(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping" if node.entries else "an empty mapping"
    return f"`{node.text}`" if node.is_plain else f'the text "{node.text}"'


def _advice_on_type(kind: str, value: Written, field: FieldInfo | None) -> str:
    node, key = value.place.node, value.place.key
    if kind == "int_type" and isinstance(node, ScalarNode) and not node.is_plain and node.text.isdigit():
        return "remove the quotes"
    if field is None or not field.examples or key is None:
        return "`devmap schema` prints what each key takes"
    example = field.examples[0]
    shown = json.dumps(example) if isinstance(example, (dict, list, bool)) else str(example)
    return f"for example `{key.text}: {shown}`"
