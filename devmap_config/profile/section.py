"""`Section`: a part of a profile, whose fields are validated one by one, so that all errors come at once.

A wrong value is reported at its place, and the default is used instead.
"""

from __future__ import annotations

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
from pydantic_core import PydanticOmit

from devmap_config.profile.document import MappingNode
from devmap_config.profile.located import NOWHERE, Located, Place, Written, WrittenMapping, at
from devmap_config.profile.refusals import REFUSED, Refusals, fields_by_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic.functional_validators import ModelWrapValidatorHandler
    from typing_extensions import Self

    from devmap_config.diagnostics.diagnostic import Span


class Section(BaseModel):
    """The base of all sections of a profile: frozen, without unknown keys, and with a place in the document."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    STAND_INS: ClassVar[Mapping[str, object]] = {}
    """The substitute for each required key that is missing or wrong, so that the rest can be checked."""

    ALTERNATIVES: ClassVar[Mapping[str, str]] = {}
    """By required key, the key that may be written instead of it; the required one is then an empty mapping."""

    _place: Place = PrivateAttr(default_factory=lambda: NOWHERE)  # a factory, because pydantic would copy a default
    _doubtful: frozenset[str] = PrivateAttr(default_factory=frozenset)

    @property
    def span(self) -> Span:
        """The place of the section."""
        return self._place.span

    @property
    def key_span(self) -> Span:
        """The place of the key before it."""
        return self._place.key_span

    @property
    def doubtful(self) -> frozenset[str]:
        """The keys whose values are unknown: something in them was wrong, or an unknown key was meant for them."""
        return self._doubtful

    def changed(self, **values: object) -> Self:
        """Return the section with other values, each at the place of the old one."""
        for name, value in values.items():
            if isinstance(before := getattr(self, name), Located):
                values[name] = Located(value, before.place)
        return self.model_copy(update=values)

    def remember(self, place: Place, doubtful: frozenset[str]) -> None:
        """Note where the section was read, and which of its keys are in doubt."""
        self._place, self._doubtful = place, doubtful

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, value: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(value, Written):
            return handler(value)
        refusals = cast("Refusals", info.context)
        section = handler(cls._data(value, refusals) if isinstance(value, WrittenMapping) else value)
        section.remember(value.place, refusals.doubtful_keys(value.place.route))
        return section

    @classmethod
    def _data(cls, value: WrittenMapping, refusals: Refusals) -> dict[str, object]:
        """Return the data to validate: the values of known keys, and defaults with their places."""
        refusals.check_keys(cls, value)
        place, fields = Place(value.place.node, route=value.place.route), fields_by_key(cls)
        defaults = {key: _default(field, place, refusals) for key, field in fields.items() if not field.is_required()}
        located = {key: default for key, default in defaults.items() if isinstance(default, (Located, Section))}
        others: dict[str, object] = {
            key: Located({}, value[other].place) for key, other in cls.ALTERNATIVES.items() if other in value
        }
        return {**cls.STAND_INS, **others, **located, **{key: item for key, item in value.items() if key in fields}}

    @field_validator("*", mode="wrap")
    @classmethod
    def _or_default(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if not isinstance(value, Written):
                raise
            name, refusals = str(info.field_name), cast("Refusals", info.context)
            refusals.refuse(error, value, cls.model_fields[name])
            if name in cls.STAND_INS:
                return handler(cls.STAND_INS[name])
            if cls.model_fields[name].is_required():
                raise REFUSED from None
            return _default(cls.model_fields[name], value.place, refusals)


def _default(field: FieldInfo, place: Place, refusals: Refusals) -> object:
    """Return the default of a field at a place: that of the section, or of the wrong value that it replaces."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, Section):
        empty = Place(MappingNode((), place.span), route=place.route)
        return kind.model_validate(at(WrittenMapping(), empty), context=refusals)
    return Located(field.default.value, place) if isinstance(field.default, Located) else field.default


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
"""An item of a list or mapping that is reported and left out if it is wrong."""
