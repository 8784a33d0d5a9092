"""`Profile`: what a profile may say, as pydantic models; the JSON Schema of editors is generated from them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from devmap_config.devices import Device
from devmap_config.profile.device_names import DeviceNameError, expand_devices
from devmap_config.profile.located import Located, WrittenNothing, WrittenText
from devmap_config.profile.quantities import (
    QuantityError,
    Share,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_nanoseconds,
    parse_share,
)
from devmap_config.profile.section import REFUSED, Each, Section, refusal
from devmap_config.quantization.registry import METHODS

if TYPE_CHECKING:
    from devmap_config.diagnostics.codes import ErrorCode
    from devmap_config.diagnostics.diagnostic import Span

OPTIMAL_STRATEGIES = ("fastest", "longest-context", "fewest-devices")
"""Those that compare times; the first has to and is after nothing else, the others do where they can."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential", *OPTIMAL_STRATEGIES, "single", "manual")

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""transformers 5.24's implementations; a kernel of the hub is named by its repository, `owner/name`."""

TEMPLATE_SCHEMA = {"type": "string", "pattern": r"\{\{|\{%"}
"""A template may stand for any scalar; what it renders to is checked by the compiler."""


def _or_template(schema: Mapping[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [dict(schema), TEMPLATE_SCHEMA]})


def _resolved(value: object) -> object:
    return value.value if isinstance(value, (WrittenText, WrittenNothing)) else value


def _plain_str(value: object) -> object:
    return str(value) if isinstance(value, str) else value


def _one_of(
    *choices: str, code: ErrorCode = "wrong-type", message: str = "{{route}} cannot be `{value}`", **context: object
) -> Callable[[object], object]:
    def check(value: object) -> object:
        if isinstance(value, str) and value in choices:
            return str(value)
        close = difflib.get_close_matches(str(value), choices, n=1)
        meant = f"did you mean `{close[0]}`? " if close else ""
        listed = f"one of {', '.join(f'`{each}`' for each in choices)}"
        raise refusal(code, message.format(value=value), meant + listed, **context)

    return check


def _attention(value: object) -> object:
    return str(value) if isinstance(value, str) and "/" in value else _one_of(*ATTENTIONS)(value)


def _version(value: object) -> object:
    if str(value) != "1":
        raise refusal("unsupported-version", *unsupported_version(str(value)))
    return 1


def unsupported_version(version: str) -> tuple[str, str]:
    """Return what is wrong with another version of the language, and what to do."""
    message = f"version {version} of the profile language is not known"
    return message, "this devmap-config reads `version: 1`; a newer one may read more"


def _quantization(value: object) -> object:
    if isinstance(value, dict):
        if "method" not in value:
            raise refusal("missing-key", "`method` is missing in {route}", "such as `method: bitsandbytes`")
        _one_of(*METHODS, key="method")(value["method"])
    return _deeply_resolved(value)


Parsed = TypeVar("Parsed")


def _quantity(parse: Callable[[str], Parsed]) -> Callable[[object], Parsed]:
    def check(value: object) -> Parsed:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise PydanticCustomError("quantity_type", "a quantity")
        try:
            return parse(str(value).strip())
        except QuantityError as error:
            raise refusal("bad-quantity", error.message, error.help) from None

    return check


def _device(value: object) -> Device:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise PydanticCustomError("device_type", "a device")
    try:
        devices = expand_devices(str(value), "cuda")
    except DeviceNameError as error:
        raise refusal("bad-device-name", error.message, error.help) from None
    if len(devices) > 1:
        message = f"`{value}` is several devices, and one is wanted here"
        raise refusal("bad-device-name", message, f"write `{devices[0]}`")
    return devices[0]


def _device_or_number(value: object) -> Device | int:
    """A number stays one: of which kind it is, the machine says."""
    device = _device(value)
    return int(str(value)) if str(value).isdecimal() else device


def _pattern_text(value: object) -> object:
    """A pattern is text, also where YAML reads a number (`0`)."""
    return str(value) if isinstance(value, str) else value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


BYTES_PATTERN = r"^[0-9]+(\.[0-9]+)? ?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB|%)?$"
RATE_PATTERN = r"^[0-9]+(\.[0-9]+)? ?((B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)/s)?$"
DEVICE_PATTERN = r"^((cuda|xpu|npu|hpu):)?[0-9]+$|^cpu(:0)?$|^disk$|^mps(:0)?$"
DEVICE_KEY_PATTERN = (
    r"^((cuda|xpu|npu|hpu|mps):)?([0-9]+|\[[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*\])$|^cpu(:0)?$|^disk$|^mps$"
)

Text = Annotated[str, BeforeValidator(_plain_str), WithJsonSchema({"type": ["string", "number", "boolean"]})]
Count = Annotated[
    int, BeforeValidator(_resolved), Field(strict=True, ge=1), _or_template({"type": "integer", "minimum": 1})
]
Flag = Annotated[bool, BeforeValidator(_resolved), Field(strict=True), _or_template({"type": "boolean"})]
Quantity = Annotated[
    int | Share,
    BeforeValidator(_quantity(parse_bytes)),
    PlainSerializer(lambda value: str(value.fraction) if isinstance(value, Share) else value),
    _or_template({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": BYTES_PATTERN}]}),
]
ShareOfMemory = Annotated[
    Fraction,
    BeforeValidator(_quantity(parse_share)),
    PlainSerializer(str),
    _or_template(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?%?$"},
            ]
        }
    ),
]
BANDWIDTH_SCHEMA = {
    "anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": RATE_PATTERN}, TEMPLATE_SCHEMA]
}
Bandwidth = Annotated[int, BeforeValidator(_quantity(parse_bandwidth)), WithJsonSchema(BANDWIDTH_SCHEMA)]
Flops = Annotated[
    int,
    BeforeValidator(_quantity(parse_flops)),
    _or_template(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?([GTP]FLOP/s)?$"},
            ]
        }
    ),
]
Latency = Annotated[
    int,
    BeforeValidator(_quantity(parse_nanoseconds)),
    _or_template({"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(ns|us|µs|ms|s)$"}),
]
ListedDevice = Annotated[Device, PlainValidator(_device), PlainSerializer(str), WithJsonSchema({"type": "string"})]
"""A key that names a device; merging has made it canonical."""
NamedDevice = Annotated[
    Device | int,
    PlainValidator(_device_or_number),
    PlainSerializer(str),
    _or_template({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": DEVICE_PATTERN}]}),
]
PatternText = Annotated[str, BeforeValidator(_pattern_text), WithJsonSchema({"type": ["string", "integer"]})]
Strategy = Annotated[
    str,
    BeforeValidator(_one_of(*STRATEGIES, code="unknown-strategy", message="`{value}` is no strategy")),
    _or_template({"enum": list(STRATEGIES)}),
]
Dtype = Annotated[str, BeforeValidator(_one_of(*DTYPES)), _or_template({"enum": list(DTYPES)})]


def _deeply_resolved(value: object) -> object:
    """Every unquoted scalar within a value as what YAML reads."""
    if isinstance(value, dict):
        return {str(key): _deeply_resolved(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_deeply_resolved(each) for each in value]
    return _resolved(value)


Anything = Annotated[Any, BeforeValidator(_deeply_resolved), WithJsonSchema({})]


Attention = Annotated[
    str,
    BeforeValidator(_attention),
    _or_template({"anyOf": [{"enum": list(ATTENTIONS)}, {"type": "string", "pattern": "/"}]}),
]
Quantization = Annotated[
    Mapping[str, Any] | None,
    BeforeValidator(_quantization),
    WithJsonSchema(
        {
            "type": "object",
            "required": ["method"],
            "properties": {"method": {"anyOf": [{"enum": list(METHODS)}, TEMPLATE_SCHEMA]}},
        }
    ),
]


def _choice(*choices: str) -> Any:
    return Annotated[str, BeforeValidator(_one_of(*choices)), _or_template({"enum": list(choices)})]


class Model(Section):
    """Which model, and how it is loaded."""

    source: Located[Text] = Field(examples=["meta-llama/Llama-3.1-8B", "models/llama-3.1-8b/config.json"])
    """A hub id, a local directory, or a `config.json`; an existing path wins. Paths are relative to this file."""

    revision: Text | None = Field(default=None, examples=["main"])
    """A branch, tag or commit of a hub id. The commit that it resolves to stands in the lock."""

    class_name: Located[Text | None] = Field(
        default=Located(None), alias="class", examples=["AutoModelForCausalLM", "LlamaForCausalLM"]
    )
    """An Auto class or a concrete class of transformers. Without it: the first of the config's `architectures`."""

    dtype: Located[Dtype] = Field(default=Located("auto"), examples=["bfloat16"])
    """The dtype in which weights are loaded; `auto` takes the checkpoint's own."""

    quantization: Located[Quantization] = Field(
        default=Located(None), examples=[{"method": "bitsandbytes", "load_in_8bit": True}]
    )
    """`method` and the arguments of transformers' quantization config of that method."""

    attention: Attention = Field(default="sdpa", examples=["sdpa", "eager", "flash_attention_2"])
    """transformers' `attn_implementation`."""

    allow_new: Annotated[tuple[Located[PatternText], ...], BeforeValidator(_one_or_many)] = Field(
        default=(), examples=[["score"]]
    )
    """Tensors, or modules, that are new on purpose: a head that is to be trained, which no checkpoint holds."""


class Workload(Section):
    """Sequences and tokens, and what is kept and computed for them."""

    batch_size: Count = Field(default=1, examples=[4])
    """Sequences that run at once."""

    context_length: Located[Count | None] = Field(default=Located(None), examples=[8192])
    """Tokens of prompt and answer together. Without it only weights are budgeted."""

    prompt_length: Count | None = Field(default=None, examples=[4096])
    """How many tokens are prefilled at once. Without it: `context_length`."""

    logits: _choice("last", "all") = Field(default="last", examples=["last", "all"])  # type: ignore[valid-type]
    """Which positions get logits: the `last` of each sequence, as `generate` does, or `all`."""

    cache: _choice("dynamic", "static") = Field(default="dynamic", examples=["dynamic", "static"])  # type: ignore[valid-type]
    """transformers' cache implementation."""

    optimize: _choice("decode", "prefill", "request") = Field(default="decode", examples=["decode", "request"])  # type: ignore[valid-type]
    """What is to be fast: a decoded token, the prompt, or a whole request."""

    new_tokens: Count | None = Field(default=None, examples=[512])
    """Tokens that a request generates, for `optimize: request`."""

    @model_validator(mode="after")
    def _prompt_within_context(self) -> Workload:
        context_length = self.context_length.value
        if self.prompt_length is not None and context_length is not None and self.prompt_length > context_length:
            message = "`workload.prompt_length` must be at most `context_length`"
            raise refusal("wrong-type", message, "the context holds prompt and answer", key="prompt_length")
        return self


class DeviceSection(Section):
    """One device, or each of a range of them."""

    accelerator: Located[Text | None] = Field(default=Located(None), examples=["rtx-4090", "h100-sxm"])
    """A name of the catalogue (`devmap hardware` lists it), for memory and figures that are not given here."""

    memory: Located[Quantity | None] = Field(default=Located(None), examples=["24GiB"])
    """What the device has. Required without `accelerator`."""

    reserve: Quantity = Field(default=0, examples=["2GiB"])
    """Kept for others, such as a desktop."""

    overhead: Quantity | None = Field(default=None, examples=["1GiB"])
    """Kept for the device's context and workspaces. Without it: the catalogue's, else none."""

    slack: ShareOfMemory | None = Field(default=None, examples=["2%"])
    """A share of the memory that is left free. Without it: the catalogue's, else none."""

    bandwidth: Bandwidth | None = Field(default=None, examples=["1008GB/s"])
    """How fast the device reads its own memory."""

    flops: Flops | None = Field(default=None, examples=["165TFLOP/s"])
    """Dense floating-point operations a second in the model's dtype."""

    efficiency: ShareOfMemory | None = Field(default=None, examples=["80%"])
    """How much of bandwidth and flops is reached. Without it: the catalogue's."""


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


class Hardware(Section):
    """The machine. A device that is not listed here does not exist."""

    devices: Located[Annotated[Mapping[ListedDevice, Each[DeviceSection]], Field(min_length=1)]] = Field(
        examples=[{"cuda:[0-1]": "rtx-4090", "cpu": {"memory": "64GiB"}}]
    )
    """Devices by name: `cuda:0`, a range such as `cuda:[0-7]`, `cpu`, `disk`."""

    links: Mapping[str, Each[Link]] = Field(default={}, examples=[{"host": "25GB/s", "peer": "12GB/s"}])
    """`host`, `peer`, `disk`, `network`, or a pair such as `cuda:0-cuda:1`. Without them: the catalogue's."""

    def device_span(self, device: Device) -> Span:
        """Return the place of a device's name; of `devices` where it is not listed."""
        section = self.devices.value.get(device)
        return self.devices.key_span if section is None else section.key_span


class Pin(Section):
    """What is asked of a part of the model."""

    match: Located[PatternText] = Field(examples=["lm_head", "model.layers.[0-15]"])
    """A pattern of module paths; a match means all below it."""

    device: Located[NamedDevice | None] = Field(default=Located(None), examples=["cuda:0", 0, "cpu"])
    """Where its weights are stored."""

    compute: Located[NamedDevice | None] = Field(default=Located(None), examples=["cpu"])
    """Where it runs, if not where the executor would run it."""

    not_on: Annotated[tuple[Located[NamedDevice], ...], BeforeValidator(_one_or_many)] = Field(
        default=(), examples=[["cuda:1", "disk"]]
    )
    """Devices on which nothing of it may be stored."""

    keep_together: Flag = Field(default=False, examples=[True])
    """Whether all that it matches must be on one device."""

    override: Flag = Field(default=False, examples=[True])
    """Whether this rule wins over earlier ones that say something else of the same module."""

    optional: Flag = Field(default=False, examples=[True])
    """Whether it may match nothing."""

    @model_validator(mode="after")
    def _says_something(self) -> Pin:
        if not self.is_sound:
            raise REFUSED
        if self.device.value is None and self.compute.value is None and not self.not_on and not self.keep_together:
            help = "give it `device`, `compute`, `not_on` or `keep_together`"
            raise refusal("empty-pin", "the pin asks for nothing", help)
        return self


class Offload(Section):
    """A folder, and what is kept there."""

    folder: Located[Text | None] = Field(default=Located(None), examples=["./offload"])
    """Where weights on `disk` are written. Relative to this file."""

    buffers: Located[Flag | None] = Field(default=Located(None), examples=[True])
    """Whether buffers of streamed modules are streamed as well (accelerate's `offload_buffers`). Without it the plan
    decides: they are where it fits no other way, such as GPTQ's weights, which are buffers."""


class PlacementSection(Section):
    """A strategy, and what it must hold to."""

    strategy: Located[Strategy] = Field(default=Located("auto"), examples=list(STRATEGIES))
    """How what is not pinned is placed."""

    device: Located[NamedDevice | None] = Field(default=Located(None), examples=["cuda:0"])
    """For `single`: the device. Without it: the first accelerator, else the CPU."""

    device_map: Located[Mapping[Located[PatternText], Each[Located[NamedDevice]]] | None] = Field(
        default=Located(None), examples=[{"model.embed_tokens": 0, "model.layers.[0-15]": 0, "model.layers.[16-31]": 1}]
    )
    """For `manual`: pattern to device, pasted as it is."""

    max_memory: Mapping[ListedDevice, Each[Located[Quantity]]] = Field(
        default={}, examples=[{0: "20GiB", "cpu": "30GiB"}]
    )
    """Caps by device; a device that is not named keeps its capacity."""

    pins: tuple[Each[Pin], ...] = Field(default=(), examples=[[{"match": "lm_head", "device": "cuda:1"}]])
    """Rules for parts of the model; they hold under every strategy."""

    offload: Offload = Field(default_factory=Offload)
    """How weights are kept outside of memory."""


class Profile(Section):
    """A model, a machine, and where the one goes on the other."""

    STAND_INS: ClassVar = {"version": "1"}

    version: Annotated[int, BeforeValidator(_version), WithJsonSchema({"const": 1})] = Field(examples=[1])
    """The version of this language: 1."""

    name: Text | None = Field(default=None, examples=["llama-3.1-70b-two-24gb"])
    """What this profile is called."""

    description: Text | None = Field(default=None, examples=["two cards and what the CPU can hold"])
    """What it is for."""

    extends: Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)] = Field(
        default=(), examples=[["hardware/mixed-box.yaml"]]
    )
    """Files that this one builds on, merged in order, this file last."""

    variables: Mapping[str, Anything] = Field(default={}, examples=[{"context": 8192}])
    """Values for templates; `--set name=value` replaces one."""

    model: Model
    """Which model."""

    workload: Workload = Field(default_factory=Workload)
    """What must fit besides the weights."""

    hardware: Hardware
    """The machine."""

    placement: PlacementSection = Field(default_factory=PlacementSection)
    """Where the model goes."""

    targets: tuple[_choice("transformers"), ...] = Field(default=("transformers",), examples=[["transformers"]])  # type: ignore[valid-type]
    """What the plan is made for."""
