"""Has `generate` make the cache that a plan has room for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.profile.schema import Cache

LEFT_TO_CALLERS = ("dynamic", "static")
"""Those that `generate` makes without being told, or has code compiled for, which `compile=True` asks for."""


def cache_arguments(cache: Cache) -> dict[str, Any]:
    """Return the arguments with which `generate` makes a cache; none for the one that it makes without any."""
    if cache.implementation == "dynamic":
        return {}
    arguments: dict[str, Any] = {"cache_implementation": cache.implementation}
    if cache.implementation == "quantized":
        bits = {} if cache.bits is None else {"nbits": cache.bits}
        arguments["cache_config"] = {"backend": cache.backend or "quanto", **bits}
    return arguments


def require_cache(cache: Cache) -> None:
    """Check, before a model is loaded, that what quantises its cache is installed.

    Raises:
        RunnerError: if it is not.
    """
    if cache.implementation != "quantized" or cache.backend == "fp8":
        return
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        raise RunnerError(
            "unfit-cache",
            "the cache is quantised by quanto, which is not installed here",
            "`pip install optimum-quanto`; or write `cache: {implementation: quantized, backend: fp8}`, which needs no"
            " package, and compile again",
        )


def give_cache(model: PreTrainedModel, cache: Cache) -> None:
    """Have a model's `generate` make this cache wherever it is not told of another."""
    if cache.implementation in LEFT_TO_CALLERS or not model.can_generate():
        return
    for name, value in cache_arguments(cache).items():
        setattr(model.generation_config, name, value)
