"""Which of a machine's cards CUDA shows a process, and in which order: `CUDA_VISIBLE_DEVICES`, `CUDA_DEVICE_ORDER`.

After NVIDIA's description of these variables, and torch's reading of it where that says nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devmap_config.probe.nvml import Card

LEGACY_SLICE = re.compile(r"MIG-(?P<card>GPU-[^/]+)/(?P<gpu_instance>[0-9]+)/(?P<compute_instance>[0-9]+)")


@dataclass(frozen=True)
class Visible:
    """The cards that CUDA numbers 0, 1, …, as far as can be told without asking it: `is_certain` says how far."""

    cards: tuple[Card, ...]
    is_certain: bool = True


def visible_cards(cards: Sequence[Card], environment: Mapping[str, str]) -> Visible:
    """What a process sees of cards that are given in the order of the PCI bus.

    It cannot be told where CUDA numbers unlike cards by their speed, which is its default, and which of several MIG
    slices it takes: older drivers show a process one at most.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and not listed.strip():
        return Visible(())
    if listed is None:
        return _all(cards, environment)
    first = listed.strip()
    if first.startswith("MIG-"):
        return _slices(cards, _with_prefix(first, "MIG-"))
    if first.startswith("GPU-"):
        return _by_uuid(cards, _with_prefix(first, "GPU-"))
    return _by_index(cards, first, environment)


def _all(cards: Sequence[Card], environment: Mapping[str, str]) -> Visible:
    if any(card.is_partitioned for card in cards):
        return _with_partitions(cards)
    return Visible(tuple(cards), _order_is_known(cards, environment))


def _order_is_known(cards: Sequence[Card], environment: Mapping[str, str]) -> bool:
    """The fastest come first unless the bus decides: equal cards are by the bus either way."""
    if environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return True
    return len({(card.name, card.memory_bytes) for card in cards}) <= 1


def _with_partitions(cards: Sequence[Card]) -> Visible:
    """Where a slice is seen, whole cards are not, and of several slices the first: so NVIDIA's guide, for now."""
    slices = [part for card in cards for part in card.slices]
    if not slices:
        whole = tuple(card for card in cards if not card.is_partitioned)
        return Visible(whole, is_certain=len(whole) <= 1)
    return Visible(tuple(slices[:1]), is_certain=len(slices) == 1 and all(card.is_partitioned for card in cards))


def _with_prefix(listed: str, prefix: str) -> list[str]:
    """The identifiers up to the first of another sort; none where one stands twice."""
    found: list[str] = []
    for each in (part.strip() for part in listed.split(",")):
        if each in found:
            return []
        if not each.startswith(prefix):
            break
        found.append(each)
    return found


def _by_uuid(cards: Sequence[Card], wanted: Sequence[str]) -> Visible:
    found: list[Card] = []
    for each in wanted:
        matching = [card for card in cards if card.uuid.startswith(each)]
        if len(matching) != 1:  # unknown or ambiguous: it and what follows are not seen
            break
        if matching[0] in found:
            return Visible(())
        found.append(matching[0])
    if any(card.is_partitioned for card in found):
        return _with_partitions(found)
    return Visible(tuple(found))


def _by_index(cards: Sequence[Card], listed: str, environment: Mapping[str, str]) -> Visible:
    everything = _all(cards, environment)
    found: list[Card] = []
    for each in listed.split(","):
        index = _leading_number(each.strip())
        if index is None or not 0 <= index < len(everything.cards):
            break
        if everything.cards[index] in found:
            return Visible(())
        found.append(everything.cards[index])
    return Visible(tuple(found), everything.is_certain)


def _leading_number(text: str) -> int | None:
    """As C reads it: `1gpu` is 1."""
    match = re.match(r"[+-]?[0-9]+", text)
    return int(match[0]) if match else None


def _slices(cards: Sequence[Card], wanted: Sequence[str]) -> Visible:
    found: list[Card] = []
    for each in wanted:
        matching = [part for card in cards for part in card.slices if _is_named(part, card, each)]
        if len(matching) != 1:
            break
        if matching[0] in found:
            return Visible(())
        found.append(matching[0])
    return Visible(tuple(found[:1]), is_certain=len(found) <= 1)


def _is_named(part: Card, card: Card, wanted: str) -> bool:
    """By its own identifier, or as drivers before R470 name it: by its card's, and two numbers."""
    if legacy := LEGACY_SLICE.fullmatch(wanted):
        instance = (int(legacy["gpu_instance"]), int(legacy["compute_instance"]))
        return card.uuid.startswith(legacy["card"]) and part.instance == instance
    return part.uuid.startswith(wanted)
