"""Compares engines on a machine by plans for each, as another engine may suit it better than the profile's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from devmap_config.amounts import format_bytes, format_duration
from devmap_config.compiler import Compiled, run_pipeline
from devmap_config.exports.export import UnfitExportError
from devmap_config.exports.llama_cpp import placement_flags
from devmap_config.plan.values import folded_devices
from devmap_config.rules.folding import fold_paths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devmap_config.compiler import Compilation, Request
    from devmap_config.devices import Device

LESS_PERCENT = 90
"""Sharing layers is reported if a token then takes at most this percentage of its time without sharing."""

Q4_0_BYTES, Q4_0_WEIGHTS = 18, 32
"""In llama.cpp's type `Q4_0`, this many bytes hold this many weights."""


@dataclass(frozen=True, kw_only=True)
class OtherEngine:
    """An engine that suits a machine better than the profile's, and why.

    `settings` are the keys of a profile for it, `flags` those of llama.cpp. `compiled` has the plan for it; for
    llama.cpp, that is the profile's own.
    """

    name: str
    reason: str
    compiled: Compiled
    settings: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        plan = self.compiled.plan
        return {
            "name": self.name,
            "reason": self.reason,
            "settings": dict(self.settings),
            "flags": list(self.flags),
            "prediction": plan.prediction.to_json(),
            "pipeline": None if plan.pipeline is None else plan.pipeline.to_json(),
        }


def other_engine(request: Request, compilation: Compilation) -> OtherEngine | None:
    """Return the engine that suits the machine better than the profile's own; `None` if no plan shows that one does.

    Args:
        request: a profile on a machine.
        compilation: the result of compiling it.
    """
    prepared = compilation if isinstance(compilation, Compiled) else compilation.reached
    if prepared is None:
        return None
    compiled = compilation if isinstance(compilation, Compiled) else None
    if prepared.is_for_vllm:
        return _transformers(request) if compiled is None else None
    engine = _vllm(request, compiled, tuple(device.id for device in prepared.inventory.accelerators))
    return engine or (None if compiled is None else _llama_cpp(compiled))


def _transformers(request: Request) -> OtherEngine | None:
    """Return transformers if vLLM has no plan: it can offload weights, or compute on the CPU."""
    made = run_pipeline(replace(request, engine="transformers"))
    if not isinstance(made, Compiled):
        return None
    plan, sequences = made.plan, made.loaded.profile.workload.batch_size
    words = []
    if (token := plan.prediction.decode_nanoseconds_per_token) is not None:
        each = f" of each of {sequences} sequences" if sequences > 1 else ""
        words.append(f"{format_duration(token)} a token{each}")
    if plan.prediction.streamed_bytes_per_token:
        words.append(f"{format_bytes(plan.prediction.streamed_bytes_per_token)} {plan.streaming}")
    if plan.computed_on_cpu:
        words.append("a part is computed on the CPU")
    return OtherEngine(
        name="transformers",
        reason=f"there is a plan for it: {', '.join(words) or 'all of the weights fit'}",
        compiled=made,
        settings={"targets": ["transformers"], "workload": {"batch_size": sequences}},
    )


def _vllm(request: Request, compiled: Compiled | None, cards: tuple[Device, ...]) -> OtherEngine | None:
    """Return vLLM if transformers has no plan, or if equal cards can share each layer and make a token faster.

    With transformers, as with stages, cards work one after another. Both times are those of plans for vLLM, because
    predictions for transformers depend on other costs.
    """
    if len(cards) < 2:
        return None
    in_stages, shared = (
        made if isinstance(made := run_pipeline(replace(request, engine="vllm", groups=groups)), Compiled) else None
        for groups in ((), (cards,))
    )
    before, after = _token_nanoseconds(in_stages), _token_nanoseconds(shared)
    is_faster = before is not None and after is not None and after * 100 <= before * LESS_PERCENT
    best = shared if is_faster or in_stages is None else in_stages
    if best is None or best.plan.pipeline is None or (compiled is not None and not is_faster):
        return None
    pipeline, words = best.plan.pipeline, []
    if best is shared:
        words.append(f"{', '.join(folded_devices(map(str, cards)))} share each layer")
    elif len(pipeline.stages) > 1:
        words.append(f"stages of {' + '.join(map(str, pipeline.partition))} layers")
    else:
        words.append(f"all layers on {pipeline.stages[0].devices[0]}")
    if (token := _token_nanoseconds(best)) is not None:
        requests = pipeline.max_num_seqs
        each = f" of each of {requests} requests" if requests > 1 else ""
        than = f", {format_duration(before)} in stages" if best is shared and before is not None else ""
        words.append(f"{format_duration(token)} a token{each}{than}")
    words.append(f"a cache of {pipeline.cache_tokens:,} tokens")
    group = {"placement": {"groups": list(folded_devices(map(str, cards)))}} if best is shared else {}
    return OtherEngine(name="vLLM", reason=", ".join(words), compiled=best, settings={"targets": ["vllm"], **group})


def _token_nanoseconds(compiled: Compiled | None) -> int | None:
    return None if compiled is None else compiled.plan.prediction.decode_nanoseconds_per_token


def _llama_cpp(compiled: Compiled) -> OtherEngine | None:
    """Return llama.cpp if the CPU computes what a card has no room for, as flags alone place a GGUF in this way."""
    graph, units = compiled.graph, compiled.plan.computed_on_cpu
    if not units or not compiled.inventory.accelerators:
        return None
    try:
        flags = placement_flags(compiled)
    except UnfitExportError:
        return None
    on_cpu = [
        name for assignment in compiled.plan.assignments if assignment.unit in units for name in assignment.tensors
    ]
    weights = sum(tensor.element_count for tensor in graph.tensors.values() if tensor.kind == "parameter")
    return OtherEngine(
        name="llama.cpp",
        reason=(
            f"the CPU computes {', '.join(fold_paths(units))}, {format_bytes(graph.weights_bytes(on_cpu))}: a"
            " device_map cannot say that, and flags for a GGUF of this model do; of its weights, which are"
            f" {format_bytes(graph.size_bytes)}, a GGUF in Q4_0 has"
            f" {format_bytes(weights * Q4_0_BYTES // Q4_0_WEIGHTS)}"
        ),
        compiled=compiled,
        flags=tuple(part for flag in flags for part in flag),
    )
