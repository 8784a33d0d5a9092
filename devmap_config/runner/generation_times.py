"""Measures the time of a loaded model for a prompt of made-up tokens, and for each token after it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from devmap_config.graph.forwards import cache_tensors
from devmap_config.libraries.transformers import CACHE_NAMES
from devmap_config.runner.inputs import MadeUp, made_up_inputs, placed
from devmap_config.runner.inspection import device_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

    from devmap_config.devices import Device

WARM_UP_TOKENS = 2
"""The tokens that are generated before measuring, so that buffers are allocated, kernels chosen, and mapped files
read.
"""


@dataclass(frozen=True, kw_only=True)
class GenerationWorkload:
    """The generation that is measured: prompts of one length, and tokens after them, unless the model does not decode.

    Attributes:
        cache: the arguments with which `generate` makes the planned cache.
    """

    prompts: MadeUp
    new_tokens: int
    cache: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GenerationTimes:
    """The times of a model, round by round.

    Attributes:
        workload: the generation that was measured.
        first_generation_seconds: the time of a warm-up.
        prefill_seconds: the times to the first token, or of a forward if the model writes no text.
        decode_seconds: the median time of a token in each round; empty if only one token is written.
        kv_cache_bytes: the bytes of the cache at the end, by the device of its tensors.
    """

    workload: GenerationWorkload
    first_generation_seconds: float
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    kv_cache_bytes: Mapping[Device, int]

    def to_json(self) -> dict[str, Any]:
        """Return the times with their medians as plain data, for a receipt."""
        return {
            "prompt_tokens": self.workload.prompts.length,
            "new_tokens": self.workload.new_tokens,
            "first_generation_seconds": self.first_generation_seconds,
            "prefill_seconds": median(self.prefill_seconds),
            "prefill_seconds_each": list(self.prefill_seconds),
            "decode_seconds_per_token": median(self.decode_seconds) if self.decode_seconds else None,
            "decode_seconds_each": list(self.decode_seconds),
        }


class TokenClock:
    """A streamer for transformers' `generate` that records when the prompt was taken, and when each token arrived."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, _tokens: torch.Tensor) -> None:
        """Record that tokens arrived; they are on the CPU, so the accelerator is done with them."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end, as the interface of streamers requires the method."""


def measure_generation(
    model: PreTrainedModel, workload: GenerationWorkload, *, rounds: int = 1, least_seconds: float = 0
) -> GenerationTimes:
    """Have a model generate, and return the times.

    Args:
        model: a model that is loaded.
        workload: the generation of each round, and of the warm-up.
        rounds: the least number of rounds.
        least_seconds: the least time of all rounds.

    Raises:
        RunnerError: if the model takes no tokens. A model that does not run may raise anything else.
    """
    import torch

    ignore_stop_strings(model)
    inputs = placed(made_up_inputs(model, workload.prompts), model)
    prefills: list[float] = []
    decodes: list[float] = []
    cache: Any = None
    with torch.no_grad():
        start_seconds = time.perf_counter()
        # The length of a static cache, which code is compiled for, is that of the generation.
        _passed(
            model,
            inputs,
            workload,
            max(workload.new_tokens, WARM_UP_TOKENS) if workload.cache else WARM_UP_TOKENS,
        )
        first_seconds = time.perf_counter() - start_seconds
        end_seconds = time.perf_counter() + least_seconds
        while len(prefills) < rounds or time.perf_counter() < end_seconds:
            cache = None  # free it, so that the next request starts without it
            seconds, cache = _passed(model, inputs, workload, max(workload.new_tokens, 1))
            prefills.append(seconds[0])
            decodes += [median(seconds[1:])] if seconds[1:] else []
    return GenerationTimes(
        workload=workload,
        first_generation_seconds=first_seconds,
        prefill_seconds=tuple(prefills),
        decode_seconds=tuple(decodes),
        kv_cache_bytes=_bytes_by_device(cache),
    )


def ignore_stop_strings(model: PreTrainedModel) -> None:
    """Have a model ignore the stop strings of its generation config, as made-up tokens are no text."""
    if model.can_generate():
        model.generation_config.stop_strings = None


def _passed(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], workload: GenerationWorkload, new_tokens: int
) -> tuple[list[float], Any]:
    """Return the seconds of a prefill and of each token after the first, or of a forward, and the cache."""
    if not model.can_generate():
        start_seconds = time.perf_counter()
        output = next(iter(model(**inputs).values()))
        if hasattr(output, "cpu"):
            output.cpu()  # waits for the accelerator
        return [time.perf_counter() - start_seconds], None
    clock = TokenClock()
    generated = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,  # with beams, transformers streams nothing before the end
        streamer=clock,
        return_dict_in_generate=True,
        **workload.cache,
    )
    held = dict(generated)  # transformers' class warns of deprecated names
    cache = next((cache for name in CACHE_NAMES if (cache := held.get(name)) is not None), None)
    return [after - before for before, after in pairwise(clock.seconds)], cache


def _bytes_by_device(cache: Any) -> dict[Device, int]:
    held: dict[Device, int] = {}
    for tensor in [] if cache is None else cache_tensors(cache):
        device = device_of(tensor.device)
        held[device] = held.get(device, 0) + tensor.nbytes
    return held
