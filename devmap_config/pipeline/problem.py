"""The pipeline problem: layers to be cut into stages for given requests, and everything that follows from a cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from devmap_config.devices import CPU
from devmap_config.pipeline.cache import BLOCK_TOKENS, CPU_BLOCK_TOKENS, NULL_BLOCKS, blocks_per_request, groups_of
from devmap_config.pipeline.cuts import between, largest_between
from devmap_config.pipeline.stages import Pipeline, PipelineHost, Stage
from devmap_config.pipeline.times import StageTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from devmap_config.devices import Device
    from devmap_config.execution.segments import Phase
    from devmap_config.graph.costs import Measurement
    from devmap_config.hardware.inventory import Inventory
    from devmap_config.pipeline.cuts import Costs, Mask
    from devmap_config.pipeline.layers import Layers
    from devmap_config.pipeline.slots import Slot

RANK_PROCESS_BYTES = 800_000_000
HEAD_PROCESS_BYTES = 1_240_000_000
FOLLOWER_PROCESS_BYTES = 620_000_000
"""The memory of vLLM's processes on a host besides weights and cache: for each rank, for the head's server and
engine, for a follower. Observed with vLLM 0.32.0 on CPUs: 0.72 to 0.80 GB for each rank, 0.64 and 0.60, 0.62.
"""

MOST_BYTES = 2**51
MOST_OF_A_LAYER = 2**52
MOST_NANOSECONDS = 2**44
MOST_RUNNING_BYTES = 2**60
"""The limits that figures are capped at, so that sums of them fit in 64-bit integers: more than two petabytes of a
device count as two, and anything larger fits on no device; a layer that takes more than five hours counts as five.
"""

LOGITS_BYTES = 4
"""vLLM samples from logits in float32."""

Allowed: TypeAlias = "Callable[[Sequence[Slot]], Sequence[Mask]]"
Orders: TypeAlias = "Callable[[Sequence[Slot]], Iterator[tuple[Slot, ...]]]"


@dataclass(frozen=True)
class PipelineProblem:
    """The layers to be cut into stages, the requests to be served, and the devices to serve them.

    Attributes:
        concurrency: requests in flight, each of `batch_size` sequences.
        slots: the places of stages, in the order of ranks.
        needed: the devices that rules require to be used.
        distinct: all devices that rules name.
        allowed: by the rules, the layers that a stage in a slot may have.
        orders: by the rules, the orders in which slots may be stages.
        networks: the address and the interface of each host, by its name.
    """

    layers: Layers
    inventory: Inventory
    measurement: Measurement
    dtype: str
    concurrency: int
    slots: tuple[Slot, ...]
    needed: frozenset[Device]
    distinct: frozenset[Device]
    allowed: Allowed
    orders: Orders
    networks: Mapping[str | None, tuple[str | None, str | None]]

    @property
    def kind(self) -> str:
        """The kind of the devices that compute."""
        return self.slots[0][0].id.kind

    @property
    def ranks(self) -> int:
        """The number of devices of each stage."""
        return len(self.slots[0])

    @property
    def block_size(self) -> int:
        """The tokens of a block."""
        return CPU_BLOCK_TOKENS if self.kind == CPU.kind else BLOCK_TOKENS

    @property
    def context_length(self) -> int:
        """The tokens of a request."""
        return self.measurement.workload.context_length

    @property
    def sequences(self) -> int:
        """The number of sequences in flight."""
        return self.concurrency * self.measurement.workload.batch_size

    @property
    def batched_tokens(self) -> int:
        """The most tokens that are computed at once."""
        workload = self.measurement.workload
        return max(workload.batch_size * workload.prompt_length, self.sequences)

    def blocks_per_request(self, stages: int) -> int:
        """Return the cache blocks of a request; with an attention window, including those in flight in every stage."""
        # With `async_scheduling`, which the CPU does not have, one more batch may be in flight.
        batches = stages if self.kind == CPU.kind else stages + 1
        return blocks_per_request(
            self.layers.caches(self.ranks),
            context_length=self.context_length,
            block_size=self.block_size,
            tokens_in_flight=batches * self.batched_tokens,
        )

    def needed_blocks(self, stages: int) -> int:
        """Return the cache blocks that all requests in flight take at full length."""
        return self.sequences * self.blocks_per_request(stages) + NULL_BLOCKS

    def batches(self, stages: int) -> int:
        """Return the batches in flight: one for each stage, if there are as many requests."""
        return min(self.concurrency, stages)

    def requests_of_a_batch(self, stages: int) -> int:
        """Return the requests of one batch."""
        return -(-self.concurrency // self.batches(stages))

    @cached_property
    def knows_times(self) -> bool:
        """True if the machine states all rates that a pipeline over it may use."""
        try:
            self.stage_times(self.slots[:1], "decode")
            for slot in self.slots:
                _known(self._nanoseconds(self.times("decode", 1), self.layers.paths[0], slot))
                _known(self.times("decode", 1).reducing_nanoseconds(slot))
        except UnknownTimeError:
            return False
        return not self.unlinked

    @property
    def unlinked(self) -> list[tuple[Slot, Slot]]:
        """The pairs of consecutive slots whose link the machine does not state."""
        hosts = list(dict.fromkeys(slot[0].id.host for slot in self.slots))
        return [
            (before, after)
            for before, after in permutations(self.slots, 2)
            if hosts.index(before[0].id.host) <= hosts.index(after[0].id.host)
            and (before[0].id, after[0].id) not in self.inventory.links
        ]

    @cached_property
    def pages(self) -> Costs:
        """The bytes of a cache block on a stage, by its layers."""
        caches = self.layers.caches(self.ranks)
        count = len(caches)
        widest = np.zeros((count, count), dtype=np.int64)
        for group in groups_of(caches):
            members = [caches[number].token_bytes if number in group else 0 for number in range(count)]
            widest = np.maximum(widest, between(members))
        return widest * self.block_size

    def weights(self, place: int, stages: int) -> Costs:
        """Return the weights of one rank, by the stage's layers."""
        layers, ranks = self.layers, self.ranks
        weights = self._layer_weights + min(layers.rotations_bytes, MOST_OF_A_LAYER)
        if place == 0:
            weights = weights + min(layers.first_bytes(ranks), MOST_OF_A_LAYER)
        if place == stages - 1:
            weights = weights + min(layers.last_bytes(ranks, stages), MOST_OF_A_LAYER)
        return weights

    def activations(self, place: int, stages: int) -> Costs:
        """Return the bytes of activations on one rank, by the stage's layers."""
        peaks = self._layer_peaks
        ends = (*(self.layers.before if place == 0 else ()), *(self.layers.behind if place == stages - 1 else ()))
        most = max(map(self._peak_bytes, ends), default=0)
        logits_bytes = self.sequences * self.layers.vocabulary * LOGITS_BYTES if place == stages - 1 else 0
        return np.maximum(peaks, most) + min(logits_bytes, MOST_RUNNING_BYTES)

    def process_bytes(self, slots: Sequence[Slot], place: int) -> int:
        """Return the memory that vLLM's processes take of a CPU; the capacity of an accelerator excludes it already."""
        if self.kind != CPU.kind:
            return 0
        host = slots[place][0].id.host
        is_first_of_host = place == 0 or slots[place - 1][0].id.host != host
        others = HEAD_PROCESS_BYTES if place == 0 else FOLLOWER_PROCESS_BYTES
        return RANK_PROCESS_BYTES + (others if is_first_of_host else 0)

    def rooms(self, slots: Sequence[Slot]) -> list[Costs]:
        """Return the cache blocks that each stage has room for, by its layers; -1 if not even its weights fit.

        Equal stages share their matrix.
        """
        rooms, known = [], {}
        for place, slot in enumerate(slots):
            capacity_bytes = min(slot[0].capacity_bytes, MOST_BYTES) - self.process_bytes(slots, place)
            key = (capacity_bytes, place == 0, place == len(slots) - 1)
            if key not in known:
                free = capacity_bytes - self.weights(place, len(slots)) - self.activations(place, len(slots))
                known[key] = np.where((free >= 0) & (self.pages > 0), free // np.maximum(self.pages, 1), -1)
            rooms.append(known[key])
        return rooms

    def times(self, phase: Phase, stages: int) -> StageTimes:
        """Return the times of a pipeline of this many stages."""
        workload = self.measurement.workload
        requests = self.requests_of_a_batch(stages) if phase == "decode" else 1
        tokens = requests * workload.batch_size * (1 if phase == "decode" else workload.prompt_length)
        token_bytes = self.layers.hidden_size * self.layers.element_bytes
        return StageTimes(self.layers.graph, self.inventory, phase, requests, tokens, token_bytes)

    def costs(self, slots: Sequence[Slot]) -> list[Costs]:
        """Return the time that each stage takes to decode, by its layers; the bytes of weights if no times
        are known.
        """
        if not self.knows_times:
            return [self.weights(place, len(slots)) for place in range(len(slots))]
        return self.stage_times(slots, "decode")

    def stage_times(self, slots: Sequence[Slot], phase: Phase) -> list[Costs]:
        """Nanoseconds of each stage, by its layers; equal stages share their matrix.

        Raises:
            UnknownTimeError: if a rate of the machine is unknown.
        """
        times, last = self.times(phase, len(slots)), len(slots) - 1
        costs, known = [], {}
        for place, slot in enumerate(slots):
            sending = 0 if place == last else _known(times.sending_nanoseconds(slot, slots[place + 1]))
            reducing = _known(times.reducing_nanoseconds(slot))
            key = (slot[0].rates, sending, reducing, place == 0, place == last)
            if key not in known:
                rows = [_known(self._nanoseconds(times, path, slot)) + reducing for path in self.layers.paths]
                ends = (*(self.layers.before if place == 0 else ()), *(self.layers.behind if place == last else ()))
                rest = sum(_known(self._nanoseconds(times, path, slot)) for path in ends) + sending
                known[key] = between(rows) + rest
            costs.append(known[key])
        return costs

    def _nanoseconds(self, times: StageTimes, path: str, slot: Slot) -> int | None:
        key = (times.phase, times.requests, path, slot[0].rates, len(slot))
        if key not in self._known_times:
            self._known_times[key] = times.nanoseconds(path, slot)
        return self._known_times[key]

    @cached_property
    def _known_times(self) -> dict[tuple[object, ...], int | None]:
        return {}

    @cached_property
    def _layer_weights(self) -> Costs:
        return between([min(size_bytes, MOST_OF_A_LAYER) for size_bytes in self.layers.layer_bytes(self.ranks)])

    @cached_property
    def _layer_peaks(self) -> Costs:
        return largest_between([self._peak_bytes(path) for path in self.layers.paths])

    def _peak_bytes(self, path: str) -> int:
        """Return the largest activations while a module runs: of a prefill, or of decoding all requests of a batch."""
        cost = self.measurement.by_path.get(path)
        if cost is None:
            return 0
        peak_bytes = max(cost.prefill_peak_bytes, cost.decode_peak_bytes * self.requests_of_a_batch(1))
        return min(peak_bytes, MOST_RUNNING_BYTES)


class UnknownTimeError(Exception):
    """A rate of the machine is unknown."""


def _known(nanoseconds: int | None) -> int:
    if nanoseconds is None:
        raise UnknownTimeError
    return min(nanoseconds, MOST_NANOSECONDS)


def bounds_of(starts: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Return the first and last layer of each stage, given the first layers."""
    ends = [*starts[1:], count]
    return [(start, end - 1) for start, end in zip(starts, ends, strict=True)]


def pipeline_of(problem: PipelineProblem, slots: Sequence[Slot], bounds: Sequence[tuple[int, int]]) -> Pipeline:
    """Return the pipeline with these stages; everything else follows from their devices and layers."""
    stages, count = [], len(slots)
    rooms = problem.rooms(slots)
    decode, prefill = (_times_of(problem, slots, phase) for phase in ("decode", "prefill"))
    for place, (slot, bound) in enumerate(zip(slots, bounds, strict=True)):
        stages.append(
            Stage(
                devices=tuple(device.id for device in slot),
                first_layer=bound[0],
                last_layer=bound[1],
                weights_bytes=int(problem.weights(place, count)[bound]),
                activation_bytes=int(problem.activations(place, count)[bound]),
                overhead_bytes=problem.process_bytes(slots, place),
                capacity_bytes=slot[0].capacity_bytes,
                page_bytes=int(problem.pages[bound]),
                blocks=max(int(rooms[place][bound]), 0),
                decode_nanoseconds=None if decode is None else int(decode[place][bound]),
                prefill_nanoseconds=None if prefill is None else int(prefill[place][bound]),
            )
        )
    blocks = min(stage.blocks for stage in stages)
    return Pipeline(
        kind=problem.kind,
        hosts=_hosts(problem, stages, blocks),
        stages=tuple(stages),
        dtype=problem.dtype,
        cache_dtype=problem.dtype,
        max_model_len=problem.context_length,
        max_num_seqs=problem.sequences,
        max_num_batched_tokens=problem.batched_tokens,
        block_size=problem.block_size,
        blocks=blocks,
        blocks_per_request=problem.blocks_per_request(count),
    )


def _times_of(problem: PipelineProblem, slots: Sequence[Slot], phase: Phase) -> list[Costs] | None:
    try:
        return problem.stage_times(slots, phase)
    except UnknownTimeError:
        return None


def _hosts(problem: PipelineProblem, stages: Sequence[Stage], blocks: int) -> tuple[PipelineHost, ...]:
    hosts = []
    for name in dict.fromkeys(stage.host for stage in stages):
        own = [stage for stage in stages if stage.host == name]
        address, interface = problem.networks.get(name, (None, None))
        hosts.append(
            PipelineHost(
                name=name,
                devices=tuple(device for stage in own for device in stage.devices),
                cache_bytes=blocks * max(stage.page_bytes for stage in own),
                address=address,
                interface=interface,
            )
        )
    return tuple(hosts)
