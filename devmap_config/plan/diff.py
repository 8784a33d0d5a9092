"""What is different between two plans, as data: what moved, what devices hold, what running is predicted to take."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import to_jsonable_python

from devmap_config.devices import Device
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
"""What a plan says of itself as a whole, and what is meant where an older lock says nothing."""

NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Home:
    """Where modules are stored, and whether they compute there though they would run elsewhere."""

    device: Device
    computes_there: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Modules, folded into patterns, that have another home; `None` where a plan does not have them."""

    modules: tuple[str, ...]
    before: Home | None
    after: Home | None


@dataclass(frozen=True, slots=True)
class Change:
    """A value in either plan."""

    before: Any
    after: Any

    @property
    def is_none(self) -> bool:
        """Whether it is the same in both."""
        return bool(self.before == self.after)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two plans side by side. `devices` are all of either, `figures` all of a prediction, `settings` what differs."""

    moves: tuple[Move, ...]
    devices: Mapping[str, Change]
    figures: Mapping[str, Change]
    settings: Mapping[str, Change]

    @property
    def is_none(self) -> bool:
        """Whether the plans are the same."""
        changes = (*self.devices.values(), *self.figures.values())
        return not self.moves and not self.settings and all(change.is_none for change in changes)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "equal": self.is_none,
            "moved": [to_jsonable_python(move, fallback=str) for move in self.moves],
            "devices": [{"id": device, **asdict(change)} for device, change in self.devices.items()],
            "prediction": {name: asdict(change) for name, change in self.figures.items()},
            "settings": {name: asdict(change) for name, change in self.settings.items()},
        }


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Difference:
    """How the second plan differs from the first; both as `Plan.to_json` gives them and locks hold them."""
    uses = [{use["id"]: use for use in plan["devices"]} for plan in (before, after)]
    return Difference(
        moves=_moves(_homes(before), _homes(after)),
        devices={name: Change(uses[0].get(name), uses[1].get(name)) for name in {**uses[1], **uses[0]}},
        figures={name: Change(before["prediction"].get(name), after["prediction"].get(name)) for name in FIGURES},
        settings={
            name: change
            for name, meant in SETTINGS.items()
            if not (change := Change(before.get(name, meant), after.get(name, meant))).is_none
        },
    )


def _homes(plan: Mapping[str, Any]) -> dict[str, Home]:
    """The home of each unit."""
    devices = [Device.from_text(use["id"]) for use in plan["devices"]]
    named = {device.in_device_map: device for device in devices}
    return {
        unit: Home(named.get(name) or Device.from_text(str(name)), unit in plan["compute"])
        for unit, name in plan["device_map"].items()
    }


def _moves(before: Mapping[str, Home], after: Mapping[str, Home]) -> tuple[Move, ...]:
    """What has another home, by where from and where to; a unit that one plan splits is looked at in its parts."""
    moved: dict[tuple[Home | None, Home | None], list[str]] = {}
    for unit in sorted(_finest({*before, *after}), key=_naturally):
        homes = (_home_of(unit, before), _home_of(unit, after))
        if homes[0] != homes[1]:
            moved.setdefault(homes, []).append(unit)
    return tuple(Move(fold_paths(units), *homes) for homes, units in moved.items())


def _finest(units: Iterable[str]) -> set[str]:
    """The units that hold none of the others."""
    finest = set(units)
    holders = {unit[:place] for unit in finest for place, character in enumerate(unit) if character == "."}
    return finest - holders - ({""} if len(finest) > 1 else set())


def _home_of(unit: str, homes: Mapping[str, Home]) -> Home | None:
    """The home of a unit, or of what it is a part of."""
    while unit and unit not in homes:
        unit = unit.rpartition(".")[0]
    return homes.get(unit)


def _naturally(path: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in NUMBER.split(path)]
