"""`SeenMachine`: the result of probing a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAccelerator:
    """One accelerator, by torch's number.

    `name` is that of its driver, `accelerator` that of the catalogue. `held_bytes` is the memory that processes hold
    there now, and `free_bytes` the memory that a new one may take; either is `None` if unknown. With `has_context`, the
    held memory includes the context of this process.
    """

    id: Device
    name: str
    memory_bytes: int | None
    free_bytes: int | None = None
    held_bytes: int | None = None
    has_context: bool = False
    uuid: str | None = None
    accelerator: str | None = None
    is_slice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenHost:
    """The CPU: its memory within the limits of the container, the available part of it, and the threads."""

    memory_bytes: int
    available_bytes: int
    threads: int
    name: str | None = None
    is_limited: bool = False
    """True if a container's limit applies rather than the machine's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenDisk:
    """The file system of one folder."""

    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class SeenMachine:
    """The whole machine. `notes` are warnings about devices that could not be probed, and about guesses."""

    accelerators: tuple[SeenAccelerator, ...]
    host: SeenHost
    disk: SeenDisk | None
    notes: tuple[Diagnostic, ...] = ()

    @property
    def kind(self) -> str | None:
        """The kind of the accelerators, if there are any."""
        return self.accelerators[0].id.kind if self.accelerators else None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "accelerators": [{**asdict(accelerator), "id": str(accelerator.id)} for accelerator in self.accelerators],
            "cpu": asdict(self.host),
            "disk": None if self.disk is None else asdict(self.disk),
        }
