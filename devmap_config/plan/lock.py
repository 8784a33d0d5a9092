"""The lockfile: a plan with digests of all that it was made from, one assignment a line, reviewed in git."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from devmap_config.graph.digest import digest
from devmap_config.graph.source import Resolved
from devmap_config.graph.vendoring import beside
from devmap_config.placement.assignment import Assignment
from devmap_config.plan.plan import DeviceUse, Plan, Prediction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.graph.model import ModelGraph
    from devmap_config.placement.executor import Executor
    from devmap_config.plan.values import Values

LOCK_VERSION = 1
"""2 keeps the values of what a plan was made from beside their digests; a lock of 1 is read without them."""


class LockError(Exception):
    """A lock cannot be had; the text says why, as the predicate of its file's name. `code` is a diagnostic's."""

    def __init__(self, message: str, code: str = "unreadable-lock") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Inputs:
    """Digests of the parsed values that a plan was made from. `commit` is what the model's revision resolved to.

    `values` are those values by input and route, for all but the module tree, which is too large.
    """

    profile: str
    config: str
    graph: str
    hardware: str
    commit: str | None = None
    values: Mapping[str, Values] = field(default_factory=dict)

    def to_json(self) -> dict[str, str | None]:
        """The digests as they stand in the lock."""
        return {
            "commit": self.commit,
            "config": self.config,
            "graph": self.graph,
            "hardware": self.hardware,
            "profile": self.profile,
        }


@dataclass(frozen=True)
class Lock:
    """The content of a lockfile. What it was made from is judged by `inputs`; `values` tell what changed.

    `hardware` says what each accelerator was taken for; older locks have none.
    """

    plan: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    variables: Mapping[str, str]
    made_with: Mapping[str, str | None]
    values: Mapping[str, Values] = field(default_factory=dict)
    hardware: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def resolved(self) -> Resolved | None:
        """What the model's revision was resolved to, for the source and the revision that it was then."""
        commit = self.inputs.get("commit")
        if commit is None or "profile" not in self.values:
            return None if commit is None else Resolved(commit)
        source, revision = (self.values["profile"].get(f"model.{key}") for key in ("source", "revision"))
        return Resolved(commit, str(source), None if revision is None else str(revision))

    def to_text(self) -> str:
        """The file: canonical JSON, the same bytes for the same plan on any machine."""
        body = {
            "lock_version": LOCK_VERSION,
            "inputs": dict(self.inputs),
            "plan": dict(self.plan),
            "set": dict(self.variables),
            "values": {name: dict(values) for name, values in self.values.items()},
            **({"hardware": dict(self.hardware)} if self.hardware else {}),
        }
        text = {**body, "digest": digest(body), "made_with": dict(self.made_with)}
        return json.dumps(text, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def lock_path(profile: Path) -> Path:
    """`x.lock.json` beside `x.yaml` or `x.yaml.j2`."""
    return beside(profile, ".lock.json")


def lock_of(
    plan: Plan,
    inputs: Inputs,
    variables: Mapping[str, str],
    made_with: Mapping[str, str | None],
    hardware: Mapping[str, Mapping[str, Any]] | None = None,
) -> Lock:
    """The lock of a plan that was just made."""
    return Lock(
        plan=plan.to_json(),
        inputs=inputs.to_json(),
        variables=variables,
        made_with=made_with,
        values=inputs.values,
        hardware=hardware or {},
    )


def lock_at(path: Path) -> Lock:
    """The lock in a file.

    Raises:
        LockError: where there is none (`missing-lock`), or none that can be read.
    """
    try:
        return read_lock(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LockError("does not exist", "missing-lock") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise LockError(f"cannot be read: {reason}") from error


def read_lock(text: str) -> Lock:
    """The lock that a text holds.

    Raises:
        LockError: where it is damaged or was changed by hand (`unreadable-lock`), or comes from a newer devmap-config
            (`newer-lock`).
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        if CONFLICT_MARK.search(text):
            raise LockError("holds the marks of a merge conflict") from error
        raise LockError(f"is not JSON: it was cut off, or changed by hand ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("lock_version"), int):
        raise LockError("is not a lock: it has no `lock_version`")
    if value["lock_version"] > LOCK_VERSION:
        raise LockError(
            f"has lock_version {value['lock_version']}, and this devmap-config reads up to {LOCK_VERSION}", "newer-lock"
        )
    stated = value.pop("digest", None)
    made_with = value.pop("made_with", {})
    if stated != digest(value):
        raise LockError("does not agree with its own digest: it was changed by hand, or is damaged")
    try:
        return Lock(
            plan=value["plan"],
            inputs=value["inputs"],
            variables=value["set"],
            made_with=made_with,
            values=value.get("values", {}),
            hardware=value.get("hardware", {}),
        )
    except KeyError as error:
        raise LockError(f"is not a lock: it has no `{error.args[0]}`") from error


CONFLICT_MARK = re.compile("^(<{7}|={7}|>{7})", re.MULTILINE)
"""What git leaves in a file that it could not merge."""

INPUT_NAMES = {
    "commit": "the commit that the model's revision resolves to",
    "config": "the model's config",
    "graph": "the model's module tree",
    "hardware": "the hardware",
    "profile": "the profile",
}


def plan_of(lock: Lock, graph: ModelGraph, executor: Executor) -> Plan:
    """The plan that a lock holds, over the graph of its model; where it says nothing else, run by this executor.

    Raises:
        LockError: where it names units that this model does not have.
    """
    value = lock.plan
    executor = replace(executor, offload_buffers=bool(value.get("offload_buffers", executor.offload_buffers)))
    kind = str(value["main_device"]).partition(":")[0] if ":" in str(value["main_device"]) else "cuda"
    listed = {use["id"] for use in value["devices"]}
    assignments = []
    for unit, device in value["device_map"].items():
        if unit in graph.modules:
            tensors = tuple(tensor.name for tensor in graph.modules[unit].tensors())
        elif unit in graph.tensors:
            tensors = (unit,)
        else:
            raise LockError(f"it places `{unit}`, which {graph.class_name} does not have")
        stored_on = f"{kind}:{device}" if isinstance(device, int) else device
        if stored_on not in listed:
            raise LockError(f"it places `{unit}` on {stored_on}, which is not among its devices")
        compute = value["compute"].get(unit)
        executes_on = executor.executes_on(stored_on, value["main_device"], compute)
        assignments.append(Assignment(unit, tensors, stored_on, executes_on))
    order = {name: position for position, name in enumerate(graph.tensors)}
    return Plan(
        strategy=value["strategy"],
        executor=executor,
        main_device=value["main_device"],
        assignments=tuple(sorted(assignments, key=lambda each: order[each.tensors[0]] if each.tensors else -1)),
        devices=tuple(
            DeviceUse(**{name: count for name, count in use.items() if name != "free_bytes"})
            for use in value["devices"]
        ),
        prediction=Prediction(**value["prediction"]),
        measured=value["measured"],
    )
