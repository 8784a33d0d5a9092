"""A method of quantization, and a quantization of a model by such a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from devmap_config.quantization.arguments import reported_as_error
from devmap_config.quantization.weights import linear_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from devmap_config.devices import Device
    from devmap_config.quantization.weights import Weight, Weights

FLOAT32_BYTES = 4
"""Of an element of what most quantizers compute in, whatever they are given."""

Arguments = Mapping[str, Any]
"""Those of transformers' config of a method, without the method."""


class Format(NamedTuple):
    """The format of converted weights.

    Attributes:
        size: returns the bytes of a matrix with all its companions, or `None` for a shape that the quantizer leaves as
            it is.
        planner: returns what transformers' planner counts for it (`param_element_size`).
        dtype: torch's name of the packed dtype; `None` if it is the model's own.
        bias_dtype: torch's name of the dtype of biases, if it is not the model's.
        in_buffers: the quantizer's modules hold everything in buffers, which accelerate treats otherwise than
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
    """Bytes that are held besides a quantised weight for a time, for each of its elements.

    Attributes:
        multiplying: by the copies of it that are made to multiply with it; each is written once and read once.
        for_each_token: they are made for a single token too, for which other kernels read the quantised weight.
        quantising: at most while it is quantised: its dense values and what is made of them, itself among it; 0 if
            these are its dense values and itself alone.
    """

    multiplying: int = 0
    for_each_token: bool = False
    quantising: int = 0


UNCHANGED = Format(None, lambda _: None, lambda weight: weight.elements * weight.element_bytes)
"""Of what is dequantised while loading: dense, as the model is without quantization."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The storage devices that a quantizer refuses in a map, and when: by its `validate_environment`, where no other
    place is named.

    `alone_is_fine`: a map with nothing but the CPU is accepted; `whole_is_fine`: one with a single key for it is.
    `prequantized_is_fine` and `quantizing_is_fine`: so are a checkpoint that is quantised already, and one that is
    quantised while it is loaded. `one_device_only`: nor are there several accelerators in it. `unless` is an argument
    of the quantization that makes it accept these devices, and leave there what it does not quantise: which it cannot
    of a checkpoint that is quantised already.
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
    """The properties of a method of quantization; the defaults are those of a method whose sizes are not known.

    Attributes:
        name: transformers' name of it (`QuantizationMethod`).
        format: the format of the weights; `None` if the arguments leave it open, or it is not known here.
        converts: yields the names of the converted tensors of a model on the meta device.
        details: the arguments in a few words, as in the heading of a plan.
        copies: returns the copies of weights that are made to quantise them and to multiply with them, by the bytes of
            an element of their dense values.
        computes_in: torch's name of the dtype that modules compute in, if it is not the activations'.
        source: the source of `copies`.
        refusal: the devices onto which the quantizer does not load.
        lowers_budgets: the quantizer's `adjust_max_memory` takes a tenth off every budget of the planner.
        needs_accelerator: without an accelerator, transformers dequantises the checkpoint while loading.
        needs_fp8: accelerators have to compute in fp8.
        offloads_buffers: transformers sets accelerate's `offload_buffers` itself (`accelerate_dispatch`).
        loading_arguments: what a profile may change of a checkpoint's own quantization (`get_loading_attributes`).
        completed: returns the arguments as transformers takes them, if a profile may say less.
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
    offloads_buffers: bool = False
    loading_arguments: tuple[str, ...] = ()
    completed: Callable[[Arguments], Arguments] = lambda arguments: arguments


PATCHED_MODEL_TYPES = ("llama4", "llama4_text")
"""Whose experts become other modules in a quantised checkpoint (`MODULES_TO_PATCH_FOR_QUANTIZATION`)."""


@dataclass(frozen=True)
class Quantization:
    """A quantization of a model as transformers applies it.

    `is_prequantized`: the checkpoint holds quantised weights, so that nothing is quantised while loading. `model_type`
    is the model's. `is_on_cpu`: there is no accelerator, whose kernels may need no copies of weights.
    """

    method: Method
    arguments: Arguments
    is_prequantized: bool = False
    model_type: str = ""
    is_on_cpu: bool = False

    def format(self) -> Format | None:
        """Return how its weights are stored, or `None` if that is not known.

        Raises:
            QuantizationError: if its arguments cannot be meant.
        """
        with reported_as_error(self.method.name):
            return self.method.format(self)

    @property
    def computes_in(self) -> str | None:
        """torch's name of the dtype that converted modules compute in, where that is not the activations'."""
        return self.method.computes_in(self.arguments)

    def __str__(self) -> str:
        """Return it in a few words, as in the heading of a plan: `gptq 4 bit`, `bitsandbytes nf4 4 bit`."""
        details = "dequantised" if self.format() is UNCHANGED else self.method.details(self.arguments)
        return f"{self.method.name} {details}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """Return all that a graph depends on, as plain data."""
        form = self.format()
        in_buffers = {"in_buffers": True} if form is not None and form.in_buffers else {}  # older graphs do not say so
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
        """True if transformers replaces modules of the model besides those that the quantizer replaces."""
        return self.is_prequantized and self.model_type in PATCHED_MODEL_TYPES

    @property
    def refused_devices(self) -> tuple[Device, ...]:
        """The devices onto which the quantizer loads nothing, where accelerators are at hand."""
        refusal = self.method.refusal
        accepts_quantizing = refusal.quantizing_is_fine or self.is_told_to_accept
        accepts = refusal.prequantized_is_fine if self.is_prequantized else accepts_quantizing
        return () if accepts else refusal.devices

    @property
    def accepting_argument(self) -> str | None:
        """The argument with which the quantizer would load onto the devices that it now refuses, if any."""
        return self.method.refusal.unless if self.refused_devices and not self.is_prequantized else None

    @property
    def is_told_to_accept(self) -> bool:
        """True if the arguments make the quantizer accept what it refuses by itself."""
        unless = self.method.refusal.unless
        return unless is not None and bool(self.arguments.get(unless))
