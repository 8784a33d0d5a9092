"""The differences between two plans, as data: moved modules, bytes on devices, predicted times."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from devmap_config.amounts import format_bytes
from devmap_config.devices import Device
from devmap_config.plan.plan import OWN
from devmap_config.rules.folding import fold_paths
from devmap_config.wording import number_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from devmap_config.execution.segments import Phase
    from devmap_config.plan.values import Scalar, Values
    from devmap_config.profile.quantities import Basis

    Bases = Mapping[Phase, Basis]

FIGURES = (
    "decode_nanoseconds_per_token",
    "bound_decode_nanoseconds_per_token",
    "prefill_nanoseconds",
    "streamed_bytes_per_token",
    "hops",
    "longest_context",
)
"""The fields of a prediction."""

SETTINGS = {"strategy": None, "executor": None, "offload_buffers": False, "main_device": None, "measured": None}
"""The settings of a plan as a whole, with their values in older locks that lack them."""

NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Home:
    """The store of modules and, if they run elsewhere than usual, the device on which they compute."""

    device: Device
    computes_there: bool = False
    runs_on: Device | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """Modules, folded into patterns, with another home; a home is `None` if that plan does not have them."""

    modules: tuple[str, ...]
    before: Home | None
    after: Home | None


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A value in both plans."""

    before: Any
    after: Any

    @property
    def is_none(self) -> bool:
        """True if the value is the same in both."""
        return bool(self.before == self.after)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two plans side by side. `devices` are all devices of either plan, `figures` all figures of a prediction.

    `settings` are the differences between the plans as a whole, their models and their cards. `basis` is the basis of
    the predicted times by phase, `None` if it is unknown or there is no time. If the models differ, `moves` contains
    only modules that both plans name.
    """

    moves: tuple[Move, ...]
    devices: Mapping[str, ValueChange]
    figures: Mapping[str, ValueChange]
    settings: Mapping[str, ValueChange]
    basis: Mapping[Phase, ValueChange]
    models_differ: bool = False

    @property
    def is_none(self) -> bool:
        """True if the plans are the same."""
        changes = (*self.devices.values(), *self.figures.values())
        return not self.moves and not self.settings and all(change.is_none for change in changes)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "equal": self.is_none,
            "models_differ": self.models_differ,
            "moved": [to_jsonable_python(move, fallback=str) for move in self.moves],
            "devices": [{"id": device, **asdict(change)} for device, change in self.devices.items()],
            "prediction": {name: asdict(change) for name, change in self.figures.items()},
            "basis": {phase: asdict(change) for phase, change in self.basis.items()},
            "settings": {name: asdict(change) for name, change in self.settings.items()},
        }


ASKED = {
    "model": "model.source",
    "revision": "model.revision",
    "class": "model.class",
    "dtype": "model.dtype",
    "quantization": "model.quantization.method",
    "context": "workload.context_length",
    "batch": "workload.batch_size",
}
"""The settings of a profile besides the placement, by name, with their routes."""

VALUES_SHOWN = 3


def made_of(values: Mapping[str, Values], hardware: Mapping[str, Mapping[str, Any]]) -> dict[str, Scalar]:
    """Return the model and the cards that a plan was made for.

    Args:
        values: the values of the inputs in a lock; early locks have none, so that nothing is known.
        hardware: the assumed properties of each accelerator.
    """
    if "profile" not in values:
        return {}
    settings = {name: values["profile"].get(route) for name, route in ASKED.items()}
    config = {f"config.{route}": value for route, value in values.get("config", {}).items()}
    cards = {id: card["accelerator"] or format_bytes(card["memory_bytes"]) for id, card in hardware.items()}
    return settings | config | cards


def _changed_subjects(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> dict[str, ValueChange]:
    """Return the differences of models and cards; of two configs, the first few values, unless the models differ."""
    if not before or not after:
        return {}
    changes = {name: ValueChange(before.get(name), after.get(name)) for name in {**before, **after}}
    changed = {name: change for name, change in changes.items() if not change.is_none}
    of_config = [name for name in changed if name.startswith("config.")]
    left_out = frozenset(of_config if "model" in changed else of_config[VALUES_SHOWN:])
    return {name: change for name, change in changed.items() if name not in left_out}


def _are_other_models(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> bool:
    """Return whether two plans are known to be of different models; one model may have two sources."""
    if not before or not after:
        return False
    if before.get("class") != after.get("class"):
        return True
    configs = [{key: value for key, value in of.items() if key.startswith("config.")} for of in (before, after)]
    return before.get("model") != after.get("model") and (configs[0] != configs[1] or not configs[0])


def bases_in_lock(plan: Mapping[str, Any], values: Mapping[str, Values]) -> Bases:
    """Return the basis of the times of a locked plan, by phase, as far as it follows from the lock.

    A lock does not record the basis of the rates that a profile gives. But rates that the profile does not give are
    stated, and a time is no better than any of its rates: each depends on the host's, or, under vLLM, on the bandwidth
    of a device.

    Args:
        plan: the plan, in the form of its lock.
        values: the values of the inputs in a lock; early locks have none, so that nothing is known.
    """
    given = [route for route in values.get("profile", {}) if route.startswith("hardware.")]
    if "pipeline" in plan:
        takes_given = any(route.endswith(".bandwidth") for route in given if ".devices." in route)
    else:
        takes_given = "hardware.host.dispatch" in given
    if "profile" not in values or takes_given:
        return {}
    return {phase: "stated" for phase, name in OWN.items() if plan["prediction"].get(name) is not None}


def difference(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    made_of: Sequence[Mapping[str, Scalar]] = ({}, {}),
    bases: Sequence[Bases] = ({}, {}),
) -> Difference:
    """Return the differences from one plan to another.

    Args:
        before: the plan, as plain data of `Plan.to_json` or a lock.
        after: the other plan.
        made_of: the model and the cards of each.
        bases: the basis of the times of each, as far as it is known.
    """
    uses = [{use["id"]: use for use in plan["devices"]} for plan in (before, after)]
    homes = [_homes(before), _homes(after)]
    if models_differ := _are_other_models(*made_of):
        homes = [{unit: home for unit, home in of.items() if unit in homes[0] and unit in homes[1]} for of in homes]
    return Difference(
        moves=_moves(*homes),
        devices={name: ValueChange(uses[0].get(name), uses[1].get(name)) for name in {**uses[1], **uses[0]}},
        figures={name: ValueChange(before["prediction"].get(name), after["prediction"].get(name)) for name in FIGURES},
        settings=_changed_subjects(*made_of)
        | _changed_stages(before, after)
        | _changed_caches(before, after)
        | {
            name: change
            for name, meant in SETTINGS.items()
            if not (change := ValueChange(before.get(name, meant), after.get(name, meant))).is_none
        },
        basis={phase: ValueChange(*(side.get(phase) for side in bases)) for phase in OWN},
        models_differ=models_differ,
    )


OTHER_MODELS = "the models differ: of modules, those are compared that both plans name"
"""The sentence about plans of different models."""


def rates_in_words(diff: Mapping[str, Any]) -> str:
    """Return a sentence about the basis of the times of two plans, from a `Difference` as plain data; empty if
    unknown.
    """
    sentences = {side: words for side in ("before", "after") if (words := _rates_of_side(diff, side))}
    if len(set(sentences.values())) == 1:
        return f"these times rest on {next(iter(sentences.values()))}"
    return ", ".join(f"the times {side} rest on {words}" for side, words in sentences.items())


def _rates_of_side(diff: Mapping[str, Any], side: str) -> str:
    words = {}
    for phase, name in OWN.items():
        if diff["prediction"][name][side] is not None:
            basis = diff["basis"][phase][side]
            words[phase] = f"{basis} rates" if basis else "rates of which its lock does not say how they are known"
    if len(set(words.values())) <= 1:
        return next(iter(words.values()), "")
    return " and ".join(f"{rates} in {phase}" for phase, rates in words.items())


def _changed_stages(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, ValueChange]:
    """Return the differences of the stages of two plans for vLLM."""
    stages = [_stages_in_words(plan.get("pipeline")) for plan in (before, after)]
    changes = {name: ValueChange(stages[0].get(name), stages[1].get(name)) for name in {**stages[0], **stages[1]}}
    return {name: change for name, change in changes.items() if not change.is_none}


def _changed_caches(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, ValueChange]:
    """Return the difference of the modules whose cache two plans have on the CPU, if the plans decide that."""
    listed = (plan.get("offloaded_caches") for plan in (before, after))
    caches = [None if paths is None else ", ".join(fold_paths(paths)) or "none" for paths in listed]
    return {} if caches[0] == caches[1] else {"caches on the CPU": ValueChange(*caches)}


def _stages_in_words(pipeline: Mapping[str, Any] | None) -> dict[str, str]:
    if pipeline is None:
        return {}
    layers = (str(stage["last_layer"] - stage["first_layer"] + 1) for stage in pipeline["stages"])
    tokens = pipeline["blocks"] * pipeline["max_model_len"] // max(pipeline["blocks_per_request"], 1)
    hosts = [str(host["name"]) for host in pipeline["hosts"] if host["name"] is not None]
    return {
        "layers by stage": " + ".join(layers),
        "devices of a stage": str(len(pipeline["stages"][0]["devices"])),
        "cache": f"{tokens:,} tokens",
        "requests": f"{pipeline['max_num_seqs']:,} of {pipeline['max_model_len']:,} tokens",
        **({"hosts": ", ".join(hosts)} if hosts else {}),
    }


def _homes(plan: Mapping[str, Any]) -> dict[str, Home]:
    """Return the home of each unit."""
    devices = [Device.from_text(use["id"]) for use in plan["devices"]]
    named = {device.in_device_map: device for device in devices}
    compute = {unit: Device.from_text(device) for unit, device in plan["compute"].items()}
    homes = {}
    for unit, name in plan["device_map"].items():
        device, runs_on = named.get(name) or Device.from_text(str(name)), compute.get(unit)
        computes_there = runs_on == device
        homes[unit] = Home(device, computes_there, None if computes_there else runs_on)
    return homes


def _moves(before: Mapping[str, Home], after: Mapping[str, Home]) -> tuple[Move, ...]:
    """Return the units with another home, by old and new home; a unit that one plan splits is compared in its parts."""
    moved: dict[tuple[Home | None, Home | None], list[str]] = {}
    for unit in sorted(_finest({*before, *after}), key=_naturally):
        homes = (_home_of(unit, before), _home_of(unit, after))
        if homes[0] != homes[1]:
            moved.setdefault(homes, []).append(unit)
    return tuple(Move(fold_paths(units), *homes) for homes, units in moved.items())


def _finest(units: Iterable[str]) -> set[str]:
    """Return the units that hold none of the others."""
    finest = set(units)
    holders = {unit[:place] for unit in finest for place, character in enumerate(unit) if character == "."}
    return finest - holders - ({""} if len(finest) > 1 else set())


def _home_of(unit: str, homes: Mapping[str, Home]) -> Home | None:
    """Return the home of a unit, or of the unit that contains it."""
    while unit and unit not in homes:
        unit = unit.rpartition(".")[0]
    return homes.get(unit)


def _naturally(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 after layer 9."""
    return [(0, part) if (number := number_in(part)) is None else (number, "") for part in NUMBER.split(path)]
