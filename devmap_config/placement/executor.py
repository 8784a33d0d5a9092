"""What runs a plan, as a value: which device is main, and where a module that is stored elsewhere runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.placement.problem import is_accelerator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.graph.model import Tensor
    from devmap_config.placement.problem import DeviceId


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
        streamed = stored_on == "disk" or stored_on != executes_on
        stays_behind = tensor.kind == "buffer" and not (self.offload_buffers and tensor.persistent)
        return executes_on if streamed and stays_behind else stored_on


def _by_index(device: DeviceId) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    return (kind, int(index or 0))
