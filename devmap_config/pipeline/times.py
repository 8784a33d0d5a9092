"""The time of a stage: its layers at the rates of its device, and the transfer to the next.

vLLM replays its kernels (CUDA graphs), so the host's pace does not count: a module takes the longer of reading and
computing. These times compare stages of one plan; none was measured on a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from devmap_config.hardware.inventory import NANOSECONDS_PER_SECOND

if TYPE_CHECKING:
    from collections.abc import Iterable

    from devmap_config.execution.segments import Phase
    from devmap_config.graph.costs import ModuleCost
    from devmap_config.graph.model import ModelGraph
    from devmap_config.hardware.inventory import Inventory, InventoryLink
    from devmap_config.pipeline.slots import Slot

SENT_TENSORS = 2
"""The number of tensors that a stage sends to the next: the hidden states and the residual (`IntermediateTensors`)."""

REDUCTIONS_OF_A_LAYER = 2
"""The number of all-reduces in a layer: after the attention, and after the MLP."""


@dataclass(frozen=True)
class StageTimes:
    """The times of a phase, for a batch of `requests` requests of the workload.

    `token_bytes` are the bytes of a token's hidden state, `tokens` is the number of tokens of the batch.
    """

    graph: ModelGraph
    inventory: Inventory
    phase: Phase
    requests: int
    tokens: int
    token_bytes: int

    def nanoseconds(self, path: str, slot: Slot) -> int | None:
        """Return the time of a module with everything below it, shared by the devices of a group; `None` if a rate is
        unknown.
        """
        bandwidth, flops = (slot[0].reached(name) for name in ("bandwidth_bytes_per_second", "flops_per_second"))
        if bandwidth is None or (flops is None and self.phase == "prefill"):
            return None
        total = 0
        for touched_bytes, operations in self._work(path):
            reading = touched_bytes * NANOSECONDS_PER_SECOND // bandwidth
            computing = 0 if flops is None else operations * NANOSECONDS_PER_SECOND // flops
            total += max(reading, computing)
        return total // len(slot)

    def reducing_nanoseconds(self, slot: Slot) -> int | None:
        """Return the time of a layer's all-reduces over the ranks of a group, in a ring."""
        if len(slot) == 1:
            return 0
        link = self.inventory.links.get((slot[0].id, slot[1].id))
        if link is None:
            return None
        size_bytes = 2 * (len(slot) - 1) * self.tokens * self.token_bytes // len(slot)
        return REDUCTIONS_OF_A_LAYER * link.nanoseconds(size_bytes)

    def sending_nanoseconds(self, slot: Slot, following: Slot) -> int | None:
        """Return the time of the transfer to the next stage."""
        link: InventoryLink | None = self.inventory.links.get((slot[0].id, following[0].id))
        if link is None:
            return None
        return link.nanoseconds(SENT_TENSORS * self.tokens * self.token_bytes, SENT_TENSORS)

    def _work(self, path: str) -> Iterable[tuple[int, int]]:
        """Yield the bytes and operations of each module below a path: weights are read once, everything else for each
        request.
        """
        measurement = self.graph.measurement
        for module in self.graph.modules[path].walk():  # type: ignore[index]
            weights_bytes = sum(tensor.size_bytes for tensor in module.own_tensors)
            cost = None if measurement is None else measurement.by_path.get(module.path)
            if cost is None:
                continue
            touched_bytes, operations = self._figures(cost)
            if touched_bytes <= weights_bytes:  # only chosen experts, or rows of an embedding
                touched_bytes = min(touched_bytes * self.requests, weights_bytes)
            else:
                touched_bytes = weights_bytes + (touched_bytes - weights_bytes) * self.requests
            yield touched_bytes, operations * self.requests

    def _figures(self, cost: ModuleCost) -> tuple[int, int]:
        if self.phase == "prefill":
            return cost.prefill_touched_bytes, cost.prefill_operations
        return cost.decode_touched_bytes, cost.decode_operations
