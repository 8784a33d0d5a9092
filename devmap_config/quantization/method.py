"""`Method`: a method of quantization, and `Quantization`: its application to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.quantization.arguments import QuantizationError, reported_as_error
from devmap_config.quantization.weights import linear_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.quantization.weights import Weight, Weights

FLOAT32_BYTES = 4
"""The bytes of an element of float32, in which most quantizers compute, whatever their input."""

Arguments = Mapping[str, Any]
"""The arguments of transformers' config for a method, without the method."""


class Format(NamedTuple):
    """The format of converted weights.

    Attributes:
        size: returns the bytes of a matrix with scales and other companions, or `None` for a shape that is not
            converted.
        planner: returns the bytes that transformers' planner counts for it (`param_element_size`).
        dtype: torch's name of the packed dtype; `None` if it is the model's own.
        bias_dtype: torch's name of the dtype of biases, if it is not the model's.
        in_buffers: the quantizer's modules hold everything in buffers, which accelerate treats differently from
            parameters.
        is_dense_where_offloaded: weights on `cpu` or `disk` of a map are left unquantised.
    """

    dtype: str | None
    size: Callable[[Weight], int | None]
    planner: Callable[[Weight], float]
    bias_dtype: str | None = None
    in_buffers: bool = False
    is_dense_where_offloaded: bool = False


class Copies(NamedTuple):
    """Temporary bytes besides a quantised weight, for each of its elements.

    Attributes:
        multiplying: the bytes of copies for a product; each is written once and read once.
        for_each_token: these copies are made even for a single token, for which kernels of other methods read the
            quantised weight.
        quantising: the most bytes while it is quantised: its dense values, intermediate values and the result; 0 if
            there are no intermediate values.
    """

    multiplying: int = 0
    for_each_token: bool = False
    quantising: int = 0


UNCHANGED = Format(None, lambda _: None, lambda weight: weight.elements * weight.element_bytes)
"""The format of weights that are dequantised while loading: dense, as without quantization."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The storage devices that a quantizer refuses in a map, and the conditions, by its `validate_environment` unless
    noted otherwise.

    `alone_is_fine`: a map with only the CPU is accepted. `whole_is_fine`: a map with a single key for the CPU is.
    `prequantized_is_fine` and `quantizing_is_fine`: a checkpoint that is quantised already is accepted, or one that is
    quantised while loading. `one_device_only`: several accelerators are refused, too. `unless` is an argument of the
    quantization that makes it accept these devices, and leave weights there unquantised, which is impossible for a
    checkpoint that is quantised already.
    """

    devices: tuple[Device, ...] = ()
    alone_is_fine: bool = False
    whole_is_fine: bool = False
    prequantized_is_fine: bool = False
    quantizing_is_fine: bool = False
    one_device_only: bool = False
    unless: str | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """The properties of a method of quantization; the defaults are those of a method with unknown sizes.

    Attributes:
        name: transformers' name of it (`QuantizationMethod`).
        format: the format of the weights; `None` if the arguments do not determine it, or it is unknown.
        converts: yields the names of the converted tensors of a model on the meta device.
        details: returns the arguments in a few words, for the heading of a plan.
        copies: returns the copies of weights that quantising and multiplying make, given the bytes of an element of
            their dense values.
        computes_in: torch's name of the dtype that modules compute in, if it is not the activations'.
        source: the source of `copies`.
        refusal: the devices onto which the quantizer does not load.
        lowers_budgets: the quantizer's `adjust_max_memory` takes a tenth off every budget of the planner.
        needs_accelerator: without an accelerator, transformers dequantises the checkpoint while loading.
        needs_fp8: accelerators must support fp8.
        needs_quantized_checkpoint: transformers quantises nothing with it while loading: the quantizer demands a
            quantised checkpoint (`requires_calibration`, and GGUF's own file), or has no operation to quantise with
            (`get_quantize_ops`).
        offloads_buffers: transformers sets accelerate's `offload_buffers` itself (`accelerate_dispatch`).
        loading_arguments: the arguments of a checkpoint's own quantization that a profile may change
            (`get_loading_attributes`).
        completed: returns the arguments in transformers' form, if a profile may omit some.
    """

    name: str
    format: Callable[[Quantization], Format | None] = lambda _: None
    converts: Callable[[PreTrainedModel, Arguments], Weights] = linear_weights
    details: Callable[[Arguments], str] = lambda _: ""
    copies: Callable[[Quantization, int], Copies] = lambda *_: Copies()
    computes_in: Callable[[Arguments], str | None] = lambda _: None
    source: str = ""
    refusal: Refusal = Refusal()
    lowers_budgets: bool = False
    needs_accelerator: bool = False
    needs_fp8: bool = False
    needs_quantized_checkpoint: bool = False
    offloads_buffers: bool = False
    loading_arguments: tuple[str, ...] = ()
    completed: Callable[[Arguments], Arguments] = lambda arguments: arguments


QUANTISING = ("bitsandbytes", "torchao", "quanto", "fp8")
"""The methods to recommend that quantise while loading: those whose sizes are then known, for any model."""

PATCHED_MODEL_TYPES = ("llama4", "llama4_text")
"""Types of models whose experts become other modules in a quantised checkpoint
(`MODULES_TO_PATCH_FOR_QUANTIZATION`).
"""


@dataclass(frozen=True)
class Quantization:
    """A quantization of a model as transformers applies it.

    `is_prequantized`: the checkpoint holds quantised weights, so that nothing is quantised while loading. `model_type`
    is the model's. `is_on_cpu`: there is no accelerator, so that kernels may need copies of weights.
    """

    method: Method
    arguments: Arguments
    is_prequantized: bool = False
    model_type: str = ""
    is_on_cpu: bool = False

    def format(self) -> Format | None:
        """The format of its weights, or `None` if it is unknown.

        Raises:
            QuantizationError: if its arguments are invalid, or it quantises nothing while loading and must.
        """
        if self.method.needs_quantized_checkpoint and not self.is_prequantized:
            raise QuantizationError(
                f"{self.method.name} quantises no weights while loading, and this checkpoint is not quantised",
                f"name a checkpoint that {self.method.name} quantised; or a method that quantises while loading:"
                f" {', '.join(QUANTISING)}",
            )
        with reported_as_error(self.method.name):
            return self.method.format(self)

    @property
    def computes_in(self) -> str | None:
        """torch's name of the dtype that converted modules compute in, if it is not that of the activations."""
        return self.method.computes_in(self.arguments)

    def __str__(self) -> str:
        """Return the quantization in a few words, for the heading of a plan: `gptq 4 bit`, `bitsandbytes nf4 4 bit`."""
        details = "dequantised" if self.format() is UNCHANGED else self.method.details(self.arguments)
        return f"{self.method.name} {details}".rstrip()

    @property
    def running(self) -> str | None:
        """The quantization in a few words, with the dtype that it computes in if its arguments determine that; `None`
        if weights are dequantised while loading.
        """
        computes_in = f" in {self.computes_in}" if self.computes_in else ""
        return None if self.format() is UNCHANGED else f"{self}{computes_in}"

    def to_json(self) -> dict[str, Any]:
        """Return everything that a graph depends on, as plain data."""
        form = self.format()
        in_buffers = {"in_buffers": True} if form is not None and form.in_buffers else {}  # older graphs lack this key
        on_cpu = {"on_cpu": True} if self.is_on_cpu else {}
        return {
            "method": self.method.name,
            "arguments": dict(self.arguments),
            "prequantized": self.is_prequantized,
            **in_buffers,
            **on_cpu,
        }

    @property
    def is_patched(self) -> bool:
        """True if transformers replaces more modules of the model than the quantizer does."""
        return self.is_prequantized and self.model_type in PATCHED_MODEL_TYPES

    @property
    def refused_devices(self) -> tuple[Device, ...]:
        """The devices that the quantizer does not load onto, beside accelerators."""
        refusal = self.method.refusal
        accepts_quantizing = refusal.quantizing_is_fine or self.is_told_to_accept
        accepts = refusal.prequantized_is_fine if self.is_prequantized else accepts_quantizing
        return () if accepts else refusal.devices

    @property
    def accepting_argument(self) -> str | None:
        """The argument that makes the quantizer load onto the devices that it refuses, if there is one."""
        return self.method.refusal.unless if self.refused_devices and not self.is_prequantized else None

    @property
    def is_told_to_accept(self) -> bool:
        """True if the arguments make the quantizer accept devices that it refuses by default."""
        unless = self.method.refusal.unless
        return unless is not None and bool(self.arguments.get(unless))
