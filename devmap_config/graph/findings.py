"""Reports the findings of a measurement on a profile's workload, and what could not be measured and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from devmap_config.graph.costs import LEAST_WORDS
from devmap_config.graph.failures import MeasurementFailure

if TYPE_CHECKING:
    from devmap_config.diagnostics.diagnostic import Sink, Span
    from devmap_config.graph.costs import Measurement
    from devmap_config.graph.model import ModelGraph


def report_unread(graph: ModelGraph, reason: str, span: Span | None, sink: Sink, *, allowed: bool) -> None:
    """Report that the tensors merged while loading are unknown; an error if the model may have some."""
    may_be_merged = any(len(tensor.shape) > 2 for tensor in graph.root.tensors() if tensor.kind == "parameter")
    consequence = "what loading takes besides the weights is not known, and the plan has no room for it"
    report_failure(MeasurementFailure("library", reason), consequence, span, sink, allowed=allowed or not may_be_merged)


def report_positions(measurement: Measurement, span: Span | None, sink: Sink) -> None:
    """Report a context that is longer than the model takes, or than it was trained for."""
    positions, wanted = measurement.positions, measurement.workload.context_length
    if positions.end is not None and wanted > positions.end:
        sink.error(
            "context-too-long",
            f"the model's positions end at {positions.end:,} tokens, and {wanted:,} are wanted",
            span,
            help=f"write `context_length: {positions.end}` or less",
        )
    elif positions.trained is not None and wanted > positions.trained:
        sink.warning(
            "context-too-long",
            f"the model was trained for {positions.trained:,} tokens, by its config, and {wanted:,} are wanted",
            span,
            help="it runs, but its output beyond that is seldom useful; to stretch its rotary positions, set"
            " `rope_parameters` in its config",
        )


LESS = "leave out what it does not take"


def report_media(measurement: Measurement, span: Span | None, sink: Sink) -> None:
    """Report why images and sound of a workload were not measured; an error if the profile can be corrected."""
    media = measurement.media
    if media is None or media.problem is None:
        return
    if media.problem == "none":
        sink.error("unfit-input", f"this model does not take such inputs: {media.reason}", span, help=LESS)
    elif media.problem == "size":
        help = "say how large they are, height and width in pixels: `inputs: {images: 1, image_size: [896, 896]}`"
        sink.error("missing-key", "this model takes images of any size, and `image_size` is missing", span, help=help)
    elif media.problem == "room":
        length = measurement.workload.prompt_length
        message = f"images and sound take {media.tokens:,} tokens of the prompt, which has {length:,} with its text"
        least = f"a `prompt_length` (without one, a `context_length`) of {media.tokens + LEAST_WORDS:,} or more"
        help = f"{least}, or {'fewer or smaller images' if measurement.workload.images else 'less sound'}"
        sink.error("prompt-too-short", message, span, help=help)
    else:
        sink.warning(
            "untried-inputs",
            f"the plan was not tested with images or sound: {media.reason}",
            span,
            help="only text was measured: leave room on the device of the tower, and try it with `devmap run`",
        )


def report_cache(measurement: Measurement, span: Span | None, sink: Sink) -> None:
    """Report a cache that the model does not support, or whose bytes on each device are unknown."""
    name, end = measurement.workload.cache, measurement.positions.end
    if measurement.has_unfit_cache:
        reason = f"transformers gives this model no cache that is {cache_in_an_adjective(name)}: {measurement.reason}"
    elif name in ("dynamic", "static") or (end is not None and measurement.workload.context_length > end):
        return
    elif not measurement.measured:
        reason = f"how much a cache would take that is {cache_in_an_adjective(name)} is not known: {measurement.reason}"
    elif name != "quantized" and not any(cost.offloaded_bytes for cost in measurement.modules):
        reason = f"no part of this model's cache is ever {cache_in_an_adjective(name)}"
    else:
        return
    sink.error("unfit-cache", reason, span, help="write `cache: dynamic`, or leave it out")


def cache_in_an_adjective(implementation: str) -> str:
    """Return an adjective for a kind of cache."""
    return "quantised" if implementation == "quantized" else "offloaded"


def report_unmeasured(measurement: Measurement, span: Span | None, sink: Sink, *, allowed: bool) -> None:
    """Report that formulas replace a measurement, and why; an error if that is not allowed."""
    end = measurement.positions.end
    if measurement.measured or (end is not None and measurement.workload.context_length > end):
        return
    if measurement.media is not None and measurement.media.problem not in (None, "untried"):
        return  # reported as an error elsewhere
    if measurement.workload.cache not in ("dynamic", "static"):
        return  # reported elsewhere, too
    failure = MeasurementFailure(measurement.cause, measurement.reason or "")
    if failure.cause == "model":
        sink.warning(
            "unmeasured-model",
            f"the model's code cannot be run without data ({failure.reason}): formulas stand in for it",
            span,
            help="leave more room than usual, by `reserve` on the accelerators",
        )
    else:
        consequence = "formulas stand in for measuring the model" if allowed else "the model is not measured"
        report_failure(failure, consequence, span, sink, allowed=allowed)


ALLOW_UNMEASURED = "`--allow-unmeasured`"


def report_failure(
    failure: MeasurementFailure, consequence: str, span: Span | None, sink: Sink, *, allowed: bool | None
) -> None:
    """Report that something could not be determined because of a library or a mistake of this package.

    Args:
        failure: the reason, and its cause.
        consequence: what follows from it, as a clause.
        span: the place in the profile that asks for it.
        sink: takes the diagnostic.
        allowed: whether the user allowed it, which makes it a warning; `None` if it cannot be allowed.
    """
    code: Literal["library-changed", "measuring-failed"]
    if failure.cause == "library":
        code, message = "library-changed", f"{failure.reason}: {consequence}"
        mend = "install a version that was tried (docs/libraries.md)"
    else:
        code, message = "measuring-failed", f"devmap-config made a mistake, {failure.reason}: {consequence}"
        mend = "please report it"
    if allowed:
        help = f"{mend}; leave more room than usual, by `reserve` on the accelerators"
        sink.warning(code, message, span, help=help)
    elif allowed is None:
        sink.error(code, message, span, help=mend)
    else:
        sink.error(code, message, span, help=f"{mend}, or pass {ALLOW_UNMEASURED} to go on without")
