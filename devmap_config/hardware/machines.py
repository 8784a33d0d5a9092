"""Machines by name: `2xrtx-4090`, `rtx-4090+rtx-3090`, `2x24GiB+cpu:64GiB`."""

from __future__ import annotations

import re

from devmap_config.devices import STORAGE_DEVICES, nth_accelerator
from devmap_config.hardware.catalogue import load_catalogue, nearest
from devmap_config.profile.quantities import QuantityError, parse_bytes
from devmap_config.profile.schema import Hardware

PART = re.compile(r"(?:(?P<count>[1-9][0-9]?)x)?(?P<what>[A-Za-z0-9][A-Za-z0-9._-]*)")
STORAGE = re.compile(r"(?P<device>cpu|disk):(?P<memory>.+)")


class UnknownMachineError(ValueError):
    """A text does not name a machine; the message says why."""


def named_machine(text: str) -> Hardware:
    """Return the machine that a text names: devices, joined by `+`.

    Example:
        >>> list(map(str, named_machine("2xrtx-4090+cpu:64GiB").devices.value))
        ['cuda:0', 'cuda:1', 'cpu']

    Raises:
        UnknownMachineError: if the text does not name a machine.
    """
    accelerators: list[tuple[str, dict[str, str]]] = []
    storage: dict[str, dict[str, str]] = {}
    mistakes: list[str] = []
    for part in map(str.strip, text.split("+")):
        try:
            if stored := STORAGE.fullmatch(part):
                storage[stored["device"]] = {"memory": _memory(stored["memory"])}
            else:
                accelerators += _accelerators(part)
        except UnknownMachineError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UnknownMachineError("; ".join(mistakes))
    kinds = list(dict.fromkeys(kind for kind, _ in accelerators if kind))
    if len(kinds) > 1:
        raise UnknownMachineError(f"one machine cannot run {' and '.join(kinds)} devices together")
    kind = kinds[0] if kinds else "cuda"
    if kind == "mps" and len(accelerators) > 1:
        raise UnknownMachineError("a Mac has one `mps` device")
    devices = {str(nth_accelerator(kind, index)): what for index, (_, what) in enumerate(accelerators)}
    return Hardware.model_validate({"devices": devices | dict(sorted(storage.items()))})


def _accelerators(part: str) -> list[tuple[str, dict[str, str]]]:
    """Return the kind and the description of each accelerator that a part of a machine's name lists."""
    if part in map(str, STORAGE_DEVICES):
        raise UnknownMachineError(f"it does not say how much memory its {part} has: write `{part}:64GiB`")
    match = PART.fullmatch(part)
    if match is None:
        raise UnknownMachineError(
            f"`{part}` is not a part of a machine: write `2xrtx-4090`, `2x24GiB` or `cpu:64GiB`, joined by `+`"
        )
    return [_accelerator(match["what"])] * int(match["count"] or 1)


def _accelerator(text: str) -> tuple[str, dict[str, str]]:
    """Return the kind of an accelerator, which is empty if it may be of any kind, and its description."""
    if accelerator := load_catalogue().get(text):
        return accelerator.kind, {"accelerator": accelerator.name}
    try:
        return "", {"memory": _memory(text)}
    except UnknownMachineError:
        if text[0].isdigit() and not text.isdigit() and nearest(text) is None:
            raise
        if text.isdigit() and len(text) < 4 and nearest(text) is None:
            raise UnknownMachineError(f"`{text}` has no unit: write `{text}GiB`") from None
        close = nearest(text)
        advice = f"did you mean `{close}`?" if close else "`devmap hardware` lists them"
        raise UnknownMachineError(f"the catalogue has no accelerator `{text}` ({advice})") from None


def _memory(text: str) -> str:
    try:
        if isinstance(parse_bytes(text), int) and not text.isdigit():
            return text
    except QuantityError as error:
        raise UnknownMachineError(f"{error.message}: {error.help}") from None
    raise UnknownMachineError(f"`{text}` is not an amount of memory: write `24GiB`")
