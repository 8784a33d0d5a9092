"""The format of a lockfile, as a pydantic model that validates locks, and from which the JSON Schema is generated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from devmap_config.profile.json_schema import DRAFT_7, as_draft7

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCK_VERSION = 1

MAX_CHARACTERS = 40
"""The most characters of a wrong value that a message shows."""

Digest = Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
LARGEST = 2**127
"""More than a billion devices of the largest memory of a profile, and still within the range of a float."""

Bytes = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Scalar = str | bool | int | float | None
Name = Annotated[str, Field(min_length=1)]
DeviceName = Annotated[str, Field(pattern="^([A-Za-z0-9-]{1,63}/)?[a-z]+(:[0-9]{1,9})?$")]


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _absent(default: Any, description: str) -> Any:
    """Return the field of a key that may be absent; the schema omits the default, which files never contain."""
    return Field(default=default, description=description, json_schema_extra=_without_default)


class _Part(BaseModel):
    """A part of a lock: all keys are required unless marked otherwise, no others are allowed, and types are strict."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LockedInputs(_Part):
    """Digests of the parsed values that the plan was made from."""

    adapter: Digest = _absent("", "The config of the adapter; absent if there is none.")
    assistant: Digest = _absent("", "The inputs of the draft model; absent if there is none.")
    checkpoint: Digest | None = _absent(
        None, "The checkpoint's names, shapes, dtypes and file sizes; `null` if it was not at hand."
    )
    commit: Commit | None = Field(description="The commit that the model's revision resolves to.")
    config: Digest = Field(description="The model's config.")
    graph: Digest = Field(description="The model's module tree; in early locks, its measurement as well.")
    hardware: Digest = Field(description="The devices and links.")
    measurement: Digest = _absent("", "The measured costs of running the model; absent in early locks.")
    profile: Digest = Field(description="The rendered profile with every file that it extends.")


class MadeWith(_Part):
    """Versions of the libraries that read and ran the model; for information, and outside of the digest."""

    accelerate: str | None
    torch: str | None
    transformers: str | None


class LockedDevice(_Part):
    """The bytes that a device holds while the plan runs, and those that are free."""

    activation_bytes: Bytes
    capacity_bytes: Bytes
    free_bytes: Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
    id: DeviceName
    kv_cache_bytes: Bytes
    loading_bytes: Bytes = _absent(
        0, "The most bytes that it holds while the model is loaded, weights included; absent in early locks."
    )
    overhead_bytes: Bytes
    weights_bytes: Bytes


class LockedPrediction(_Part):
    """The predicted cost of running the plan; `null` if its inputs are not known."""

    bound_decode_nanoseconds_per_token: Count | None = Field(
        description="The lower bound that was proved when the lock was compiled; `null` if none was."
    )
    decode_nanoseconds_per_token: Count | None
    fastest_decode_nanoseconds_per_token: Count = _absent(
        0, "The time of the fastest plan that was found, if other wishes than time chose a slower one."
    )
    fastest_prefill_nanoseconds: Count = _absent(0, "The same for a prefill, if that was the objective.")
    hops: Count | None
    longest_context: Count | None
    prefill_nanoseconds: Count | None
    streamed_bytes_per_token: Bytes | None


class LockedAssistant(_Part):
    """The needs of a draft model, all of which is on one device; the capacity of that device excludes them."""

    activation_bytes: Bytes = Field(description="The bytes while it computes, in turns with the model.")
    class_name: Name
    decode_nanoseconds_per_token: Count | None
    device: DeviceName
    dtype: Name
    kv_cache_bytes: Bytes
    weights_bytes: Bytes


class LockedStage(_Part):
    """Consecutive layers on one device, or on each of a group; all figures are of one rank."""

    activation_bytes: Bytes
    blocks: Count = Field(description="The cache blocks that this rank would have room for by itself.")
    capacity_bytes: Bytes
    decode_nanoseconds: Count | None
    devices: list[DeviceName] = Field(min_length=1)
    first_layer: Count
    last_layer: Count = Field(description="Included.")
    overhead_bytes: Bytes
    page_bytes: Bytes = Field(description="The bytes of a cache block.")
    prefill_nanoseconds: Count | None
    weights_bytes: Bytes


class LockedHost(_Part):
    """One machine of a pipeline: a node of vLLM, whose number is its place in the list."""

    address: str | None
    cache_bytes: Bytes = Field(description="The bytes that each of its ranks gets for its cache.")
    devices: list[DeviceName] = Field(min_length=1)
    interface: str | None
    name: str | None


class LockedPipeline(_Part):
    """The stages of a plan for vLLM, in the order of their ranks."""

    block_size: Count
    blocks: Count = Field(description="The least number of cache blocks that any rank has room for.")
    blocks_per_request: Count
    cache_dtype: Name
    dtype: Name
    hosts: list[LockedHost] = Field(min_length=1)
    kind: Name
    max_model_len: Count
    max_num_batched_tokens: Count
    max_num_seqs: Count
    stages: list[LockedStage] = Field(min_length=1)


class LockedPlan(_Part):
    """The locations of all parts of the model, and what follows from them."""

    assistant: LockedAssistant | None = _absent(None, "The needs of the draft model; absent if there is none.")
    compute: dict[str, DeviceName] = Field(
        description="Parts that the CPU computes beside cards, or that are copied to another card than the first."
    )
    device_map: dict[str, Annotated[int, Field(ge=0, lt=10**9)] | DeviceName] = Field(
        description="The map in the form for `from_pretrained`.", min_length=1
    )
    devices: list[LockedDevice]
    executor: Name
    loading_ram_bytes: Bytes = _absent(0, "The most of the CPU's memory that loading takes; absent in early locks.")
    main_device: DeviceName = Field(description="The device that runs modules which are stored on the CPU or the disk.")
    measured: bool = Field(description="Whether the cache and activations were measured and budgeted.")
    offloaded_caches: list[Name] | None = _absent(
        None, "Modules whose cache is on the CPU while they do not run, if the plan decides that."
    )
    offload_buffers: bool = _absent(
        False, "Whether buffers of streamed modules are streamed as well; absent in early locks."
    )
    pipeline: LockedPipeline | None = _absent(None, "The stages of a plan for vLLM; absent for other engines.")
    prediction: LockedPrediction
    strategy: Name


class LockedAccelerator(_Part):
    """The assumed properties of an accelerator; a machine is checked for them before it loads the plan."""

    accelerator: str | None = Field(description="Its name in the catalogue.")
    memory_bytes: Bytes
    overhead_bytes: Bytes = Field(description="The bytes that its context and workspaces were expected to take.")


class LockedValues(_Part):
    """The values of the inputs by their routes, to report which of them changed."""

    config: dict[str, Scalar]
    hardware: dict[str, Scalar]
    profile: dict[str, Scalar]


class LockFile(_Part):
    """Written by `devmap compile`; not to be edited by hand."""

    digest: Digest = Field(description="The digest of everything here except `made_with`.")
    hardware: dict[str, LockedAccelerator] = _absent(
        {}, "The assumed properties of each accelerator; absent in early locks."
    )
    inputs: LockedInputs
    lock_version: Annotated[int, Field(ge=1, le=LOCK_VERSION)]
    made_with: MadeWith
    plan: LockedPlan
    set: dict[str, str] = Field(description="The `--set` values.")
    values: LockedValues = _absent(
        LockedValues(config={}, hardware={}, profile={}), "The values of the inputs; absent in early locks."
    )


def violations(value: Mapping[str, Any]) -> list[str]:
    """Return the mistakes of a parsed lock, each a phrase with its route; empty if the lock is valid."""
    try:
        LockFile.model_validate(value)
    except ValidationError as error:
        phrases = [
            _phrase(_route(details["loc"], value, details["type"]), details["type"], details["input"])
            for details in error.errors()
        ]
        return list(dict.fromkeys(phrases))  # each alternative type of a value reports the same mistake
    if "measurement" not in value["inputs"]:  # an early lock, which has fewer keys
        return []
    missing = [key for key in ("hardware", "values") if key not in value]
    missing += [f"plan.{key}" for key in ("loading_ram_bytes", "offload_buffers") if key not in value["plan"]]
    missing += [] if "checkpoint" in value["inputs"] else ["inputs.checkpoint"]
    return [f"`{key}` is missing" for key in missing]


def lock_schema() -> dict[str, Any]:
    """Return the JSON Schema of a lockfile, in draft 7."""
    schema = as_draft7(LockFile.model_json_schema())
    return {"$schema": DRAFT_7, "title": f"devmap-config lock, version {LOCK_VERSION}", **schema}


def _phrase(route: str, kind: str, value: object) -> str:
    if kind == "extra_forbidden":
        return f"`{route}` is not a key of a lock"
    if kind == "missing":
        return f"`{route}` is missing"
    text = json.dumps(value)
    return f"`{route}` cannot be {text if len(text) <= MAX_CHARACTERS else f'{text[:MAX_CHARACTERS]}…'}"


def _route(location: tuple[int | str, ...], value: Any, kind: str) -> str:
    """Return the route of a mistake, such as `plan.devices[0].id`, without the types that pydantic appends."""
    text = ""
    for part in location:
        is_there = isinstance(part, int) if isinstance(value, list) else isinstance(value, dict) and part in value
        if not is_there and kind != "missing":
            break
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        value = value[part] if is_there else None
    return text or "the lock"
