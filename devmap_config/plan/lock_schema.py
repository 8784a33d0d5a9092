"""The JSON Schema of lockfiles."""

from __future__ import annotations

from typing import Any

from devmap_config.plan.lock import INPUT_NAMES, LOCK_VERSION

_BYTES = {"type": "integer"}
_COUNT_OR_NULL = {"type": ["integer", "null"]}
_DIGEST = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_DEVICE = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}


def lock_schema() -> dict[str, Any]:
    """The schema of a lockfile, in draft 7."""
    schema: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"devmap-config lock, version {LOCK_VERSION}",
        "description": "Written by `devmap compile`; not to be edited by hand.",
        **_object(
            lock_version={"const": LOCK_VERSION},
            digest=_DIGEST | {"description": "Of everything here but `made_with`."},
            inputs=_object(**{name: _input(name, words) for name, words in INPUT_NAMES.items()}),
            made_with={
                "type": "object",
                "description": "For information: versions of what read the model's tree.",
                "additionalProperties": {"type": ["string", "null"]},
            },
            plan=_plan(),
            set={
                "type": "object",
                "description": "The `--set` values.",
                "additionalProperties": {"type": "string"},
            },
            values=_object(**{name: _values(INPUT_NAMES[name]) for name in ("config", "hardware", "profile")}),
        ),
    }
    schema["properties"]["hardware"] = _hardware()  # locks of before have none
    return schema


def _hardware() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "What each accelerator was taken for; a machine is held to it before it loads.",
        "additionalProperties": _object(
            accelerator={"type": ["string", "null"], "description": "Its name in the catalogue."},
            memory_bytes=_BYTES,
            overhead_bytes=_BYTES | {"description": "What its context and workspaces were expected to take."},
        ),
    }


def _values(words: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": f"The values of {words} by their routes, to say which of them changed.",
        "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
    }


def _input(name: str, words: str) -> dict[str, Any]:
    if name == "commit":
        return {"type": ["string", "null"], "description": words}
    return _DIGEST | {"description": f"A digest of {words}."}


def _plan() -> dict[str, Any]:
    schema = _object(
        strategy={"type": "string"},
        executor={"type": "string"},
        main_device={"type": "string", "description": "Where modules run that are stored on the CPU or the disk."},
        measured={"type": "boolean", "description": "Whether more than weights was measured and budgeted."},
        device_map={"type": "object", "additionalProperties": _DEVICE, "description": "As `from_pretrained` takes it."},
        compute={"type": "object", "additionalProperties": {"type": "string"}},
        devices={
            "type": "array",
            "items": _object(
                id={"type": "string"},
                capacity_bytes=_BYTES,
                weights_bytes=_BYTES,
                kv_cache_bytes=_BYTES,
                activation_bytes=_BYTES,
                overhead_bytes=_BYTES,
                free_bytes=_BYTES,
            ),
        },
        prediction=_object(
            decode_nanoseconds_per_token=_COUNT_OR_NULL,
            bound_decode_nanoseconds_per_token=_COUNT_OR_NULL,
            prefill_nanoseconds=_COUNT_OR_NULL,
            streamed_bytes_per_token=_COUNT_OR_NULL,
            hops=_COUNT_OR_NULL,
            longest_context=_COUNT_OR_NULL,
        ),
    )
    schema["properties"]["offload_buffers"] = {  # locks of before have none
        "type": "boolean",
        "description": "accelerate's argument: whether buffers of streamed modules are streamed as well.",
    }
    return schema


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }
