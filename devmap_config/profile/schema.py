"""`Profile`: the language of profiles, as pydantic models, from which the JSON Schema for editors is generated."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_serializer, model_validator

from devmap_config.profile.document import MappingNode
from devmap_config.profile.field_types import (
    Address,
    Anything,
    Bandwidth,
    CacheBits,
    Count,
    DeviceGroup,
    Dispatch,
    Efficiency,
    Flag,
    Flops,
    HostName,
    Interface,
    Latency,
    ListedDevice,
    NamedDevice,
    OneOrMany,
    PatternText,
    PerSecond,
    Quantity,
    Quantization,
    ShareOfMemory,
    SpreadOfRuns,
    Text,
    Version,
    one_of,
    one_of_or_repository,
)
from devmap_config.profile.located import Located
from devmap_config.profile.refusals import refusal
from devmap_config.profile.section import Each, Section
from devmap_config.profile.synonyms import attention_meant, cache_backend_meant, dtype_meant, strategy_meant

if TYPE_CHECKING:
    from devmap_config.devices import Device
    from devmap_config.diagnostics.diagnostic import Span

OPTIMAL_STRATEGIES = ("fastest", "longest-context", "fewest-devices")
"""The strategies that compare times: the first by nothing else, the others if times can be predicted."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", *OPTIMAL_STRATEGIES, "single", "manual")

CACHES = ("dynamic", "static", "offloaded", "partly_offloaded", "offloaded_static", "quantized")
CACHE_BACKENDS = ("quanto", "fp8")
"""Those of transformers 5.24, except `hqq`."""

TARGETS = ("transformers", "vllm")

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Those of transformers 5.24; a kernel of the hub is named by its repository, `owner/name`."""


class Adapter(Section):
    """A LoRA that PEFT trained, loaded on top of the model: its folder, or its repository on the hub."""

    source: Located[Text] = Field(examples=["adapters/support-tone", "someone/llama-3.1-8b-lora"])
    """A folder with an `adapter_config.json`, or a hub id; an existing path wins. Paths are relative to this file."""

    revision: Text | None = Field(default=None, examples=["0123456789abcdef0123456789abcdef01234567"])
    """The commit of a hub id."""

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


class Assistant(Section):
    """A small draft model: it proposes tokens, of which the model takes those that it would have written itself."""

    source: Located[Text] = Field(examples=["meta-llama/Llama-3.2-1B", "models/llama-3.2-1b/config.json"])
    """A hub id, a local directory, or a `config.json`. It must have the vocabulary of the model."""

    revision: Text | None = Field(default=None, examples=["0123456789abcdef0123456789abcdef01234567"])
    """The commit of a hub id."""

    dtype: Located[Annotated[str, one_of(*DTYPES, meant=dtype_meant)]] = Field(
        default=Located("auto"), examples=["bfloat16"]
    )
    """The dtype in which its weights are loaded; `auto` takes the checkpoint's own."""

    device: Located[NamedDevice | None] = Field(default=Located(None), examples=["cuda:1"])
    """The device that holds all of it. Without it: the first accelerator, else the CPU."""

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value


class Model(Section):
    """The model, and how it is loaded."""

    source: Located[Text] = Field(examples=["meta-llama/Llama-3.1-8B", "models/llama-3.1-8b/config.json"])
    """A hub id, a local directory, or a `config.json`; an existing path wins. Paths are relative to this file."""

    revision: Text | None = Field(default=None, examples=["main"])
    """A branch, tag or commit of a hub id. The lock records the commit that it resolves to."""

    class_name: Located[Text | None] = Field(
        default=Located(None), alias="class", examples=["AutoModelForCausalLM", "LlamaForCausalLM"]
    )
    """An Auto class or a concrete class of transformers. Without it: the first of the config's `architectures`."""

    dtype: Located[Annotated[str, one_of(*DTYPES, meant=dtype_meant)]] = Field(
        default=Located("auto"), examples=["bfloat16"]
    )
    """The dtype in which weights are loaded; `auto` takes the checkpoint's own."""

    quantization: Located[Quantization] = Field(
        default=Located(None), examples=[{"method": "bitsandbytes", "load_in_8bit": True}]
    )
    """`method`, and the arguments of transformers' quantization config for that method."""

    attention: Annotated[str, one_of_or_repository(*ATTENTIONS, meant=attention_meant)] = Field(
        default="sdpa", examples=["sdpa", "eager", "flash_attention_2"]
    )
    """transformers' `attn_implementation`."""

    allow_new: OneOrMany[Located[PatternText]] = Field(default=(), examples=[["score"]])
    """Tensors or modules that no checkpoint holds, on purpose: a head that is yet to be trained."""

    adapter: Adapter | None = Field(default=None, examples=["adapters/support-tone"])
    """A LoRA adapter that is loaded on top, and placed with the modules that it adapts."""

    assistant: Assistant | None = Field(default=None, examples=[{"source": "models/llama-3.2-1b", "device": "cuda:1"}])
    """A draft model for `generate`, within the same budgets."""


MOST_IMAGES = 1_000
MOST_PIXELS_ACROSS = 4_096
MOST_PIXELS = 2**25
MOST_AUDIO_SECONDS = 86_400
"""The most sound in a prompt: larger values are mistakes, and measuring them would take minutes and gigabytes.
Processors shrink larger images: Qwen2.5-VL's gives the model 12,845,056 pixels at most.
"""


class Inputs(Section):
    """The images and the sound in the prompt of each sequence."""

    images: Count | None = Field(default=None, examples=[1])
    """The number of images."""

    image_size: OneOrMany[Count] | None = Field(default=None, examples=[[896, 896]])
    """Height and width of each in pixels, or one number for both; for a model that takes images of any size, or cuts
    them into tiles."""

    audio_seconds: Count | None = Field(default=None, examples=[30])
    """The seconds of sound."""

    @model_validator(mode="after")
    def _within_bounds(self) -> Inputs:
        largest = {
            "images": (self.images, MOST_IMAGES),
            "image_size": (max(self.image_size or (0,)), MOST_PIXELS_ACROSS),
            "audio_seconds": (self.audio_seconds, MOST_AUDIO_SECONDS),
        }
        for key, (value, most) in largest.items():
            if (value or 0) > most:
                message = f"`workload.inputs.{key}` is at most {most:,}, not {value:,}"
                raise refusal("wrong-type", message, "plan for what one request holds", key=key)
        pixels = prod((self.images or 1, *self.image_size, *self.image_size)[:3]) if self.image_size else 0
        if pixels > MOST_PIXELS:
            message = f"`workload.inputs` holds {pixels:,} pixels, and {MOST_PIXELS:,} at most can be measured"
            raise refusal("wrong-type", message, "plan for fewer or smaller images", key="image_size")
        return self

    @model_validator(mode="after")
    def _one_size_of_images(self) -> Inputs:
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            message = "`workload.inputs.image_size` is a height and a width"
            raise refusal("wrong-type", message, "all images have one size: the largest", key="image_size")
        if self.image_size is not None and self.images is None:
            message = "`workload.inputs.image_size` is that of images, and `images` says not how many"
            raise refusal("wrong-type", message, "write `images: 1` besides", key="image_size")
        return self


class Cache(Section):
    """The cache of a request: one of transformers' cache implementations."""

    implementation: Annotated[str, one_of(*CACHES)] = Field(default="dynamic", examples=list(CACHES))
    """`dynamic` grows with the context; `static` has its full length from the start. An `offloaded` cache is on the
    CPU, except for the layer that runs and the next; of a `partly_offloaded` one, the plan chooses the layers that are,
    so that it is fastest. A `quantized` one holds fewer bits of each number.
    """

    backend: Annotated[str, one_of(*CACHE_BACKENDS, meant=cache_backend_meant)] | None = Field(
        default=None, examples=list(CACHE_BACKENDS)
    )
    """The backend of a `quantized` cache: `quanto`, which needs the package `optimum-quanto`, or `fp8`. Without it:
    `quanto`.
    """

    bits: CacheBits | None = Field(default=None, examples=[4])
    """Bits of each number with `quanto`: 2 or 4. Without it: 4."""

    @model_validator(mode="before")
    @classmethod
    def _bare_implementation(cls, value: object) -> object:
        return {"implementation": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _backend_of_quantized(self) -> Cache:
        named = next((key for key in ("backend", "bits") if getattr(self, key) is not None), None)
        if named is not None and self.implementation != "quantized" and not self.doubtful:
            message = f"`workload.cache.{named}` is that of a cache that is quantised, and this one is not"
            raise refusal("wrong-type", message, "write `implementation: quantized` besides", key=named)
        if self.bits is not None and self.backend == "fp8":
            message = "`workload.cache.bits` is that of `quanto`: by `fp8`, each number has eight"
            raise refusal("wrong-type", message, "leave it out, or write `backend: quanto`", key="bits")
        if self.bits not in (None, 2, 4):
            message = f"`workload.cache.bits` cannot be `{self.bits}`"
            raise refusal("wrong-type", message, "2 or 4, which is what `quanto` has", key="bits")
        return self

    @model_serializer
    def _as_written(self) -> object:
        values = {"backend": self.backend, "bits": self.bits}
        more = {key: value for key, value in values.items() if value is not None}
        return {"implementation": self.implementation, **more} if more else self.implementation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cache) and self.said == other.said  # its place does not matter

    def __hash__(self) -> int:
        return hash(self.said)

    @property
    def said(self) -> tuple[str, str | None, int | None]:
        """The values of its keys."""
        return self.implementation, self.backend, self.bits


class Workload(Section):
    """The sequences and tokens that the plan must have room for."""

    batch_size: Count = Field(default=1, examples=[4])
    """Sequences that run at once."""

    context_length: Located[Count | None] = Field(default=Located(None), examples=[8192])
    """Tokens of prompt and answer together. Without it, only weights are budgeted."""

    prompt_length: Count | None = Field(default=None, examples=[4096])
    """The number of tokens that are prefilled at once. Without it: `context_length`; for `targets: [vllm]`, at most
    2,048.
    """

    inputs: Inputs = Field(default_factory=Inputs, examples=[{"images": 1, "image_size": [896, 896]}])
    """Images and sound in a prompt; the tokens that stand for them count as part of it."""

    logits: Annotated[str, one_of("last", "all")] = Field(default="last", examples=["last", "all"])
    """The positions for which logits are computed: the `last` of each sequence, as `generate` does, or `all`."""

    cache: Cache = Field(default=Cache(), examples=["static", {"implementation": "quantized", "backend": "quanto"}])
    """transformers' cache implementation."""

    optimize: Annotated[Literal["decode", "prefill", "request"], one_of("decode", "prefill", "request")] = Field(
        default="decode", examples=["decode", "request"]
    )
    """What should be fast: a decoded token, the prompt, or a whole request."""

    new_tokens: Count | None = Field(default=None, examples=[512])
    """Tokens that a request generates, for `optimize: request`."""

    concurrency: Located[Count] = Field(default=Located(1), examples=[32])
    """Requests in flight, each of `batch_size` sequences, for `targets: [vllm]`. With many, the slowest stage of a
    pipeline decides their speed; with one, the sum of all stages does.
    """

    @model_validator(mode="after")
    def _prompt_within_context(self) -> Workload:
        context_length = self.context_length.value
        if self.prompt_length is not None and context_length is not None and self.prompt_length > context_length:
            message = "`workload.prompt_length` must be at most `context_length`"
            raise refusal("wrong-type", message, "the context holds prompt and answer", key="prompt_length")
        return self


class Products(Section):
    """The most matrix products that a CPU computes in a second, even if they are small."""

    decode: PerSecond | None = Field(default=None, examples=["6000/s"])
    """Of one token."""

    prefill: PerSecond | None = Field(default=None, examples=["10000/s"])
    """Of a prompt."""


class Rates(Section):
    """The rates of a device with models of one dtype."""

    bandwidth: Bandwidth | None = Field(default=None, examples=["25GB/s"])
    """How fast the device reads its own memory."""

    flops: Flops | None = Field(default=None, examples=["100GFLOP/s"])
    """Dense floating-point operations a second."""

    products: Products = Field(default_factory=Products, examples=[{"prefill": "10000/s"}])
    """The most products that it computes in a second, even if they are small."""


class Attention(Section):
    """The rate at which a device computes attention in half precision, in floating-point operations a second."""

    decode: Flops | None = Field(default=None, examples=["6GFLOP/s"])
    """Of one query."""

    prefill: Flops | None = Field(default=None, examples=["200GFLOP/s"])
    """Of a prompt."""


class DeviceSection(Section):
    """One device, or each device of a range."""

    accelerator: Located[Text | None] = Field(default=Located(None), examples=["rtx-4090", "h100-sxm"])
    """A name of the catalogue (`devmap hardware` lists it), which supplies memory and figures that are not given here.
    """

    memory: Located[Quantity | None] = Field(default=Located(None), examples=["24GiB"])
    """The memory of the device. Required without `accelerator`."""

    reserve: Located[Quantity] = Field(default=Located(0), examples=["2GiB"])
    """Memory that is left to other programs, such as a desktop."""

    overhead: Located[Quantity | None] = Field(default=Located(None), examples=["1GiB"])
    """Memory that the device's context and workspaces take. Without it: the catalogue's, else none."""

    slack: Located[ShareOfMemory | None] = Field(default=Located(None), examples=["2%"])
    """A share of the memory that is left free, as allocators lose some. Without it: the catalogue's, else none."""

    bandwidth: Bandwidth | None = Field(default=None, examples=["1008GB/s"])
    """How fast the device reads its own memory. A word after a rate may say where it comes from: `measured`, which
    `devmap probe --measure` writes, or `calibrated`, which `devmap calibrate` writes.
    """

    flops: Flops | None = Field(default=None, examples=["165TFLOP/s"])
    """Dense floating-point operations a second in the model's dtype."""

    attention: Attention = Field(default_factory=Attention, examples=[{"decode": "6GFLOP/s", "prefill": "200GFLOP/s"}])
    """How fast attention is computed in half precision. Without it: as fast as other products, except on a CPU, where
    the attention of one query is 140 times as slow, and that of a prompt 5 times.
    """

    experts: Bandwidth | None = Field(default=None, examples=["12GB/s"])
    """How fast the experts that a token chooses are read. Without it: as fast as other weights."""

    products: Products = Field(default_factory=Products, examples=[{"decode": "6000/s", "prefill": "10000/s"}])
    """The most matrix products that a CPU computes in a second, even if they are small, as handing each to its threads
    takes time. Without it: as many as `bandwidth` and `flops` allow.
    """

    dtypes: Mapping[Annotated[str, one_of(*DTYPES[1:])], Each[Rates]] = Field(
        default={}, examples=[{"float32": {"bandwidth": "25GB/s", "flops": "100GFLOP/s"}}]
    )
    """By dtype of the model, figures that replace `bandwidth`, `flops`, `products` and `experts`."""

    efficiency: Efficiency | None = Field(default=None, examples=["80%"])
    """The share of bandwidth and flops that is reached. Without it: the catalogue's. Measured and calibrated rates are
    reached in full.
    """


class Link(Section):
    """A connection between devices."""

    bandwidth: Bandwidth = Field(examples=["25GB/s"])
    """Bytes a second, one way."""

    latency: Latency | None = Field(default=None, examples=["10us"])
    """Time until the first byte arrives."""

    @model_validator(mode="before")
    @classmethod
    def _bare_bandwidth(cls, value: object) -> object:
        return {"bandwidth": value} if isinstance(value, (str, int, float)) else value


class Host(Section):
    """The CPU that runs Python and dispatches operations to the devices."""

    dispatch: Dispatch | None = Field(default=None, examples=["12us"])
    """The time to dispatch one operation of torch. Without it: a time that was measured on servers."""


class Spreads(Section):
    """The times of runs relative to those that were predicted by rates calibrated with other runs."""

    decode: SpreadOfRuns | None = Field(default=None, examples=["94-108%"])
    """The least and the most of a token."""

    prefill: SpreadOfRuns | None = Field(default=None, examples=["90-117%"])
    """The least and the most of a prefill."""


class Network(Section):
    """The network that connects a host to the others."""

    bandwidth: Bandwidth | None = Field(default=None, examples=["12.5GB/s"])
    """Bytes a second, one way. Without it: that of `hardware.links.network`."""

    latency: Latency | None = Field(default=None, examples=["30us"])
    """Time until the first byte arrives."""

    address: Located[Address | None] = Field(default=Located(None), examples=["10.0.0.1"])
    """The address at which the other hosts reach it."""

    interface: Located[Interface | None] = Field(default=Located(None), examples=["eth0"])
    """The network interface that has this address."""

    @model_validator(mode="before")
    @classmethod
    def _bare_bandwidth(cls, value: object) -> object:
        return {"bandwidth": value} if isinstance(value, (str, int, float)) else value


class HostSection(Section):
    """One of several machines."""

    devices: Located[Annotated[Mapping[ListedDevice, Each[DeviceSection]], Field(min_length=1)]] = Field(
        examples=[{"cuda:[0-7]": "h100-sxm"}]
    )
    """Its devices by name. Beside accelerators, the CPU runs nothing; without any, `cpu` is one rank of vLLM, and
    `cpu:[0-1]` are two, each with the memory that is given.
    """

    links: Mapping[Text, Each[Link]] = Field(default={}, examples=[{"host": "25GB/s", "peer": "450GB/s"}])
    """The links within it, as in `hardware.links`."""

    network: Network = Field(default_factory=Network, examples=[{"bandwidth": "12.5GB/s", "address": "10.0.0.1"}])
    """Its connection to the other hosts."""


class Hardware(Section):
    """The machine, or the machines. A device that is not listed here does not exist."""

    ALTERNATIVES: ClassVar[Mapping[str, str]] = {"devices": "hosts"}

    devices: Located[Annotated[Mapping[ListedDevice, Each[DeviceSection]], Field(min_length=1)]] = Field(
        examples=[{"cuda:[0-1]": "rtx-4090", "cpu": {"memory": "64GiB"}}]
    )
    """Devices by name: `cuda:0`, a range such as `cuda:[0-7]`, `cpu`, `disk`."""

    hosts: Mapping[HostName, Each[HostSection]] = Field(
        default={}, examples=[{"left": {"devices": {"cuda:[0-7]": "h100-sxm"}, "network": "12.5GB/s"}}]
    )
    """Machines by name, in the order of their ranks, instead of `devices`; for `targets: [vllm]`."""

    links: Mapping[Text, Each[Link]] = Field(default={}, examples=[{"host": "25GB/s", "peer": "12GB/s"}])
    """`host`, `together`, `unpinned`, `peer`, `disk`, `network`, or a pair such as `cuda:0-cuda:1`. Without them: the
    catalogue's.

    `host` is the rate of copies from pinned memory. `unpinned` is that from other memory, from which accelerate copies;
    without it, half of `host`, but at most 10 GB/s. `together` is the rate at which the CPU's memory serves all cards
    at once; without it, that of one card, as if all shared a switch.
    """

    host: Host = Field(default_factory=Host, examples=[{"dispatch": "12us"}])
    """How fast operations are dispatched to the devices; `devmap probe --measure` measures it."""

    spread: Spreads = Field(default_factory=Spreads, exclude=True, examples=[{"decode": "94-108%"}])
    """How far the times of runs were from those that calibrated rates predict; `devmap calibrate` writes it."""

    @model_validator(mode="after")
    def _devices_or_hosts(self) -> Hardware:
        if self.hosts and self.devices.value:
            message = "`hardware.hosts` stands in place of `hardware.devices`, and both are given"
            raise refusal("wrong-type", message, "list devices under the host that has them", key="hosts")
        return self

    @property
    def listings(self) -> Mapping[str | None, Located[Mapping[Device, DeviceSection]]]:
        """The listed devices by host; by `None` if there is only one machine."""
        hosts: dict[str | None, Located[Mapping[Device, DeviceSection]]] = {
            name: host.devices for name, host in self.hosts.items()
        }
        return hosts or {None: self.devices}

    @property
    def listed(self) -> Mapping[Device, DeviceSection]:
        """Every device of every host, in the order of the hosts."""
        return {device: section for listing in self.listings.values() for device, section in listing.value.items()}

    @property
    def knows_devices(self) -> bool:
        """True if the names of all devices could be read; otherwise a device that seems unknown may be listed after
        all.
        """
        if "hosts" in self.doubtful and not self.hosts:
            return False
        nodes = [listing.place.node for listing in self.listings.values()]
        return not any(
            entry.key.is_unrendered for node in nodes if isinstance(node, MappingNode) for entry in node.entries
        )

    def device_span(self, device: Device) -> Span:
        """Return the place of a device's name, or of `devices` if it is not listed."""
        section = self.listed.get(device)
        return self.devices.key_span if section is None else section.key_span


class Pin(Section):
    """A rule for a part of the model."""

    STAND_INS: ClassVar[Mapping[str, object]] = {"match": "**"}

    match: Located[PatternText] = Field(examples=["lm_head", "model.layers.[0-15]"])
    """A pattern of module paths; it matches all that is below them, too."""

    device: Located[NamedDevice | None] = Field(default=Located(None), examples=["cuda:0", 0, "cpu"])
    """The device that stores its weights."""

    compute: Located[NamedDevice | None] = Field(default=Located(None), examples=["cpu"])
    """The device that it runs on, if not the one that the executor would choose."""

    not_on: OneOrMany[Located[NamedDevice]] = Field(default=(), examples=[["cuda:1", "disk"]])
    """Devices that must store nothing of it."""

    keep_together: Flag = Field(default=False, examples=[True])
    """Whether everything that it matches must be on one device."""

    override: Flag = Field(default=False, examples=[True])
    """Whether this rule outranks earlier ones that contradict it."""

    optional: Flag = Field(default=False, examples=[True])
    """Whether it is allowed to match nothing."""

    @model_validator(mode="after")
    def _says_something(self) -> Pin:
        if self.doubtful:
            return self  # the rest of it is checked, but what it asks for is unknown
        if self.device.value is None and self.compute.value is None and not self.not_on and not self.keep_together:
            help = "give it `device`, `compute`, `not_on` or `keep_together`"
            raise refusal("empty-pin", "the pin asks for nothing", help)
        return self


class Offload(Section):
    """The folder for offloaded weights, and what is offloaded."""

    folder: Located[Text | None] = Field(default=Located(None), examples=["./offload"])
    """The folder that weights on `disk` are written to, relative to this file."""

    buffers: Located[Flag | None] = Field(default=Located(None), examples=[True])
    """Whether buffers of streamed modules are streamed as well (accelerate's `offload_buffers`). Without it, the plan
    decides: it streams them only if the model fits no other way, as with GPTQ, whose weights are buffers.
    """


class PlacementSection(Section):
    """A strategy, and the rules that it must obey."""

    strategy: Located[
        Annotated[
            str,
            one_of(*STRATEGIES, code="unknown-strategy", message="`{value}` is not a strategy", meant=strategy_meant),
        ]
    ] = Field(default=Located("auto"), examples=list(STRATEGIES))
    """How everything is placed that is not pinned."""

    device: Located[NamedDevice | None] = Field(default=Located(None), examples=["cuda:0"])
    """For `single`: the device. Without it: the first accelerator, else the CPU."""

    device_map: Located[Mapping[Located[PatternText], Each[Located[NamedDevice]]] | None] = Field(
        default=Located(None), examples=[{"model.embed_tokens": 0, "model.layers.[0-15]": 0, "model.layers.[16-31]": 1}]
    )
    """For `manual`: a mapping from pattern to device, used as it is."""

    max_memory: Mapping[ListedDevice, Each[Located[Quantity]]] = Field(
        default={}, examples=[{0: "20GiB", "cpu": "30GiB"}]
    )
    """Caps by device; a device that is not named keeps its capacity."""

    pins: tuple[Each[Pin], ...] = Field(default=(), examples=[[{"match": "lm_head", "device": "cuda:1"}]])
    """Rules for parts of the model; they hold under every strategy."""

    groups: OneOrMany[Located[DeviceGroup]] = Field(default=(), examples=[["cuda:[0-3]", "cuda:[4-7]"]])
    """Equal devices of one host that share each layer between them (tensor parallelism), for `targets: [vllm]`: each
    group is one stage, and all groups have the same number of devices.
    """

    offload: Offload = Field(default_factory=Offload)
    """How weights are stored outside of memory."""


class Profile(Section):
    """A model, a machine, and rules for placing the one on the other."""

    STAND_INS: ClassVar[Mapping[str, object]] = {"version": "1"}

    version: Version = Field(examples=[1])
    """The version of this language: 1."""

    name: Text | None = Field(default=None, examples=["llama-3.1-70b-two-24gb"])
    """The name of this profile."""

    description: Text | None = Field(default=None, examples=["two cards and what the CPU can hold"])
    """What this profile is for."""

    extends: OneOrMany[Text] = Field(default=(), examples=[["hardware/mixed-box.yaml"]])
    """Files that this one builds on; they are merged in order, this file last."""

    variables: Mapping[str, Anything] = Field(default={}, examples=[{"context": 8192}])
    """Values for templates; `--set name=value` replaces a value."""

    model: Model
    """The model."""

    workload: Workload = Field(default_factory=Workload)
    """What must fit besides the weights."""

    hardware: Hardware
    """The machine."""

    placement: PlacementSection = Field(default_factory=PlacementSection)
    """How the model is placed."""

    targets: Located[OneOrMany[Annotated[str, one_of(*TARGETS)]]] = Field(
        default=Located(("transformers",)), examples=[["transformers"], ["vllm"]]
    )
    """The engine that runs the plan: `transformers` or `vllm`."""

    @property
    def is_for_vllm(self) -> bool:
        """True if the plan is for vLLM."""
        return "vllm" in self.targets.value
