"""`SeenMachine`: what a probe found of the machine that it runs on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Diagnostic


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAccelerator:
    """One accelerator, by torch's number.

    `name` is what its driver reports, `accelerator` the catalogue's name for it. `held_bytes` is what processes hold
    there now and `free_bytes` what a new one may take; either is `None` if nobody can tell. With `has_context` the
    context of this process is among what is held.
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
    """The CPU's side: memory within the limits of the container, what is available of it now, and the threads."""

    memory_bytes: int
    available_bytes: int
    threads: int
    name: str | None = None
    is_limited: bool = False
    """Whether a container's limit is what counts, and not the machine's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenDisk:
    """The file system of one folder."""

    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class SeenMachine:
    """All of it. `notes` are warnings: what is there and could not be asked, or what was guessed."""

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
            "accelerators": [{**asdict(each), "id": str(each.id)} for each in self.accelerators],
            "cpu": asdict(self.host),
            "disk": None if self.disk is None else asdict(self.disk),
        }
