"""The executors of a plan, as plain values: which device runs a module whose weights are stored elsewhere, and how."""

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
        works_ahead: fetch the next module's weights while another module computes: read them from the disk for the CPU
            (`dispatch/mapped_weights.py`), or copy them to an accelerator (`dispatch/streamed_weights.py`).
        prefilled_from: by path of modules that compute on the CPU, the number of tokens at once from which they run on
            the main device instead, with their weights copied ahead.
        offloaded_caches: the paths of the modules whose part of the cache is offloaded, in the order of the model;
            `None` if the workload's cache decides.
    """

    name: str = "accelerate"
    offload_buffers: bool = False
    works_ahead: bool = False
    prefilled_from: Mapping[str, int] = field(default_factory=dict, hash=False)
    offloaded_caches: tuple[str, ...] | None = None

    @property
    def pieces_at_once(self) -> int:
        """The most modules whose streamed weights are on their device at once: one, and perhaps the next."""
        return 2 if self.works_ahead else 1

    def offloads_cache(self, path: str) -> bool:
        """Return whether a module's part of a cache is on the CPU while it does not run, if the cache offloads any."""
        return self.offloaded_caches is None or path in self.offloaded_caches

    def main_device(self, stored_on: Iterable[Device]) -> Device:
        """Return the device on which streamed modules run: the first accelerator in use, else the CPU."""
        return min((device for device in stored_on if device.is_accelerator), default=CPU)

    def location(self, stored_on: Device, main_device: Device, compute: Device | None = None) -> Location:
        """Return the location of a module, given its store and the device that its rule has it compute on."""
        return Location(stored_on, compute or (stored_on if stored_on.is_accelerator else main_device))

    def can_run(self, location: Location, main_device: Device) -> bool:
        """Return whether a module can run at a location: where its weights are stored, or streamed to.

        accelerate streams only to the main device; our executor copies ahead to any card.
        """
        usual = self.location(location.stored_on, main_device).runs_on
        is_brought = not location.stored_on.is_accelerator and self.is_brought_ahead(location)
        if is_brought and main_device.is_accelerator and location.runs_on.is_accelerator:
            return True
        return location.runs_on in (usual, location.stored_on) and location.runs_on != DISK

    def prefill_location(self, unit: str, location: Location, main_device: Device) -> Location:
        """Return the location of a unit during the prefill of a prompt of the planned length."""
        is_copied = location == ON_CPU and unit in self.prefilled_from and main_device.is_accelerator
        return Location(CPU, main_device) if is_copied else location

    def residence(self, tensor: Tensor, location: Location) -> Device:
        """Return the device on which a tensor occupies memory while nothing runs; some buffers stay on the device that
        uses them.
        """
        is_left = self.streams(location) and not self._is_offloaded_with_its_module(tensor)
        return location.runs_on if is_left or _is_moved_for_good(location) else location.stored_on

    def streams(self, location: Location) -> bool:
        """Return whether weights at this location are copied to another device at every forward."""
        is_elsewhere = not location.is_one_device and not _is_moved_for_good(location)
        return location.stored_on == DISK or is_elsewhere

    def is_brought_ahead(self, location: Location) -> bool:
        """Return whether weights at this location are copied while something else computes."""
        return self.works_ahead and self.streams(location)

    def is_read_ahead_for_a_card(self, location: Location) -> bool:
        """Return whether weights go from the disk to an accelerator, which needs a buffer of their size on the CPU."""
        return self.works_ahead and location.stored_on == DISK and location.runs_on.is_accelerator

    def is_copied_in(self, tensor: Tensor, location: Location) -> bool:
        """Return whether a tensor is copied to its module's device at every forward."""
        return self.streams(location) and self._is_offloaded_with_its_module(tensor)

    def is_offloaded(self, location: Location, main_device: Device) -> bool:
        """Return whether the map for loading says `cpu` or `disk` here, which it does not for modules that the CPU
        computes beside cards.
        """
        computes_apart = location.is_one_device and location.runs_on != main_device
        return not location.stored_on.is_accelerator and not computes_apart

    def held_bytes(self, tensor: Tensor, location: Location, main_device: Device) -> int:
        """Return the bytes that a tensor occupies on its device; some quantizers do not quantise tensors that a map
        puts on `cpu`.
        """
        return tensor.bytes_where(is_offloaded=self.is_offloaded(location, main_device))

    def _is_offloaded_with_its_module(self, tensor: Tensor) -> bool:
        return not tensor.is_held_in_buffer or (self.offload_buffers and tensor.persistent)


LEFT = Executor()
"""accelerate's default: leaves buffers of streamed modules on the device that runs them."""

AHEAD = Executor(name="devmap", works_ahead=True)
"""Fetches the next weights while a module computes: from the disk for the CPU, from the disk and the CPU for an
accelerator.
"""

PREFILLING = "devmap-prefill"
"""The name of the executor that also copies weights ahead only for long prompts, if their modules otherwise compute
on the CPU.
"""

OFFLOADED = Executor(offload_buffers=True)
"""accelerate's hooks with `offload_buffers`: streams buffers as well, which needs less memory on the main device."""


def _is_moved_for_good(location: Location) -> bool:
    """Return whether accelerate moves weights from the CPU to their device for good, as it does beside Apple's GPU."""
    return location.stored_on == CPU and location.runs_on.kind == "mps"
