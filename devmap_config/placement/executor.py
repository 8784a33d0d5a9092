"""What runs a plan, as a value: which device is main, and where a module that is stored elsewhere runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.placement.devices import is_accelerator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.graph.model import Tensor
    from devmap_config.placement.devices import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """accelerate's hooks: one device after another, offloaded modules streamed to the main device.

    `offload_buffers` is accelerate's argument: whether the buffers of a streamed module are streamed with it.
    """

    name: str = "accelerate"
    offload_buffers: bool = False

    def main_device(self, stored_on: Iterable[DeviceId]) -> DeviceId:
        """The device on which streamed modules run: the first accelerator in use, else the CPU."""
        accelerators = sorted((device for device in stored_on if is_accelerator(device)), key=_by_index)
        return accelerators[0] if accelerators else "cpu"

    def executes_on(self, stored_on: DeviceId, main_device: DeviceId, compute: DeviceId | None) -> DeviceId:
        """Where a module runs that is stored here, given where its rule says that it computes."""
        if compute is not None:
            return compute
        return stored_on if is_accelerator(stored_on) else main_device

    def residence(self, tensor: Tensor, stored_on: DeviceId, executes_on: DeviceId) -> DeviceId:
        """Where a tensor occupies memory while nothing runs: accelerate leaves some buffers where they are needed."""
        is_left = self.streams(stored_on, executes_on) and not self._is_offloaded_with_its_module(tensor)
        return executes_on if is_left or _is_moved_for_good(stored_on, executes_on) else stored_on

    def streams(self, stored_on: DeviceId, executes_on: DeviceId) -> bool:
        """Whether what is stored here is copied to where it runs at every forward."""
        is_elsewhere = stored_on != executes_on and not _is_moved_for_good(stored_on, executes_on)
        return stored_on == "disk" or is_elsewhere

    def is_copied_in(self, tensor: Tensor, stored_on: DeviceId, executes_on: DeviceId) -> bool:
        """Whether a tensor is copied to where its module runs at every forward."""
        return self.streams(stored_on, executes_on) and self._is_offloaded_with_its_module(tensor)

    def is_offloaded(self, stored_on: DeviceId, executes_on: DeviceId, main_device: DeviceId) -> bool:
        """Whether the map that loads it says `cpu` or `disk`; of what computes on the CPU beside cards it does not."""
        computes_apart = stored_on == executes_on != main_device
        return not is_accelerator(stored_on) and not computes_apart

    def held_bytes(self, tensor: Tensor, stored_on: DeviceId, executes_on: DeviceId, main_device: DeviceId) -> int:
        """What a tensor occupies, wherever it resides: some quantizers leave as it is what a map has on `cpu`."""
        return tensor.bytes_where(is_offloaded=self.is_offloaded(stored_on, executes_on, main_device))

    def _is_offloaded_with_its_module(self, tensor: Tensor) -> bool:
        return not tensor.is_held_in_buffer or (self.offload_buffers and tensor.persistent)


LEFT = Executor()
"""Leaves buffers where streamed modules run: accelerate's default."""

OFFLOADED = Executor(offload_buffers=True)
"""Streams them as well, which takes less room there."""


def _is_moved_for_good(stored_on: DeviceId, executes_on: DeviceId) -> bool:
    """Whether accelerate puts what a map has on the CPU where it runs, and leaves it there: beside Apple's GPU."""
    return stored_on == "cpu" and executes_on == "mps"


def _by_index(device: DeviceId) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    return (kind, int(index or 0))
