"""`Located`: a value that remembers its place in the YAML, from the document through pydantic's validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, get_args

from pydantic_core import PydanticOmit, core_schema

from devmap_config.profile.document import MappingNode, ScalarNode, SequenceNode, Value, is_null, whole_file

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from devmap_config.diagnostics.diagnostic import Span
    from devmap_config.profile.document import Node


@dataclass(frozen=True)
class Place:
    """The place of a value: its node, the key before it, and its route as a person writes it (`placement.pins[2]`).

    All places are equal, so that comparing values ignores their places.
    """

    node: Node = field(compare=False)
    key: ScalarNode | None = field(default=None, compare=False)
    route: str = field(default="", compare=False)

    @property
    def span(self) -> Span:
        """The place of the value."""
        return self.node.span

    @property
    def key_span(self) -> Span:
        """The place of the key before the value; of the value where there is none."""
        return (self.key or self.node).span


NOWHERE = Place(MappingNode((), whole_file("")))
"""The place of values that are in no file, such as a machine that is named on the command line."""


class Written:
    """A value as the document has it, for pydantic to validate."""

    place: Place


class WrittenText(Written, str):
    """A scalar: the type of the field that it fills decides whether an unquoted one is text or a number."""

    @property
    def value(self) -> Value:
        """The value that YAML reads, whatever the type of the field."""
        node = self.place.node
        return node.value if isinstance(node, ScalarNode) else str(self)

    @property
    def is_unrendered(self) -> bool:
        """True if the text is no value, which was reported already."""
        node = self.place.node
        return isinstance(node, ScalarNode) and node.is_unrendered


class WrittenList(Written, list[Written]):
    """A list."""


class WrittenMapping(Written, dict[str, Written]):
    """A mapping, without the keys that have no value: writing them is the same as leaving them out."""


class WrittenNothing(Written):
    """No value at all: a `null` in a list, or a template that could not be rendered."""

    value = None

    def __str__(self) -> str:
        return "null"


AnyWritten = TypeVar("AnyWritten", bound=Written)


def at(value: AnyWritten, place: Place) -> AnyWritten:
    """Return a value with its place set."""
    value.place = place
    return value


def written(node: Node, route: str = "", key: ScalarNode | None = None) -> Written:
    """Return a node as values of builtin types that know their places."""
    place = Place(node, key, route.removeprefix("."))
    if isinstance(node, SequenceNode):
        return at(WrittenList(written(item, f"{route}[{index}]") for index, item in enumerate(node.items)), place)
    if isinstance(node, MappingNode):
        values = (
            (
                at(WrittenText(entry.key.text), Place(entry.key)),
                written(entry.value, f"{route}.{entry.key.text}", entry.key),
            )
            for entry in node.entries
            if not is_null(entry.value)
        )
        return at(WrittenMapping(values), place)
    return at(WrittenNothing() if is_null(node) or node.is_unrendered else WrittenText(node.text), place)


T_co = TypeVar("T_co", covariant=True)


class Located(Generic[T_co]):
    """A value of a profile and its place; a value that is not in the file, such as a default, has that of its section.

    Two are equal if their values are.
    """

    # Not a dataclass, because pydantic would make a schema of its own for it.

    def __init__(self, value: T_co, place: Place = NOWHERE) -> None:
        self.value: Final = value
        self.place: Final = place

    def __eq__(self, other: object) -> bool:
        return self.value == other.value if isinstance(other, Located) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"Located({self.value!r})"

    @property
    def span(self) -> Span:
        """The place of the value."""
        return self.place.span

    @property
    def key_span(self) -> Span:
        """The place of the key before the value; of the value where there is none."""
        return self.place.key_span

    def span_within(self, start: int, end: int) -> Span:
        """Return the place of characters `start` to `end` (exclusive) of a text, or of the whole text."""
        node = self.place.node
        return node.span_within(start, end) if isinstance(node, ScalarNode) else self.span

    @property
    def is_written(self) -> bool:
        """True if the value stands under a key in the file, and is not a default."""
        return self.place.key is not None

    @property
    def path(self) -> Path:
        """The path that a text names, relative to the file that writes it."""
        return Path(self.span.file).parent / str(self.value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate and dump like the value itself."""
        held = get_args(source)
        inner = handler.generate_schema(held[0]) if held else core_schema.any_schema()

        def locate(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Located[Any]:
            if isinstance(value, Located):
                return value
            if isinstance(value, WrittenText) and value.is_unrendered:
                raise PydanticOmit  # here, because a function that a validator calls cannot omit a key
            return Located(validate(value), value.place if isinstance(value, Written) else NOWHERE)

        dump = core_schema.wrap_serializer_function_ser_schema(
            lambda located, serialize: serialize(located.value), schema=inner
        )
        return core_schema.no_info_wrap_validator_function(locate, inner, serialization=dump)
