"""The executors of a plan, as values: the main device, and where a module that is stored elsewhere runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from devmap_config.devices import CPU, DISK
from devmap_config.execution.assignment import ON_CPU, Location

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from devmap_config.devices import Device
    from devmap_config.graph.model import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """A way to run a plan; the defaults are those of accelerate's hooks, which stream one module after another.

    Attributes:
        offload_buffers: accelerate's argument: stream the buffers of a module together with its parameters.
        works_ahead: bring what the next module needs while another one computes: read it from the disk for the CPU
            (`dispatch/mapped_weights.py`), or copy it to an accelerator (`dispatch/streamed_weights.py`).
        prefilled_from: for paths of modules that compute on the CPU, the number of tokens at once from which they run
            on the main device instead, to which their weights are then copied ahead.
        offloaded_caches: the paths of the modules whose part of the cache is offloaded, in the order of the model;
            `None` if that is all that the workload's cache offloads.
    """

    name: str = "accelerate"
    offload_buffers: bool = False
    works_ahead: bool = False
    prefilled_from: Mapping[str, int] = field(default_factory=dict, hash=False)
    offloaded_caches: tuple[str, ...] | None = None

    @property
    def pieces_at_once(self) -> int:
        """Of how many modules streamed weights are where they run, at most: of one, and of the next."""
        return 2 if self.works_ahead else 1

    def offloads_cache(self, path: str) -> bool:
        """Return whether a module's part of a cache is on the CPU while it does not run, if the cache offloads any."""
        return self.offloaded_caches is None or path in self.offloaded_caches

    def main_device(self, stored_on: Iterable[Device]) -> Device:
        """Return the device on which streamed modules run: the first accelerator in use, else the CPU."""
        return min((device for device in stored_on if device.is_accelerator), default=CPU)

    def location(self, stored_on: Device, main_device: Device, compute: Device | None = None) -> Location:
        """Return where a module is and runs that is stored here, given where its rule says that it computes."""
        return Location(stored_on, compute or (stored_on if stored_on.is_accelerator else main_device))

    def can_run(self, location: Location, main_device: Device) -> bool:
        """Return whether a module can run at a location: where its weights are stored, or streamed to.

        accelerate streams to the main device alone; what is brought ahead may be to any card.
        """
        usual = self.location(location.stored_on, main_device).runs_on
        is_brought = not location.stored_on.is_accelerator and self.is_brought_ahead(location)
        if is_brought and main_device.is_accelerator and location.runs_on.is_accelerator:
            return True
        return location.runs_on in (usual, location.stored_on) and location.runs_on != DISK

    def prefill_location(self, unit: str, location: Location, main_device: Device) -> Location:
        """Return where a unit is and runs while a prompt is prefilled that is as long as planned."""
        is_copied = location == ON_CPU and unit in self.prefilled_from and main_device.is_accelerator
        return Location(CPU, main_device) if is_copied else location

    def residence(self, tensor: Tensor, location: Location) -> Device:
        """Return the device on which a tensor occupies memory while nothing runs; some buffers are kept where they are
        used.
        """
        is_left = self.streams(location) and not self._is_offloaded_with_its_module(tensor)
        return location.runs_on if is_left or _is_moved_for_good(location) else location.stored_on

    def streams(self, location: Location) -> bool:
        """Return whether weights at this location are copied to where they run at every forward."""
        is_elsewhere = not location.is_one_device and not _is_moved_for_good(location)
        return location.stored_on == DISK or is_elsewhere

    def is_brought_ahead(self, location: Location) -> bool:
        """Return whether weights at this location are copied while something else computes."""
        return self.works_ahead and self.streams(location)

    def is_read_ahead_for_a_card(self, location: Location) -> bool:
        """Return whether weights go from the disk to an accelerator, which takes a buffer of their size on the CPU."""
        return self.works_ahead and location.stored_on == DISK and location.runs_on.is_accelerator

    def is_copied_in(self, tensor: Tensor, location: Location) -> bool:
        """Return whether a tensor is copied to where its module runs at every forward."""
        return self.streams(location) and self._is_offloaded_with_its_module(tensor)

    def is_offloaded(self, location: Location, main_device: Device) -> bool:
        """Return whether the map for loading has `cpu` or `disk` here; it has not for modules that the CPU computes
        beside cards.
        """
        computes_apart = location.is_one_device and location.runs_on != main_device
        return not location.stored_on.is_accelerator and not computes_apart

    def held_bytes(self, tensor: Tensor, location: Location, main_device: Device) -> int:
        """Return the bytes that a tensor occupies where it resides; some quantizers leave tensors on `cpu` of a map
        unquantised.
        """
        return tensor.bytes_where(is_offloaded=self.is_offloaded(location, main_device))

    def _is_offloaded_with_its_module(self, tensor: Tensor) -> bool:
        return not tensor.is_held_in_buffer or (self.offload_buffers and tensor.persistent)


LEFT = Executor()
"""Leaves buffers where streamed modules run: accelerate's default."""

AHEAD = Executor(name="devmap", works_ahead=True)
"""Brings what is next while something computes: from the disk for the CPU, and from both for an accelerator."""

PREFILLING = "devmap-prefill"
"""The name of what brings weights ahead also for long prompts alone, of modules that else compute on the CPU."""

OFFLOADED = Executor(offload_buffers=True)
"""Streams them as well, which takes less room there."""


def _is_moved_for_good(location: Location) -> bool:
    """Return whether accelerate moves weights from the CPU to where they run and leaves them there, as beside Apple's
    GPU.
    """
    return location.stored_on == CPU and location.runs_on.kind == "mps"
