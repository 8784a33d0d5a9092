"""Checks settings that plans for vLLM do not support, or that only these support."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.profile.loading import LoadedProfile

STRATEGIES = ("auto", "fastest", "longest-context", "fewest-devices", "manual")
"""`auto` means `fastest` if the machine states its rates, else `longest-context`."""

MULTIPLE_TARGETS = "a plan is made for one engine: name `transformers` or `vllm`, and keep a profile for each"


def check_settings(loaded: LoadedProfile, sink: Sink) -> None:
    """Report settings that the profile's targets do not support: several hosts without vLLM, and what vLLM does
    differently.
    """
    profile = loaded.profile
    if not profile.hardware.listed and not sink.has_errors:
        span = profile.hardware.devices.key_span
        sink.error("missing-key", "the profile lists no devices", span, help="list some, such as `cuda:0: rtx-4090`")
    if len(set(profile.targets.value)) > 1:
        sink.error("wrong-type", "`targets` names several engines", profile.targets.span, help=MULTIPLE_TARGETS)
        return
    if not profile.is_for_vllm:
        _check_without_vllm(loaded, sink)
        return
    for span, message, help in _beyond(loaded):
        sink.error("beyond-vllm", message, span, help=help)
    workload = profile.workload
    if workload.context_length.value is None and "context_length" not in workload.doubtful:
        sink.error(
            "missing-workload",
            "vLLM reserves its cache for requests of a length, and the profile names none",
            profile.targets.span,
            help="say how long a request may be: `workload: {context_length: 8192}`",
        )


def _check_without_vllm(loaded: LoadedProfile, sink: Sink) -> None:
    profile = loaded.profile
    if profile.hardware.hosts and "targets" not in profile.doubtful:
        sink.error(
            "hosts-need-vllm",
            "`hardware.hosts` are several machines, and a device_map of transformers is one process on one",
            profile.hardware.devices.key_span,
            help="write `targets: [vllm]`, or list the devices of one machine under `hardware.devices`",
        )
    unused = {
        "placement.groups": profile.placement.groups[0].span if profile.placement.groups else None,
        "workload.concurrency": profile.workload.concurrency.key_span
        if profile.workload.concurrency.is_written and profile.workload.concurrency.value > 1
        else None,
    }
    for key, span in unused.items():
        if span is not None and not profile.hardware.hosts:
            sink.error(
                "unused-key",
                f"`{key}` has no effect without `targets: [vllm]`",
                span,
                help="write `targets: [vllm]`, or remove it",
            )


def _beyond(loaded: LoadedProfile) -> Iterator[tuple[Span, str, str]]:
    """Yield settings that vLLM does not support, or that are not counted for it: the place, the message, and advice."""
    model, workload, placement = loaded.profile.model, loaded.profile.workload, loaded.profile.placement
    if model.adapter is not None:
        yield model.adapter.span, "an adapter is not counted in plans for vLLM", "merge it into the model, or remove it"
    if model.assistant is not None:
        yield model.assistant.span, "a draft model is not counted in plans for vLLM", "remove it"
    if workload.cache.implementation != "dynamic":
        yield workload.cache.span, "vLLM has a cache of its own, in blocks", "remove `cache`"
    if workload.inputs.images or workload.inputs.audio_seconds:
        yield workload.inputs.span, "images and sound are not counted in plans for vLLM", "remove `inputs`"
    strategy = placement.strategy
    if strategy.value not in STRATEGIES:
        listed = ", ".join(f"`{name}`" for name in STRATEGIES[1:3])
        message = f"`{strategy.value}` decides where modules of a device_map are, and vLLM has stages of whole layers"
        yield strategy.span, message, f"one of {listed}"
    if placement.offload.folder.is_written:
        yield placement.offload.folder.span, "vLLM keeps no weights on a disk", "remove `offload`"
    if placement.device.value is not None:
        yield placement.device.span, "`device` is that of `strategy: single`", "remove it"
