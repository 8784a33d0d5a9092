"""The committed schemas are current and accept every profile, lock and case, as far as a schema can express it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml
from cases.test_cases import HERE, PAGES
from cases.test_cases import read as read_case
from conftest import REPOSITORY
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from devmap_config.plan.lock_format import lock_schema
from devmap_config.profile.json_schema import profile_schema
from devmap_config.profile.schema import ATTENTIONS

SCHEMAS = REPOSITORY / "schemas"
PROFILES = sorted((REPOSITORY / "profiles").glob("*.yaml"))
LOCKS = sorted((REPOSITORY / "profiles").glob("*.lock.json"))

STRUCTURAL = ("unknown-key", "wrong-type", "unknown-strategy", "unsupported-version", "bad-quantity", "bad-device-name")
"""Codes of what a schema can refuse."""

BEYOND_A_SCHEMA = (
    "bits of a cache that is not quantised",
    "bits of fp8",
    "a range that runs backwards",
    "computed on the disk",
    "a pin on a range of devices",
    "a second mps",
    "half a byte",
    "a share of nothing",
    "a value cannot inject structure",
    "a name cannot inject structure",
    "a template that renders to the wrong type",
    "a merge of what is not a mapping",
    "more than all",
    "010 is ten",
    "a link that does not exist",
    "a prompt that is longer than the context",
    "a base file of another version",
    "two engines at once",
    "an IP address that is none",
    "an address of IPv6 that is none",
)
"""Cases whose mistake takes arithmetic, templates or merging to see."""


@pytest.mark.parametrize(("name", "made"), [("profile.v1", profile_schema()), ("lock.v1", lock_schema())])
def test_the_committed_schemas_are_current(name, made):
    committed = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    assert committed == made, "run `make schemas`"
    jsonschema.Draft7Validator.check_schema(made)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_is_valid_and_names_its_schema(path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../schemas/profile.v1.schema.json\n")
    command = ["check_jsonschema", "--schemafile", SCHEMAS / "profile.v1.schema.json", path]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_lock_is_valid(path):
    jsonschema.validate(json.loads(path.read_text()), lock_schema(), jsonschema.Draft7Validator)


def fields(schema, route=()):
    for name, field in schema.get("properties", {}).items():
        yield (*route, name), field
    for alternative in schema.get("anyOf", ()):
        yield from fields(alternative, route)


def test_every_field_has_a_description_and_an_example():
    schema = profile_schema()
    found = [pair for holder in (schema, *schema["definitions"].values()) for pair in fields(holder)]
    assert [route for route, field in found if not field.get("description")] == []
    sections = {"model", "workload", "hardware", "placement", "offload"}
    assert {route[-1] for route, field in found if not field.get("examples")} == sections


def blocks():
    for file in [*HERE.glob("*.md"), *PAGES.glob("*.md")]:
        for section in re.split(r"^(?=#+ )", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            heading = section.splitlines()[0].lstrip("# ") if section else ""
            for info, text in re.findall(r"^```yaml([^\n]*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
                if info.strip() in ("", "bare"):
                    yield pytest.param(*read_case(text), id=f"{file.stem}: {heading}", marks=()), heading


STRUCTURAL_CASES = [
    param
    for param, heading in blocks()
    if heading not in BEYOND_A_SCHEMA and {code for _, _, code, _ in param.values[1]} & set(STRUCTURAL)
]


@pytest.mark.parametrize(("text", "expected"), STRUCTURAL_CASES)
def test_the_schema_refuses_what_the_compiler_refuses(text, expected):
    value = keyed_by_text(yaml.load(text, Loader=Yaml12Loader))  # noqa: S506 - it is a safe loader
    if isinstance(value, dict):
        value = COMPLETE | value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(value, profile_schema(), jsonschema.Draft7Validator)


COMPLETE = {"version": 1, "model": {"source": "x"}, "hardware": {"devices": {"cpu": {"memory": 1}}}}


def keyed_by_text(value):
    """Return YAML's mappings as JSON's, with text as keys."""
    if isinstance(value, dict):
        return {str(key): keyed_by_text(each) for key, each in value.items()}
    return [keyed_by_text(each) for each in value] if isinstance(value, list) else value


class Yaml12Loader(yaml.SafeLoader):
    """A loader that reads scalars as editors with YAML 1.2 do."""


Yaml12Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("merge", "null", "float")]
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false$"), list("tf"))


def test_attention_names_are_those_of_transformers():
    known = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name}
    assert set(ATTENTIONS) == known | {"eager"}
