"""Checks that this machine can run a locked plan now; everything that it lacks is a diagnostic."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes
from devmap_config.devices import CPU, DISK, Device
from devmap_config.diagnostics.diagnostic import Diagnostic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.diagnostics.diagnostic import Span
    from devmap_config.plan.lock import Lock
    from devmap_config.probe.machine import SeenMachine


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The memory of one device that a plan needs, and that this machine has; `None` if it is unknown.

    Attributes:
        context_bytes: further memory that the device's driver context is expected to take, and has not taken yet.
    """

    device: Device
    needed_bytes: int
    context_bytes: int = 0
    memory_bytes: int | None = None
    free_bytes: int | None = None
    name: str | None = None
    is_there: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        figures = asdict(self)
        return {"id": str(figures.pop("device")), **figures}


def of_host(lock: Lock, host: str) -> Lock:
    """Return the part of a lock for one of several hosts, with the devices as that host names them."""
    before = f"{host}/"
    own = [use for use in lock.plan["devices"] if use["id"].startswith(before)]
    devices = [{**use, "id": use["id"].removeprefix(before)} for use in own]
    hardware = {id.removeprefix(before): card for id, card in lock.hardware.items() if id.startswith(before)}
    return replace(lock, plan={**lock.plan, "devices": _of_one_cpu(devices), "loading_ram_bytes": 0}, hardware=hardware)


def _of_one_cpu(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return devices with the parts of a CPU, each a share of its memory, joined into one."""
    parts = [use for use in devices if Device.from_text(use["id"]).kind == CPU.kind]
    others = [use for use in devices if use not in parts]
    figures = [key for key in (parts[0] if parts else {}) if key.endswith("_bytes")]
    return [*others, *([{"id": str(CPU), **{key: sum(use[key] for use in parts) for key in figures}}] if parts else [])]


def hosts_of(lock: Lock) -> dict[str, str | None]:
    """Return the hosts of a plan for several, with their addresses; empty if it is for one machine."""
    hosts = (lock.plan.get("pipeline") or {}).get("hosts", ())
    return {host["name"]: host["address"] for host in hosts if host["name"] is not None}


def kind_needed(lock: Lock) -> str | None:
    """Return the kind of the accelerators that a plan uses, if it uses any."""
    return next((device.kind for device in _needs(lock) if device.is_accelerator), None)


def demands(lock: Lock, seen: SeenMachine) -> tuple[Demand, ...]:
    """Return the demand for every device that the plan uses, in the plan's order."""
    return tuple(_demand(device, needed, lock, seen) for device, needed in _needs(lock).items())


def differences(
    lock: Lock, seen: SeenMachine, span: Span | None = None, *, disk_may_be_read_in_place: bool = False
) -> tuple[Diagnostic, ...]:
    """Return the differences that keep this machine from running the plan, as errors, and others as warnings.

    With `disk_may_be_read_in_place`, too little disk is a warning, as weights planned for it may be read from the
    checkpoint without being written again.
    """
    needs = demands(lock, seen)
    findings = [*_missing(lock, seen, needs)]
    if not findings:
        findings += _other_cards(lock, seen)
    for demand in needs:
        if demand.device == DISK:
            findings += _disk(demand, may_be_read_in_place=disk_may_be_read_in_place)
        else:
            findings += _memory(demand)
    return tuple(replace(finding, span=span) for finding in findings)


def _needs(lock: Lock) -> dict[Device, int]:
    """Return the bytes by device, without devices that hold none."""
    parts = ("weights_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
    needs = {
        Device.from_text(use["id"]): max(sum(use[part] for part in parts), use.get("loading_bytes", 0))
        for use in lock.plan["devices"]
    }
    needs.setdefault(CPU, lock.plan.get("loading_ram_bytes", 0))
    if (draft := lock.plan.get("assistant")) is not None:
        device = Device.from_text(draft["device"])
        needs[device] = needs.get(device, 0) + draft["weights_bytes"] + draft["kv_cache_bytes"]
    return {device: needed for device, needed in needs.items() if needed}


def _demand(device: Device, needed_bytes: int, lock: Lock, seen: SeenMachine) -> Demand:
    if device == CPU:
        host = seen.host
        return Demand(
            device=device,
            needed_bytes=needed_bytes,
            memory_bytes=host.memory_bytes,
            free_bytes=host.available_bytes,
            name=host.name,
        )
    if device == DISK:
        free_bytes = None if seen.disk is None else seen.disk.free_bytes
        return Demand(device=device, needed_bytes=needed_bytes, memory_bytes=free_bytes, free_bytes=free_bytes)
    card = next((card for card in seen.accelerators if card.id == device), None)
    if card is None:
        return Demand(device=device, needed_bytes=needed_bytes, is_there=False)
    return Demand(
        device=device,
        needed_bytes=needed_bytes,
        context_bytes=0 if card.has_context else lock.hardware.get(str(device), {}).get("overhead_bytes", 0),
        memory_bytes=card.memory_bytes,
        free_bytes=card.free_bytes,
        name=card.name,
    )


def _missing(lock: Lock, seen: SeenMachine, wanted: tuple[Demand, ...]) -> Iterator[Diagnostic]:
    present = [card.id for card in seen.accelerators]
    missing = [demand.device for demand in wanted if demand.device.is_accelerator and demand.device not in present]
    kind = kind_needed(lock)
    advice = "compile a profile that describes this machine, or run on the one that this profile describes"
    if missing and seen.kind not in (None, kind):
        message = f"the plan is for {kind} devices, and this machine has {', '.join(map(str, present))}"
        yield Diagnostic.error("other-accelerators", message, help=advice)
    elif missing:
        number = f"the number of {kind} devices of this machine is {len(present)}"
        yield Diagnostic.error(
            "device-missing", f"the plan uses {', '.join(map(str, missing))}, and {number}", help=advice
        )


def _other_cards(lock: Lock, seen: SeenMachine) -> Iterator[Diagnostic]:
    """Yield a warning for each card that is not the planned one: it may work, but predictions are for the other."""
    used = _needs(lock)
    for card in seen.accelerators:
        planned = lock.hardware.get(str(card.id), {}).get("accelerator") if card.id in used else None
        if planned is not None and card.accelerator != planned:
            yield Diagnostic.warning(
                "another-card",
                f"{card.id} is {card.accelerator or card.name}, and the plan was made for {planned}",
                help="speeds were predicted for the other; describe this machine and compile again",
            )


def _memory(demand: Demand) -> Iterator[Diagnostic]:
    needed_bytes = demand.needed_bytes + demand.context_bytes
    context = f", {format_bytes(demand.context_bytes)} of it for a context" if demand.context_bytes else ""
    needed = f"the plan needs {format_bytes(needed_bytes)} there{context}"
    if demand.memory_bytes is not None and demand.memory_bytes < needed_bytes:
        yield Diagnostic.error(
            "too-little-memory",
            f"{demand.device} has {format_bytes(demand.memory_bytes)}, and {needed}",
            help=f"give {demand.device} the memory that it has here in the profile, and compile again",
        )
    elif demand.free_bytes is not None and demand.free_bytes < needed_bytes:
        held = "" if demand.memory_bytes is None else f" of its {format_bytes(demand.memory_bytes)}"
        yield Diagnostic.error(
            "memory-held",
            f"{demand.device} has {format_bytes(demand.free_bytes)}{held} free now, and {needed}",
            help="stop the processes that hold the rest; if they must stay, state their memory in the profile, as the"
            " device's `reserve`, and compile again",
        )


def _disk(demand: Demand, *, may_be_read_in_place: bool) -> Iterator[Diagnostic]:
    if demand.free_bytes is not None and demand.free_bytes < demand.needed_bytes:
        report = Diagnostic.warning if may_be_read_in_place else Diagnostic.error
        yield report(
            "too-little-disk",
            f"the disk has {format_bytes(demand.free_bytes)} free,"
            f" and the plan puts {format_bytes(demand.needed_bytes)} there",
            help="free some of it, or offload to another; weights that are read where the checkpoint lies need no more",
        )
