"""Describes the changes of a lock's inputs: which input changed, and which of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devmap_config.devices import Device
from devmap_config.graph.cache import library_versions
from devmap_config.plan.lock import INPUT_NAMES
from devmap_config.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.plan.lock import InputDigests, Lock
    from devmap_config.plan.values import Scalar, Values

WORTH_SEPARATORS = 10_000

MODEL = (("config", ""), ("commit", ""), ("profile", "model."), ("profile", "workload."))

CAUSES = {
    "graph": MODEL,
    "measurement": MODEL,
    "hardware": (("profile", "hardware."), ("profile", "placement.max_memory.")),
}
"""The values that an input follows from; if one of them changed, only that is reported."""


def changed_inputs(
    lock: Lock, inputs: InputDigests, variables: Mapping[str, str], hosts: Iterable[str | None] = ()
) -> tuple[str, ...]:
    """Return a phrase for each input that changed, with values if the lock has them; empty if the lock is fresh.

    Args:
        lock: the lock.
        inputs: the present inputs.
        variables: the present `--set` values.
        hosts: the present hosts, whose order is not among the values.
    """
    now = inputs.to_json()
    changed = [name for name in INPUT_NAMES if lock.inputs.get(name) != now.get(name)]
    values = {
        name: _changes(lock.values[name], inputs.values.get(name, {})) if name in lock.values else {}
        for name in changed
    }
    if "commit" in changed:
        values["commit"] = {"": f"{_value_in_words(lock.inputs.get('commit'))} → {_value_in_words(now['commit'])}"}
    if "hardware" in changed and not values["hardware"]:
        values["hardware"] = _change_of_order(lock, hosts)
    phrases = [_phrase(INPUT_NAMES[name], values[name]) for name in changed if not _follows(name, values)]
    if set(changed) <= {"graph", "measurement"} and phrases and (versions := changed_versions(lock)):
        phrases = [f"{phrases[0]} ({versions})"]
    if dict(lock.variables) != dict(variables):
        phrases.append(_phrase("the `--set` values", _changes(lock.variables, variables)))
    return tuple(phrases)


def _change_of_order(lock: Lock, hosts: Iterable[str | None]) -> dict[str, str]:
    """Return the change in the order of the hosts, by which they get layers; empty if it is the same."""
    devices = (Device.from_text(use["id"]) for use in lock.plan["devices"])
    before, after = (
        ", ".join(map(str, dict.fromkeys(names))) for names in ((device.host for device in devices), hosts)
    )
    return {} if before == after else {"hosts": f"in another order: {before} → {after}"}


def _changes(before: Values, after: Values) -> dict[str, str]:
    """Return each value that changed, by its route, as `80 → 81`."""
    routes = [*before, *(route for route in after if route not in before)]
    return {
        route: _change(route, before, after)
        for route in routes
        if (route in before) != (route in after) or before[route] != after[route]
    }


def _change(route: str, before: Values, after: Values) -> str:
    if route not in before:
        return f"is new: {_value_in_words(after[route])}"
    if route not in after:
        return f"is gone: it was {_value_in_words(before[route])}"
    return f"{_value_in_words(before[route])} → {_value_in_words(after[route])}"


def _phrase(name: str, changes: Mapping[str, str]) -> str:
    """Return a phrase such as `the model's config: `num_hidden_layers` 80 → 81`, without values if they are unknown."""
    if not changes:
        return f"{name} changed"
    return f"{name}: {first_of([f'`{route}` {change}' if route else change for route, change in changes.items()])}"


def _follows(name: str, values: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether an input changed only because of another one that is reported already."""
    if name == "measurement" and "graph" in values:
        return True
    return any(route.startswith(prefix) for cause, prefix in CAUSES.get(name, ()) for route in values.get(cause, {}))


def changed_versions(lock: Lock) -> str:
    """Return the versions of the libraries that read and measured the model before and now, if they differ."""
    now = library_versions()
    changed = [
        f"{name} {before} → {now[name]}"
        for name, before in sorted(lock.made_with.items())
        if before and now.get(name) and before != now[name]
    ]
    return ", ".join(changed)


def _value_in_words(value: Scalar) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:,}" if isinstance(value, int) and abs(value) >= WORTH_SEPARATORS else str(value)
