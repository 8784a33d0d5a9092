"""The lockfile: a plan with digests of all its inputs, one assignment a line, for review in git."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from devmap_config.devices import nth_accelerator
from devmap_config.diagnostics.diagnostic import DevmapError, Diagnostic, ProfileError
from devmap_config.execution.units import Unit
from devmap_config.files import LOCK, FileError, boundary_of, exists, is_folder, parse_json, read_text, require_regular
from devmap_config.graph.costs import PARTLY
from devmap_config.graph.digest import digest
from devmap_config.graph.source import COMMIT, Resolved
from devmap_config.graph.vendoring import beside
from devmap_config.plan.lock_format import LOCK_VERSION, violations
from devmap_config.wording import closest, first_of, json_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from devmap_config.devices import Device
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.plan.plan import Plan
    from devmap_config.plan.values import Values


LockCode = Literal["missing-lock", "newer-lock", "unreadable-lock"]


class LockError(DevmapError):
    """A lock is missing or cannot be used.

    Attributes:
        code: the code of the diagnostic. The message is a predicate that follows the name of the file.
    """

    def __init__(self, message: str, code: LockCode = "unreadable-lock") -> None:
        super().__init__(message, (Diagnostic.error(code, f"the lock {message}"),))
        self.code = code


@dataclass(frozen=True)
class InputDigests:
    """Digests of the parsed inputs of a plan; if one of them changes, the plan's lock is stale.

    Attributes:
        profile: the profile's values.
        config: the model's config.
        graph: the module tree.
        measurement: the costs that running the model was measured to have, which change with versions of transformers
            more often than the module tree; `None` if `graph` covers both, as in locks of early versions.
        hardware: the machine.
        commit: the commit that the model's revision resolved to.
        checkpoint: the headers of the checkpoint; `None` if it was not at hand.
        adapter: the config of the adapter.
        assistant: the inputs of the draft model.
        values: the parsed values by input and route, to name what changed; not of `graph` and `measurement`, which are
            too large.
    """

    profile: str
    config: str
    graph: str
    measurement: str | None
    hardware: str
    commit: str | None = None
    checkpoint: str | None = None
    adapter: str | None = None
    assistant: str | None = None
    values: Mapping[str, Values] = field(default_factory=dict)

    def to_json(self) -> dict[str, str | None]:
        """Return the digests as the lock stores them; those of adapter and draft model only if there is one."""
        digests = {name: getattr(self, name) for name in INPUT_NAMES}
        return {name: value for name, value in digests.items() if value is not None or name not in OPTIONAL_INPUTS}


@dataclass(frozen=True)
class Lock:
    """The content of a lockfile.

    Attributes:
        plan: the `plan` object.
        inputs: digests by the name of the input. Locks of early versions have one for module tree and measurement
            together, as `graph`.
        variables: the `--set` values.
        made_with: versions of the libraries, for messages.
        values: the parsed values of the inputs, to name what changed; empty in locks of early versions.
        hardware: the properties that each accelerator was assumed to have; empty in locks of early versions.
    """

    plan: Mapping[str, Any]
    inputs: Mapping[str, str | None]
    variables: Mapping[str, str]
    made_with: Mapping[str, str | None]
    values: Mapping[str, Values] = field(default_factory=dict)
    hardware: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_early(self) -> bool:
        """True if one digest covers both module tree and measurement, as in locks of early versions."""
        return "measurement" not in self.inputs

    @property
    def resolved(self) -> Resolved | None:
        """The commit that the model's revision was resolved to, with the source and revision that it is valid for."""
        commit = self.inputs.get("commit")
        if commit is None or "profile" not in self.values:
            return None if commit is None else Resolved(commit)
        source, revision = (self.values["profile"].get(f"model.{key}") for key in ("source", "revision"))
        name = None if revision is None else str(revision)
        if name is not None and COMMIT.fullmatch(name):
            commit = name  # a commit resolves to itself, whatever a lock says
        return Resolved(commit, str(source), name, self.inputs.get("checkpoint"))

    def to_text(self) -> str:
        """Return the text of the file: canonical JSON, with the same bytes for the same plan on every machine."""
        body = {
            "lock_version": LOCK_VERSION,
            "inputs": dict(self.inputs),
            "plan": dict(self.plan),
            "set": dict(self.variables),
            "values": {name: dict(values) for name, values in self.values.items()},
            "hardware": dict(self.hardware),
        }
        text = {**body, "digest": digest(body), "made_with": dict(self.made_with)}
        return json_text(text, sort_keys=True) + "\n"


LOCK_SUFFIX = ".lock.json"

PROFILE_SUFFIXES = (".yaml", ".yml")


def lock_path(profile: Path) -> Path:
    """Return the path of a profile's lock.

    >>> from pathlib import Path
    >>> lock_path(Path("profiles/quickstart.yaml")).as_posix()
    'profiles/quickstart.lock.json'
    """
    return beside(profile, LOCK_SUFFIX)


def profile_of(path: Path) -> Path:
    """Return the profile that a path names: the path itself or, if it is a lock, the profile beside it.

    Raises:
        ProfileError: if there is no such file (`missing-file`), or if the lock may belong to several profiles.
    """
    if path.name.endswith(LOCK_SUFFIX):
        name = path.name.removesuffix(LOCK_SUFFIX)
        beside_it = [candidate for suffix in PROFILE_SUFFIXES if exists(candidate := path.with_name(name + suffix))]
        if len(beside_it) == 1:
            return beside_it[0]
        profiles = " and ".join(f"`{profile.name}`" for profile in beside_it) or f"no `{name}.yaml`"
        raise _missing(f"`{path}` is a lock, and beside it is {profiles}", "name the profile")
    try:
        require_regular(path)
    except FileError as error:
        raise _missing(f"`{path}` {error}", _advice(path)) from None
    return path


def _advice(path: Path) -> str:
    """Return advice on what to name instead of a path that is not a file."""
    if is_folder(path):
        return "name a profile in it; `devmap check` takes folders as well"
    others = path.parent.glob("*") if is_folder(path.parent) else ()
    names = [other.name for other in others if other.name.endswith(PROFILE_SUFFIXES)]
    close = closest(path.name, names)
    return f"did you mean `{path.with_name(close)}`?" if close else "name a profile"


def _missing(message: str, help: str) -> ProfileError:
    return ProfileError((Diagnostic.error("missing-file", message, help=help),))


def lock_of(
    plan: Plan,
    inputs: InputDigests,
    variables: Mapping[str, str],
    made_with: Mapping[str, str | None],
    hardware: Mapping[str, Mapping[str, Any]] | None = None,
) -> Lock:
    """Return the lock of a plan that was just made."""
    return Lock(
        plan=plan.to_json(),
        inputs=inputs.to_json(),
        variables=variables,
        made_with=made_with,
        values=inputs.values,
        hardware=hardware or {},
    )


def lock_at(path: Path, *, allow_outside: bool = False) -> Lock:
    """Read the lock in a file.

    Args:
        path: the lockfile.
        allow_outside: allow it to be a link that leads out of its repository.

    Raises:
        LockError: if it is missing (`missing-lock`) or cannot be read.
    """
    try:
        return read_lock(read_text(path, LOCK, boundary_of(path, allow_outside=allow_outside)))
    except FileError as error:
        raise LockError(str(error), "missing-lock" if error.is_absent else "unreadable-lock") from error


def lock_beside(profile: Path, *, allow_outside: bool) -> Lock | None:
    """Return the lock beside a profile, or `None` if there is none that can be read."""
    try:
        return lock_at(lock_path(profile), allow_outside=allow_outside)
    except LockError:
        return None


def read_lock(text: str) -> Lock:
    """Parse the text of a lock, and check its digest and schema.

    Raises:
        LockError: if it is damaged or was changed by hand (`unreadable-lock`), or comes from a newer devmap-config
            (`newer-lock`).
    """
    value = _parsed(text)
    version = value.get("lock_version") if isinstance(value, dict) else None
    if not isinstance(value, dict) or version is None:
        raise LockError("is not a lock: it has no `lock_version`")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LockError("is not a lock: its `lock_version` is not an integer of at least 1")
    if version > LOCK_VERSION:
        raise LockError(f"has lock_version {version}, and this devmap-config reads up to {LOCK_VERSION}", "newer-lock")
    sealed = {key: part for key, part in value.items() if key not in ("digest", "made_with")}
    if value.get("digest") != digest(sealed):
        raise LockError("does not agree with its own digest: it was changed by hand, or is damaged")
    if mistakes := violations(value):
        raise LockError(f"is not a lock: {first_of(mistakes, separator='; ')}")
    return Lock(
        plan=value["plan"],
        inputs=value["inputs"],
        variables=value["set"],
        made_with=value["made_with"],
        values=value.get("values") or {},
        hardware=value.get("hardware", {}),
    )


def _parsed(text: str) -> Any:
    """Return the JSON value of a text, and refuse mappings with repeated keys."""
    try:
        return parse_json(text, LOCK, object_of=_without_duplicates)
    except FileError as error:
        if CONFLICT_MARK.search(text):
            raise LockError("holds the marks of a merge conflict") from error
        raise LockError(f"{error}: it was cut off, or changed by hand") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise LockError(f"is not a lock: `{twice}` stands in it twice: it was changed by hand")
    return value


CONFLICT_MARK = re.compile("^(<{7}|={7}|>{7})", re.MULTILINE)
"""Matches the conflict markers that git leaves in a file."""

OPTIONAL_INPUTS = ("adapter", "assistant")
"""Inputs that are left out of a lock whose profile does not have them."""

INPUT_NAMES = {
    "adapter": "the adapter's config",
    "assistant": "the draft model",
    "checkpoint": "the names, shapes, dtypes or file sizes of the checkpoint",
    "commit": "the commit that the model's revision resolves to",
    "config": "the model's config",
    "graph": "the model's module tree",
    "hardware": "the hardware",
    "measurement": "what running the model was measured to take",
    "profile": "the profile",
}


def locked_units(
    lock: Lock, graph: ModelGraph, inventory: Inventory
) -> tuple[tuple[Unit, tuple[Device, Device | None]], ...]:
    """Return the decisions of a lock: each unit with the device that stores it and, if the lock says so, the one that
    runs it.

    Everything else in a lock follows from these and from its inputs.

    Raises:
        LockError: if it names units that the model does not have, or devices that the machine does not have.
    """
    devices = {name: device for device in inventory.capacities for name in (device.in_device_map, str(device))}
    compute = lock.plan["compute"]
    units = []
    for name, listed in lock.plan["device_map"].items():
        if name in graph.modules:
            tensors = tuple(tensor.name for tensor in graph.modules[name].tensors())
        elif name in graph.tensors:
            tensors = (name,)
        else:
            raise LockError(f"it places `{name}`, which {graph.class_name} does not have")
        for named in (listed, *([compute[name]] if name in compute else [])):
            if named not in devices:
                device = nth_accelerator(inventory.kind, named) if isinstance(named, int) else named
                raise LockError(f"it places `{name}` on {device}, which is not a device of the profile")
        if not tensors:
            raise LockError(f"it places `{name}`, which holds nothing")
        units.append((Unit(name, tensors), (devices[listed], devices.get(compute.get(name)))))
    for name in compute:
        if name not in lock.plan["device_map"]:
            raise LockError(f"it computes `{name}` somewhere, which it places nowhere")
    order = {name: position for position, name in enumerate(graph.tensors)}
    return tuple(sorted(units, key=lambda unit: order[unit[0].tensors[0]]))


def locked_caches(lock: Lock, graph: ModelGraph) -> tuple[str, ...] | None:
    """Return the modules whose cache a lock has on the CPU, in the order in which they run; `None` if the workload
    decides.

    Raises:
        LockError: if it names modules whose cache cannot be there, or lacks a required statement.
    """
    listed = lock.plan.get("offloaded_caches")
    measurement = graph.measurement
    chooses = measurement is not None and measurement.workload.cache == PARTLY
    if chooses != (listed is not None):
        raise LockError("it does not say whose cache is on the CPU" if chooses else "it says whose cache is on the CPU")
    if measurement is None or listed is None:
        return None
    offloadable = [cost.path for cost in measurement.modules if cost.offloaded_bytes]
    for path in listed:
        if path not in offloadable:
            raise LockError(f"it has the cache of `{path}` on the CPU, which has none that may be there")
    if listed != [path for path in offloadable if path in set(listed)]:
        raise LockError("it does not name the modules whose cache is on the CPU in their order, each once")
    return tuple(listed)
