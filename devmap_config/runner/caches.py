"""Makes `generate` use the cache that a plan has room for."""

from __future__ import annotations

import inspect
from functools import partial, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from devmap_config.graph.costs import PARTLY
from devmap_config.graph.failures import UnfitCacheError
from devmap_config.graph.key_values import partly_offloaded_cache
from devmap_config.libraries.transformers import CACHE_NAMES
from devmap_config.runner.loading import RunnerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from devmap_config.profile.schema import Cache

LEFT_TO_CALLERS = ("dynamic", "static")
"""The caches that `generate` uses by default, or that `compile=True` makes it use."""


def cache_arguments(cache: Cache) -> dict[str, Any]:
    """Return the arguments with which `generate` makes a cache; none for its default.

    A partly offloaded cache is not one of transformers': `give_cache` passes it to `generate`.
    """
    if cache.implementation in ("dynamic", PARTLY):
        return {}
    arguments: dict[str, Any] = {"cache_implementation": cache.implementation}
    if cache.implementation == "quantized":
        bits = {} if cache.bits is None else {"nbits": cache.bits}
        arguments["cache_config"] = {"backend": cache.backend or "quanto", **bits}
    return arguments


def require_cache(cache: Cache) -> None:
    """Check, before a model is loaded, that the backend of its quantised cache is installed.

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


def give_cache(model: PreTrainedModel, cache: Cache, offloaded: tuple[str, ...] | None) -> None:
    """Make a model's `generate` use this cache unless a call asks for another.

    Args:
        model: the model.
        cache: the profile's cache.
        offloaded: the modules whose part of it the plan offloads; `None` if the plan does not decide that.

    Raises:
        RunnerError: if the layer of the cache that one of these modules fills is unknown.
    """
    if cache.implementation in LEFT_TO_CALLERS or not model.can_generate():
        return
    if offloaded is not None:
        _give_partly_offloaded(model, offloaded)
    for name, value in cache_arguments(cache).items():
        setattr(model.generation_config, name, value)


def _give_partly_offloaded(model: PreTrainedModel, offloaded: tuple[str, ...]) -> None:
    """Make a model's `generate` use a new cache for each request that offloads the layers of these modules."""
    make = partial(partly_offloaded_cache, model, offloaded)
    try:
        if make() is None:
            return
    except UnfitCacheError as error:
        raise RunnerError("unfit-cache", str(error), "write `cache: offloaded`, and compile again") from None
    taken = inspect.signature(type(model).forward).parameters
    name = next(name for name in CACHE_NAMES if name in taken)
    generate = model.generate

    @wraps(generate)
    def generate_with_cache(*arguments: Any, **options: Any) -> Any:
        chosen = {*CACHE_NAMES, "cache_implementation"} & {key for key, value in options.items() if value is not None}
        uses = options.get("use_cache", model.generation_config.use_cache) is not False
        given = {name: make()} if uses and not chosen else {}
        return generate(*arguments, **options, **given)

    model.generate = generate_with_cache
