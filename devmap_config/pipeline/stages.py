"""`Pipeline`: a plan for vLLM as frozen data: stages in the order of their ranks, and their hosts.

For a profile with `targets: [vllm]`, it is `compile_profile(path).pipeline`, that is `Plan.pipeline` (`None` for other
targets). In a lock, it is `plan.pipeline`, which `Pipeline.from_json` reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive layers on one device, or on each device of a tensor-parallel group; all figures are for one rank.

    `first_layer` and `last_layer` are both included. `weights_bytes` are those that vLLM loads: with the embedding on
    the first stage, norm and head on the last (a tied matrix on both). `capacity_bytes` is the part of the rank's
    device that the plan may use, `activation_bytes` the part that is left free for a forward, and `overhead_bytes` the
    part that vLLM's processes take if it is a CPU. `page_bytes` are the bytes of a cache block here, and `blocks` is
    the number of blocks that this rank would have room for by itself. Times are those of one decoded token for each
    request of a batch, and of one batch of a prompt, with the transfer to the next stage; `None` if a rate of the
    machine is unknown.
    """

    devices: tuple[Device, ...]
    first_layer: int
    last_layer: int
    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    capacity_bytes: int
    page_bytes: int
    blocks: int
    decode_nanoseconds: int | None = None
    prefill_nanoseconds: int | None = None

    @property
    def host(self) -> str | None:
        """The name of the host of the stage; `None` if the profile has one machine without a name."""
        return self.devices[0].host

    @property
    def layers(self) -> int:
        """The number of layers of the stage."""
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineHost:
    """One machine of a pipeline: a node of vLLM, whose number is its place among the hosts.

    `devices` are those of its ranks, in the order of the local ranks; `--device-ids` gets their indices. `address` and
    `interface` are those of the profile for the network between the hosts; `None` if it has none. `cache_bytes` is the
    value of `--kv-cache-memory-bytes` for each of its ranks: the blocks of the whole pipeline, at the largest page of
    this host's stages.
    """

    name: str | None
    devices: tuple[Device, ...]
    cache_bytes: int
    address: str | None = None
    interface: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Stages in the order of their ranks, and their hosts, in the order of the node ranks.

    `kind` is that of all its devices, such as `cuda` or `cpu`. `dtype` is the model's, `cache_dtype` the cache's.
    `max_model_len` is the context of a request, `max_num_seqs` the number of sequences in flight, and
    `max_num_batched_tokens` the number of tokens that are computed at once. `blocks` is the least number of blocks that
    any rank has room for, one of which vLLM keeps empty; `blocks_per_request` is the number for one request of full
    length.
    """

    kind: str
    hosts: tuple[PipelineHost, ...]
    stages: tuple[Stage, ...]
    dtype: str
    cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    blocks: int
    blocks_per_request: int

    @property
    def tensor_parallel_size(self) -> int:
        """`--tensor-parallel-size`, the same for all stages."""
        return len(self.stages[0].devices)

    @property
    def pipeline_parallel_size(self) -> int:
        """`--pipeline-parallel-size`."""
        return len(self.stages)

    @property
    def partition(self) -> tuple[int, ...]:
        """The number of layers of each stage: `VLLM_PP_LAYER_PARTITION`."""
        return tuple(stage.layers for stage in self.stages)

    @property
    def concurrency(self) -> float:
        """The number of requests of full length that the cache has room for at once, as vLLM logs it."""
        return self.blocks / self.blocks_per_request

    @property
    def cache_tokens(self) -> int:
        """The size of the cache in tokens, as vLLM logs it."""
        return self.blocks * self.max_model_len // self.blocks_per_request

    @property
    def deciding_stage(self) -> int:
        """The number of the stage that has room for the fewest blocks, the first of several."""
        return min(range(len(self.stages)), key=lambda number: self.stages[number].blocks)

    @property
    def slowest_stage(self) -> int | None:
        """The number of the stage that takes longest to decode; `None` if times are unknown."""
        times = [stage.decode_nanoseconds for stage in self.stages]
        known = [time for time in times if time is not None]
        return times.index(max(known)) if len(known) == len(times) else None

    def to_json(self) -> dict[str, Any]:
        """Return the pipeline as a lock stores it."""
        return {
            **{name: getattr(self, name) for name in self.__slots__ if name not in ("hosts", "stages")},
            "hosts": [{**asdict(host), "devices": list(map(str, host.devices))} for host in self.hosts],
            "stages": [{**asdict(stage), "devices": list(map(str, stage.devices))} for stage in self.stages],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pipeline:
        """Return the pipeline that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: if the value is not one.
        """
        hosts = tuple(PipelineHost(**{**host, "devices": _devices(host)}) for host in value["hosts"])
        stages = tuple(Stage(**{**stage, "devices": _devices(stage)}) for stage in value["stages"])
        return cls(**{**value, "hosts": hosts, "stages": stages})


def _devices(value: Mapping[str, Any]) -> tuple[Device, ...]:
    return tuple(map(Device.from_text, value["devices"]))
