"""The JSON Schemas that editors and validators read, generated from the models."""

from __future__ import annotations

import ast
import inspect
import itertools
from functools import cache
from typing import TYPE_CHECKING, Any

from devmap_config.profile import schema as schema_module
from devmap_config.profile.device_names import HOST_NAME
from devmap_config.profile.field_types import (
    BANDWIDTH,
    DEVICE_KEY_PATTERN,
    HOST_DEVICE_KEY_PATTERN,
    HOST_PATTERN,
    TEMPLATE_SCHEMA,
)
from devmap_config.profile.schema import Adapter, Assistant, Cache, DeviceSection, Hardware, Link, Network, Profile

if TYPE_CHECKING:
    from pydantic import BaseModel

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
"""The draft that yaml-language-server reads."""

Schema = dict[str, Any]


def profile_schema() -> Schema:
    """Return the schema of a profile file, in draft 7.

    A template may stand for any scalar, and `null` for the value of any key, which removes an inherited one. Required
    keys may be missing, as a file that this one extends may have them.
    """
    schema = as_draft7(Profile.model_json_schema(by_alias=True))
    definitions = schema["definitions"]
    for section, definition in {Profile.__name__: schema, **definitions}.items():
        _describe(definition["properties"], section)
    _set_keys(definitions["Hardware"]["properties"]["devices"], DEVICE_KEY_PATTERN)
    _set_keys(definitions["HostSection"]["properties"]["devices"], HOST_DEVICE_KEY_PATTERN)
    definitions["Hardware"]["properties"]["hosts"]["propertyNames"] = {"pattern": f"^{HOST_NAME.pattern}$"}
    of_hosts = HOST_DEVICE_KEY_PATTERN.replace("^", "").replace("$", "")
    caps = f"{DEVICE_KEY_PATTERN}|^{HOST_PATTERN.removesuffix('?')}({of_hosts})$"
    _set_keys(definitions["PlacementSection"]["properties"]["max_memory"], caps)
    for definition in (schema, *definitions.values()):
        _nullable(definition)
    definitions["DeviceSection"] = {
        "anyOf": [{"type": "string"}, definitions["DeviceSection"]],
        "description": DeviceSection.__doc__,
    }
    for section in (Adapter, Assistant):
        definition = definitions[section.__name__]
        definitions[section.__name__] = {"anyOf": [{"type": "string"}, definition], "description": section.__doc__}
    for link in (Link, Network):
        definition = definitions[link.__name__]
        definitions[link.__name__] = {
            "anyOf": [*BANDWIDTH.schemas, TEMPLATE_SCHEMA, definition],
            "description": link.__doc__,
        }
    definitions["Cache"] = {
        "anyOf": [definitions["Cache"]["properties"]["implementation"]["anyOf"][0], definitions["Cache"]],
        "description": Cache.__doc__,
    }
    schema["patternProperties"] = {"^x-": {"description": "Ignored: a place for YAML anchors."}}
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {
        "required": schema.pop("required"),
        "properties": {
            "model": {"required": definitions["Model"].pop("required")},
            "hardware": {
                "oneOf": [
                    {"required": definitions["Hardware"].pop("required")},
                    *({"required": [other]} for other in Hardware.ALTERNATIVES.values()),
                ]
            },
        },
    }
    return {"$schema": DRAFT_7, "title": "devmap-config profile, version 1", **schema}


def _describe(properties: Schema, section: str) -> None:
    """Give each key the docstring of its field. pydantic could read these too, but would slow down every start."""
    model: type[BaseModel] = getattr(schema_module, section)
    documented = _documented_fields()[section]
    for name, field in model.model_fields.items():
        key = field.alias or name
        if name in documented and key in properties:
            properties[key] = dict(sorted({**properties[key], "description": documented[name]}.items()))


@cache
def _documented_fields() -> dict[str, dict[str, str]]:
    """Return the docstring of each field, by class and name."""
    documented: dict[str, dict[str, str]] = {}
    for section in ast.parse(inspect.getsource(schema_module)).body:
        if isinstance(section, ast.ClassDef):
            fields = documented.setdefault(section.name, {})
            for field, below in itertools.pairwise(section.body):
                if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                    continue
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    fields[field.target.id] = inspect.cleandoc(str(below.value.value))
    return documented


def _set_keys(mapping: Schema, pattern: str) -> None:
    """Allow keys that name devices, or templates."""
    for alternative in mapping.get("anyOf", [mapping]):
        if "additionalProperties" in alternative:
            value = {"anyOf": [alternative["additionalProperties"], {"type": "null"}]}
            alternative["patternProperties"] = {pattern: value, TEMPLATE_SCHEMA["pattern"]: value}
            alternative["additionalProperties"] = False


def _nullable(definition: Schema) -> None:
    for name, schema in definition.get("properties", {}).items():
        if name == "version" or {"type": "null"} in schema.get("anyOf", ()):
            continue
        described = {key: schema.pop(key) for key in ("description", "examples", "default") if key in schema}
        definition["properties"][name] = {"anyOf": [schema, {"type": "null"}], **described}


def as_draft7(value: Any) -> Any:
    """Return the same schema with the keywords of draft 7, without titles that only repeat a key."""
    if isinstance(value, list):
        return [as_draft7(item) for item in value]
    if not isinstance(value, dict):
        return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value
    return {
        ("definitions" if key == "$defs" else key): as_draft7(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str))
    }
