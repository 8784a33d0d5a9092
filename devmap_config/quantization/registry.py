"""Every method of quantization by name, and the quantization that follows from a profile and a config."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from devmap_config.quantization import methods
from devmap_config.quantization.method import Method, Quantization
from devmap_config.quantization.unsized import UNSIZED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def _sized() -> Iterator[Method]:
    """Yield the method of every file in `methods`."""
    for file in iter_modules(methods.__path__, f"{methods.__name__}."):
        yield import_module(file.name).METHOD


METHODS: Mapping[str, Method] = MappingProxyType(
    {method.name: method for method in sorted((*_sized(), *UNSIZED), key=lambda method: method.name)}
)
"""The methods of transformers 5.24's `QuantizationMethod`, ordered by name."""


def effective_quantization(
    own: Mapping[str, Any] | None, config: Mapping[str, Any], *, has_accelerator: bool = True
) -> Quantization | None:
    """Return the quantization that transformers applies: the checkpoint's if there is one, else the profile's.

    Args:
        own: `model.quantization` of the profile.
        config: the model's config.
        has_accelerator: whether the machine has an accelerator; without one, some methods dequantise while loading.
    """
    text_config = config.get("text_config")
    nested = text_config.get("quantization_config") if isinstance(text_config, dict) else None
    of_checkpoint = config.get("quantization_config") or nested
    own_arguments = {name: value for name, value in (own or {}).items() if name != "method"}
    if isinstance(of_checkpoint, dict) and isinstance(of_checkpoint.get("quant_method"), str):
        method = _method(of_checkpoint["quant_method"])
        arguments = {name: value for name, value in of_checkpoint.items() if name != "quant_method"}
        if own and own["method"] == method.name:
            arguments |= {name: own_arguments[name] for name in method.loading_arguments if name in own_arguments}
        is_prequantized = True
    elif own:
        method, arguments, is_prequantized = _method(str(own["method"])), own_arguments, False
    else:
        return None
    if method.needs_accelerator and not has_accelerator:
        arguments = {**arguments, "dequantize": True}
    model_type = str(config.get("model_type", ""))
    return Quantization(method, arguments, is_prequantized, model_type, is_on_cpu=not has_accelerator)


def _method(name: str) -> Method:
    """Return a method by its name; an unknown method has unknown sizes."""
    return METHODS.get(name) or Method(name=name)


def transformers_arguments(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model.quantization` of a profile in the form for transformers."""
    arguments = {name: value for name, value in own.items() if name != "method"}
    return {"quant_method": own["method"], **_method(own["method"]).completed(arguments)}
