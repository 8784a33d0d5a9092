"""Shows a plan for vLLM: its stages as a table, the stage that limits it, and the effect of moving a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from devmap_config.amounts import counted, format_bytes, format_change, format_duration, largest_unit
from devmap_config.cli.predictions import bases_in_words
from devmap_config.cli.tables import new_table
from devmap_config.plan.values import folded_devices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from devmap_config.compiler import Compiled
    from devmap_config.pipeline.stages import Pipeline, Stage


def stage_lines(compiled: Compiled, pipeline: Pipeline) -> Iterator[Text | Table]:
    """Yield the stages as a table, and sentences about all of them."""
    unit_bytes, unit = largest_unit(compiled.graph.size_bytes)
    plan = compiled.plan
    yield Text.assemble(
        (compiled.model.class_name, "bold"),
        f": {format_bytes(compiled.graph.size_bytes)} in {compiled.model.dtype}, {_shape(pipeline)} for vLLM,"
        f" by `{plan.strategy}`; sizes of one device in {unit}",
    )
    table = new_table("stage", figures=("layers", "weights", "cache", "running", "free", "tokens", "a step"))
    for number, stage in enumerate(pipeline.stages):
        step = "?" if stage.decode_nanoseconds is None else format_duration(stage.decode_nanoseconds)
        figures = (f"{size_bytes / unit_bytes:,.1f}" for size_bytes in _sizes(pipeline, stage))
        layers = f"{stage.first_layer}-{stage.last_layer}"
        table.add_row(f"{number} {devices_in_words(stage)}", layers, *figures, f"{_tokens(pipeline, stage):,}", step)
    yield table
    yield from map(Text, pipeline_notes(compiled, pipeline))


def _shape(pipeline: Pipeline) -> str:
    ranks = pipeline.tensor_parallel_size
    hosts = f" over {counted(len(pipeline.hosts), 'host')}" if pipeline.hosts[0].name is not None else ""
    groups = f" of {ranks} devices each" if ranks > 1 else ""
    return f"{counted(len(pipeline.stages), 'stage')}{groups}{hosts}"


def _sizes(pipeline: Pipeline, stage: Stage) -> tuple[int, int, int, int]:
    """Return the bytes of weights, of the cache with the whole pipeline's blocks, of a forward and vLLM's processes,
    and the rest.
    """
    cache_bytes = pipeline.blocks * stage.page_bytes
    running_bytes = stage.activation_bytes + stage.overhead_bytes
    free_bytes = stage.capacity_bytes - stage.weights_bytes - cache_bytes - running_bytes
    return stage.weights_bytes, cache_bytes, running_bytes, free_bytes


def _tokens(pipeline: Pipeline, stage: Stage) -> int:
    return stage.blocks * pipeline.max_model_len // pipeline.blocks_per_request


def devices_in_words(stage: Stage) -> str:
    """Return the devices of a stage, as a range if there are several."""
    return ", ".join(folded_devices(map(str, stage.devices)))


def pipeline_notes(compiled: Compiled, pipeline: Pipeline) -> Iterator[str]:
    """Yield sentences about a plan for vLLM: its cache, the stage that limits it, and the times of requests."""
    yield cache_in_words(pipeline)
    prediction = compiled.plan.prediction
    words = []
    if prediction.decode_nanoseconds_per_token is not None:
        seconds = prediction.decode_nanoseconds_per_token / 10**9
        rate = pipeline.max_num_seqs / seconds
        digits = 0 if rate >= 10 else 1
        rate_in_all = f", {rate:,.{digits}f} tokens a second in all" if pipeline.max_num_seqs > 1 else ""
        words.append(f"{format_duration(prediction.decode_nanoseconds_per_token)} a token of a request{rate_in_all}")
    if prediction.prefill_nanoseconds is not None:
        words.append(f"{format_duration(prediction.prefill_nanoseconds)} a prefill")
    if prediction.longest_context is not None:
        words.append(f"a context of up to {prediction.longest_context:,} tokens")
    yield f"predicted: {', '.join(words)}"
    if bases := compiled.time_bases:
        yield f"{bases_in_words(bases, prediction)}; of vLLM no run was seen"
    unused = [use.id for use in compiled.plan.devices if not use.weights_bytes]
    from devmap_config.pipeline.slots import MOST_CHOICES
    from devmap_config.plan.pipelines import all_orders_tried  # imports numpy

    are_all = all_orders_tried(compiled)
    if not are_all:
        yield f"of the ways to choose and order these devices, {MOST_CHOICES:,} were tried: there may be better stages"
    if unused:
        they_stay = "it stays" if len(unused) == 1 else "they stay"
        tried = "" if are_all else " that were tried"
        names = ", ".join(folded_devices(map(str, unused)))
        if compiled.plan.strategy == "fewest-devices":
            yield f"{names} {they_stay.partition(' ')[2]} empty: no fewer devices{tried} have room"
        else:
            yield f"no stages{tried} that use {names} are better: {they_stay} empty"


def cache_in_words(pipeline: Pipeline) -> str:
    """Return the tokens of the cache, and the stage that limits it, in words."""
    stage = pipeline.stages[pipeline.deciding_stage]
    requests = f"{counted(pipeline.max_num_seqs, 'request')} of {pipeline.max_model_len:,}"
    rooms = {stage.blocks for stage in pipeline.stages}
    decides = (
        f"stage {pipeline.deciding_stage} on {devices_in_words(stage)} decides, which has the least room"
        if len(rooms) > 1
        else "every stage has room for as many"
    )
    return f"the cache holds {pipeline.cache_tokens:,} tokens, for {requests} at once: {decides}"


def pipeline_story(compiled: Compiled, pipeline: Pipeline) -> Iterator[str]:
    """Yield an explanation of a plan for vLLM: its stages, the one that limits it, and the effect of moving a layer."""
    plan, model = compiled.plan, compiled.model
    weights = f"{format_bytes(compiled.graph.size_bytes)} in {model.dtype}"
    yield f"{model.class_name}, weights of {weights}, in {_shape(pipeline)} for vLLM, by `{plan.strategy}`."
    for number, stage in enumerate(pipeline.stages):
        yield _stage_in_words(pipeline, number, stage)
    notes = list(pipeline_notes(compiled, pipeline))
    yield from (f"{note[0].upper()}{note[1:]}." for note in notes)
    yield from _pace(compiled, pipeline)
    yield from _moves(compiled, pipeline)


def _stage_in_words(pipeline: Pipeline, number: int, stage: Stage) -> str:
    ends = [
        *(["the embedding"] if number == 0 else []),
        *(["the norm and the head"] if number == len(pipeline.stages) - 1 else []),
    ]
    besides = f", with {' and '.join(ends)}" if ends else ""
    each = " each" if len(stage.devices) > 1 else ""
    token = "" if stage.decode_nanoseconds is None else f"; {format_duration(stage.decode_nanoseconds)} a step"
    return (
        f"Stage {number}, {devices_in_words(stage)}: layers {stage.first_layer} to {stage.last_layer}{besides};"
        f" {format_bytes(stage.weights_bytes)} of weights of {format_bytes(stage.capacity_bytes)}{each}, room for"
        f" {_tokens(pipeline, stage):,} tokens of cache{token}."
    )


def _pace(compiled: Compiled, pipeline: Pipeline) -> Iterator[str]:
    """Yield sentences about what limits the speed: the slowest stage if several batches are in flight, else the sum."""
    times = [stage.decode_nanoseconds or 0 for stage in pipeline.stages]
    token, slowest = compiled.plan.prediction.decode_nanoseconds_per_token, pipeline.slowest_stage
    if token is None or slowest is None or len(times) == 1:
        return
    where = f"stage {slowest} on {devices_in_words(pipeline.stages[slowest])}"
    requests = counted(compiled.loaded.profile.workload.concurrency.value, "request")
    if token > sum(times):
        batches = token // max(times)
        yield (
            f"With {requests} in flight, {batches} batches are under way, and the slowest stage binds: {where},"
            f" {format_duration(max(times))} a step, {batches} of which pass between two tokens of a request."
        )
    else:
        yield (
            f"With {requests} in flight, the stages work one after another, and all of them bind: the slowest is"
            f" {where}, {format_duration(max(times))} of {format_duration(token)}."
        )


def _moves(compiled: Compiled, pipeline: Pipeline) -> Iterator[str]:
    from devmap_config.plan.pipelines import moves_of_a_layer

    token = compiled.plan.prediction.decode_nanoseconds_per_token
    for move in moves_of_a_layer(compiled.plan, compiled):
        where = f"Layer {move.layer} on stage {move.target} instead of {move.source}"
        if move.obstacle is not None:
            yield f"{where}: {move.obstacle}."
            continue
        words = []
        if token is not None and move.decode_nanoseconds is not None:
            change = format_change(token, move.decode_nanoseconds)
            words.append(f"{format_duration(move.decode_nanoseconds)} a token ({change or 'as now'})")
        change = format_change(pipeline.cache_tokens, move.cache_tokens)
        words.append(f"a cache of {move.cache_tokens:,} tokens ({change or 'as now'})")
        yield f"{where}: {', '.join(words)}."


def module_in_words(compiled: Compiled, pipeline: Pipeline, name: str) -> Iterator[str]:
    """Yield the stage of a module, and why stages hold modules as a whole."""
    location = compiled.plan.locations
    names = [unit for unit in location if unit == name or unit.startswith(f"{name}.")] or [
        unit for unit in location if name.startswith(f"{unit}.")
    ]
    devices = dict.fromkeys(location[name].stored_on for name in names)
    for number, stage in enumerate(pipeline.stages):
        if stage.devices[0] in devices:
            layers = f"layers {stage.first_layer} to {stage.last_layer}"
            yield f"`{name}` is on stage {number}, {devices_in_words(stage)}, which has {layers}."
