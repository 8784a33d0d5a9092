"""The JSON Schemas that editors and validators read, generated from the models."""

from __future__ import annotations

from typing import Any

from devmap_config.profile.schema import (
    BANDWIDTH_SCHEMA,
    DEVICE_KEY_PATTERN,
    Device,
    Link,
    Profile,
)

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
"""What yaml-language-server reads."""

Schema = dict[str, Any]


def profile_schema() -> Schema:
    """The schema of a profile file, in draft 7.

    A template may stand for any scalar, `null` for any key (it removes an inherited one), and what a file leaves out
    may stand in one that it extends.
    """
    schema = _draft7(Profile.model_json_schema(by_alias=True))
    definitions = schema["definitions"]
    _set_keys(definitions["Hardware"]["properties"]["devices"])
    _set_keys(definitions["PlacementSection"]["properties"]["max_memory"])
    for holder, key in ((schema, "extends"), (definitions["Pin"], "not_on")):
        _one_or_many(holder["properties"], key)
    for definition in (schema, *definitions.values()):
        _nullable(definition)
    definitions["Device"] = {"anyOf": [{"type": "string"}, definitions["Device"]], "description": Device.__doc__}
    definitions["Link"] = {"anyOf": [BANDWIDTH_SCHEMA, definitions["Link"]], "description": Link.__doc__}
    schema["patternProperties"] = {"^x-": {"description": "Ignored: a place for YAML anchors."}}
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {
        "required": schema.pop("required"),
        "properties": {
            "model": {"required": definitions["Model"].pop("required")},
            "hardware": {"required": definitions["Hardware"].pop("required")},
        },
    }
    return {"$schema": DRAFT_7, "title": "devmap-config profile, version 1", **schema}


def _set_keys(mapping: Schema) -> None:
    """Name the devices that may be keys."""
    for alternative in mapping.get("anyOf", [mapping]):
        if "additionalProperties" in alternative:
            value = {"anyOf": [alternative["additionalProperties"], {"type": "null"}]}
            alternative["patternProperties"] = {DEVICE_KEY_PATTERN: value}
            alternative["additionalProperties"] = False


def _one_or_many(properties: Schema, key: str) -> None:
    """A list of one may be written without its brackets."""
    many = properties[key]
    described = {name: many.pop(name) for name in ("description", "examples", "default") if name in many}
    properties[key] = {"anyOf": [many, many["items"]], **described}


def _nullable(definition: Schema) -> None:
    for name, schema in definition.get("properties", {}).items():
        if name == "version" or {"type": "null"} in schema.get("anyOf", ()):
            continue
        described = {key: schema.pop(key) for key in ("description", "examples", "default") if key in schema}
        definition["properties"][name] = {"anyOf": [schema, {"type": "null"}], **described}


def _draft7(value: Any) -> Any:
    """The same schema in the words of draft 7, without titles that only repeat a key."""
    if isinstance(value, list):
        return [_draft7(item) for item in value]
    if not isinstance(value, dict):
        return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value
    return {
        ("definitions" if key == "$defs" else key): _draft7(item)
        for key, item in value.items()
        if not (key == "title" and isinstance(item, str))
    }
