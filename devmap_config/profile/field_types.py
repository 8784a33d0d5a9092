"""The types of a profile's values: how each is read, and its JSON Schema for editors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError, PydanticOmit, core_schema

from devmap_config.devices import Device
from devmap_config.profile.device_names import HOST_NAME, DeviceNameError, expand_devices
from devmap_config.profile.located import WrittenNothing, WrittenText
from devmap_config.profile.quantities import (
    BASES,
    QuantityError,
    Share,
    Spread,
    known_rate,
    parse_bandwidth,
    parse_bytes,
    parse_efficiency,
    parse_flops,
    parse_nanoseconds,
    parse_per_second,
    parse_share,
    parse_spread,
)
from devmap_config.profile.refusals import refusal
from devmap_config.profile.synonyms import quantization_meant
from devmap_config.quantization.registry import METHODS
from devmap_config.wording import closest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

    from devmap_config.diagnostics.codes import ErrorCode

TEMPLATE_SCHEMA = {"type": "string", "pattern": r"\{\{|\{%"}
"""A template may stand for any scalar; the compiler checks the rendered value."""


@dataclass(frozen=True, eq=False)
class Reads:
    """The annotation of a type: the function that reads a written value, and the JSON Schemas of its written forms."""

    read: Callable[[object], object]
    schemas: tuple[Mapping[str, Any], ...]

    def __get_pydantic_core_schema__(self, _: object, __: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate by the function."""
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, _: core_schema.CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        """Allow each of the schemas, or a template."""
        return {"anyOf": [*self.schemas, TEMPLATE_SCHEMA]}


class _OneOrMany:
    """The annotation of a list that may be written without brackets if it has one item."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate a single scalar as a list of it."""
        return core_schema.no_info_before_validator_function(
            lambda value: (value,) if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Allow the list and its item."""
        many = handler(schema)
        return {"anyOf": [many, many["items"]]}


Item = TypeVar("Item")

OneOrMany = Annotated[tuple[Item, ...], _OneOrMany()]
"""A list, which may be written without brackets if it has one item."""


def one_of(
    *choices: str,
    code: ErrorCode = "wrong-type",
    message: str = "{{route}} cannot be `{value}`",
    meant: Callable[[str], str | None] = lambda _: None,
    **context: object,
) -> Reads:
    """Return the annotation of a text that is one of these.

    Args:
        choices: the texts.
        code: the code of the diagnostic for any other text.
        message: its message, with `{value}` for the text.
        meant: returns the advice for a text that is known from other tools.
        context: further context of that error (`refusal`).
    """

    def read(value: object) -> object:
        if isinstance(value, str) and value in choices:
            return str(value)
        close = closest(str(value), choices)
        guess = f"did you mean `{close}`? " if close else ""
        listed = f"one of {', '.join(f'`{choice}`' for choice in choices)}"
        raise refusal(code, message.format(value=value), meant(str(value)) or guess + listed, **context)

    return Reads(read, ({"enum": list(choices)},))


def one_of_or_repository(*choices: str, meant: Callable[[str], str | None]) -> Reads:
    """Return the annotation of a text that is one of these, or names a repository of the hub (`owner/name`)."""
    named = one_of(*choices, meant=meant)
    return Reads(
        lambda value: str(value) if isinstance(value, str) and "/" in value else named.read(value),
        (*named.schemas, {"type": "string", "pattern": "/"}),
    )


def _quantity(parse: Callable[[str], object], *schemas: Mapping[str, Any]) -> Reads:
    def read(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise PydanticCustomError("quantity_type", "a quantity")
        try:
            return parse(str(value).strip())
        except QuantityError as error:
            raise refusal("bad-quantity", error.message, error.help) from None

    return Reads(read, schemas)


def _device(value: object) -> Device:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise PydanticCustomError("device_type", "a device")
    try:
        devices = expand_devices(str(value), "cuda")
    except DeviceNameError as error:
        raise refusal("bad-device-name", error.message, error.help) from None
    if len(devices) > 1:
        message = f"`{value}` names several devices, but only one is allowed here"
        raise refusal("bad-device-name", message, f"write `{devices[0]}`")
    return devices[0]


def _group(value: object) -> tuple[Device, ...]:
    if not isinstance(value, str):
        raise PydanticCustomError("device_type", "a range of devices")
    try:
        return expand_devices(str(value), "cuda")
    except DeviceNameError as error:
        raise refusal("bad-device-name", error.message, error.help) from None


def _named(pattern: str, what: str, help: str) -> Reads:
    """Return the annotation of a name that is passed to other programs."""

    def read(value: object) -> object:
        text = str(value) if isinstance(value, str) else ""
        if not re.fullmatch(pattern, text):
            raise refusal("wrong-type", f"{{route}} is no {what}", help)
        return text

    return Reads(read, (_matching(f"^({pattern})$"),))


ADDRESS = r"[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{1,40}"
"""Matches a host's name or an IP address; an IPv6 address may begin and end with colons."""


def _address(value: object) -> str:
    """Return an address; digits and dots, or anything with colons, must be a valid IP address."""
    text = str(value) if isinstance(value, str) else ""
    is_address = bool(re.fullmatch(ADDRESS, text))
    if is_address and (":" in text or not text.strip("0123456789.")):
        try:
            ip_address(text)
        except ValueError:
            is_address = False
    if not is_address:
        raise refusal("wrong-type", "{route} is not an address", "an IP address or a host's name: `10.0.0.1`")
    return text


def _host_name(value: object) -> str:
    text = str(value)
    if not HOST_NAME.fullmatch(text):
        message = f"`{text}` is not a name of a host"
        raise refusal("wrong-type", message, "letters, digits and `-`, as in `left` or `node-1`")
    return text


def _listed_device(value: object) -> Device:
    if isinstance(value, WrittenText) and value.is_unrendered:
        raise PydanticOmit
    return _device(value)


def _device_or_number(value: object) -> Device | int:
    """Return a device, or a number as it is, because the kind of its device depends on the machine."""
    device = _device(value)
    return int(str(value)) if str(value).isdecimal() else device


def _version(value: object) -> object:
    if str(value) != "1":
        raise refusal("unsupported-version", *unsupported_version(str(value)))
    return 1


def unsupported_version(version: str) -> tuple[str, str]:
    """Return the message and the help for an unsupported version of the language."""
    message = f"version {version} of the profile language is not known"
    return message, "this devmap-config reads `version: 1`; a newer one may read more"


def _quantization_to_write(text: str) -> str | None:
    line = quantization_meant(text)
    return None if line is None else f"write `{line}`"


def _quantization(value: object) -> object:
    if isinstance(value, dict):
        if "method" not in value:
            raise refusal("missing-key", "`method` is missing in {route}", "such as `method: bitsandbytes`")
        QUANTIZATION_METHOD.read(value["method"])
    return _as_yaml_reads(value)


def _as_yaml_reads(value: object) -> object:
    """Return a value, and all values within it, with the types that YAML gives them."""
    if isinstance(value, dict):
        return {str(key): _as_yaml_reads(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_yaml_reads(item) for item in value]
    return value.value if isinstance(value, (WrittenText, WrittenNothing)) else value


def _as_text(value: object) -> object:
    """Return a scalar as it is written, even if YAML reads a number."""
    if isinstance(value, WrittenText) and value.is_unrendered:
        raise PydanticOmit
    return str(value) if isinstance(value, str) else value


def _matching(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


NUMBER: dict[str, Any] = {"type": "number", "minimum": 0}
RATE: dict[str, Any] = {"type": "number", "exclusiveMinimum": 0}
INTEGER: dict[str, Any] = {"type": "integer", "minimum": 0}
POSITIVE = r"(?=[0-9.]*[1-9])[0-9]+(\.[0-9]+)?"
UNITS = "B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB"
RANGE_PATTERN = r"([0-9]{1,4}|\[[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*\])"
DEVICE_KEY_PATTERN = rf"^((cuda|xpu|npu|hpu|mps):)?{RANGE_PATTERN}$|^cpu(:0)?$|^disk$|^mps$"
HOST_DEVICE_KEY_PATTERN = rf"^((cuda|xpu|npu|hpu|mps|cpu):)?{RANGE_PATTERN}$|^cpu$|^disk$|^mps$"
HOST_PATTERN = rf"({HOST_NAME.pattern}/)?"

BASIS = rf"( ({'|'.join(BASES[1:])}))?"
BANDWIDTH = _quantity(known_rate(parse_bandwidth), RATE, _matching(rf"^{POSITIVE} ?(({UNITS})/s)?{BASIS}$"))
QUANTIZATION_METHOD = one_of(*METHODS, meant=_quantization_to_write, key="method")
QUANTIZATION_SCHEMA = {
    "type": "object",
    "required": ["method"],
    "properties": {"method": {"anyOf": [*QUANTIZATION_METHOD.schemas, TEMPLATE_SCHEMA]}},
}

Text = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "number", "boolean"]})]
PatternText = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "integer"]})]
Anything = Annotated[Any, BeforeValidator(_as_yaml_reads), WithJsonSchema({})]
Count = Annotated[
    int,
    Field(strict=True, ge=1),
    BeforeValidator(_as_yaml_reads),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, TEMPLATE_SCHEMA]}),
]
CacheBits = Annotated[
    int,
    Field(strict=True),
    BeforeValidator(_as_yaml_reads),
    WithJsonSchema({"anyOf": [{"enum": [2, 4]}, TEMPLATE_SCHEMA]}),
]
Flag = Annotated[
    bool,
    Field(strict=True),
    BeforeValidator(_as_yaml_reads),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, TEMPLATE_SCHEMA]}),
]
Version = Annotated[int, BeforeValidator(_version), WithJsonSchema({"const": 1})]
Quantity = Annotated[
    int | Share,
    _quantity(parse_bytes, INTEGER, _matching(rf"^[0-9]+(\.[0-9]+)? ?({UNITS}|%)?$")),
    PlainSerializer(lambda value: str(value.fraction) if isinstance(value, Share) else value),
]
ShareOfMemory = Annotated[
    Fraction,
    _quantity(parse_share, NUMBER | {"maximum": 1}, _matching(r"^[0-9]+(\.[0-9]+)?%?$")),
    PlainSerializer(str),
]
Efficiency = Annotated[
    Fraction,
    _quantity(parse_efficiency, RATE | {"maximum": 1}, _matching(rf"^{POSITIVE}%?$")),
    PlainSerializer(str),
]
Bandwidth = Annotated[int, BANDWIDTH]
Flops = Annotated[int, _quantity(known_rate(parse_flops), RATE, _matching(rf"^{POSITIVE} ?([GTP]FLOP/s)?{BASIS}$"))]
PerSecond = Annotated[int, _quantity(known_rate(parse_per_second), RATE, _matching(rf"^{POSITIVE}(/s)?{BASIS}$"))]
DURATION = r"^[0-9]+(\.[0-9]+)? ?(ns|us|µs|ms|s)"
Latency = Annotated[int, _quantity(parse_nanoseconds, _matching(rf"{DURATION}$"))]
Dispatch = Annotated[int, _quantity(known_rate(parse_nanoseconds), _matching(rf"{DURATION}{BASIS}$"))]
SpreadOfRuns = Annotated[Spread, _quantity(parse_spread, _matching(r"^[0-9]+-[0-9]+%$")), PlainSerializer(str)]
ListedDevice = Annotated[Device, Reads(_listed_device, ()), PlainSerializer(str)]
"""A key that names a device; merging has already made it canonical, or reported it."""
NamedDevice = Annotated[
    Device | int,
    Reads(
        _device_or_number,
        (INTEGER, _matching(rf"^{HOST_PATTERN}(((cuda|xpu|npu|hpu|cpu):)?[0-9]+|cpu|disk|mps(:0)?)$")),
    ),
    PlainSerializer(str),
]
DeviceGroup = Annotated[
    tuple[Device, ...],
    Reads(_group, (_matching(rf"^{HOST_PATTERN}((cuda|xpu|npu|hpu|cpu):)?{RANGE_PATTERN}$"),)),
    PlainSerializer(lambda devices: list(map(str, devices))),
]
HostName = Annotated[str, Reads(_host_name, ())]
"""A key that names a host."""
Address = Annotated[str, Reads(_address, (_matching(f"^({ADDRESS})$"),))]
Interface = Annotated[
    str, _named(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]{0,14}", "network interface", "as `ip link` names it: `eth0`")
]
Quantization = Annotated[Mapping[str, Any] | None, BeforeValidator(_quantization), WithJsonSchema(QUANTIZATION_SCHEMA)]
