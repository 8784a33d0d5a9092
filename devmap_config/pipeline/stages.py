"""`Pipeline`: a plan within what vLLM can do, as frozen data: stages in the order of their ranks, and their hosts.

A compiled profile with `targets: [vllm]` has it as `compile_profile(path).pipeline`, which is `Plan.pipeline` (`None`
for other targets); a lock has it as `plan.pipeline`, which `Pipeline.from_json` reads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from devmap_config.devices import Device

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive layers on one device, or on each of a tensor-parallel group: all figures are of one rank.

    `first_layer` and `last_layer` are both included. `weights_bytes` are those that vLLM loads: with the embedding on
    the first stage, norm and head on the last (tied: the matrix on both). `capacity_bytes` is what the plan may use of
    the rank's device, `activation_bytes` what is left free of it for a forward, `overhead_bytes` what vLLM's processes
    take of it where it is a CPU. `page_bytes` is what a block of the
    cache takes here, `blocks` how many this rank had room for by itself. Times are those of one decoded token of each
    request of a batch, and of one batch of a prompt, with what is sent on to the next stage; `None` if the machine
    does not say how fast it is.
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
        """The name of the host that it is on; `None` if the profile has one machine without a name."""
        return self.devices[0].host

    @property
    def layers(self) -> int:
        """The number of layers of the stage."""
        return self.last_layer - self.first_layer + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineHost:
    """One machine of a pipeline: a node of vLLM, whose number is its place among the hosts.

    `devices` are those of its ranks, in the order of the local ranks: their indices are what `--device-ids` is given.
    `address` and `interface` are the profile's, of the network over which the hosts reach each other; `None` if it
    does not say. `cache_bytes` is what each of its ranks is to be given as `--kv-cache-memory-bytes`: the blocks of the
    whole pipeline, at the largest page of this host's stages.
    """

    name: str | None
    devices: tuple[Device, ...]
    cache_bytes: int
    address: str | None = None
    interface: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Stages in the order of their ranks, and the hosts that these are on, in the order of their node ranks.

    `kind` is that of all its devices: `cuda`, say, or `cpu`. `dtype` is the model's, `cache_dtype` the cache's.
    `max_model_len` is the context of a request, `max_num_seqs` how many of them are in flight, and
    `max_num_batched_tokens` how many tokens are computed at once. `blocks` is what the least of all ranks has room for,
    one of which vLLM keeps empty; `blocks_per_request` is what one request of full length takes.
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
        """`--tensor-parallel-size`: the same for all stages."""
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
        """The number of the stage that takes longest to decode; `None` if times are not known."""
        times = [stage.decode_nanoseconds for stage in self.stages]
        known = [each for each in times if each is not None]
        return times.index(max(known)) if len(known) == len(times) else None

    def to_json(self) -> dict[str, Any]:
        """Return it as it stands in a lock."""
        return {
            **{name: getattr(self, name) for name in self.__slots__ if name not in ("hosts", "stages")},
            "hosts": [{**asdict(host), "devices": list(map(str, host.devices))} for host in self.hosts],
            "stages": [{**asdict(stage), "devices": list(map(str, stage.devices))} for stage in self.stages],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Pipeline:
        """Return what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: if the value is not one.
        """
        hosts = tuple(PipelineHost(**{**each, "devices": _devices(each)}) for each in value["hosts"])
        stages = tuple(Stage(**{**each, "devices": _devices(each)}) for each in value["stages"])
        return cls(**{**value, "hosts": hosts, "stages": stages})


def _devices(value: Mapping[str, Any]) -> tuple[Device, ...]:
    return tuple(map(Device.from_text, value["devices"]))
